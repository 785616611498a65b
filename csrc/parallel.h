// Splits work over threads on the CPU, and only when it is worth a thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace mimfast {

// calls work(begin, end) over parts of [0, n) on at most `threads` threads, each with at least `grain` items
template <typename Work>
void parallel_for(int64_t n, int64_t grain, int threads, const Work& work) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, n / std::max<int64_t>(1, grain)));
  std::vector<std::thread> others;
  for (int64_t part = 1; part < parts; ++part) others.emplace_back(work, n * part / parts, n * (part + 1) / parts);
  work(int64_t{0}, n / parts);
  for (std::thread& other : others) other.join();
}

}  // namespace mimfast
