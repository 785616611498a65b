// Splits work over threads on the CPU, and only when it is worth a thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace mimfast {

using OpenMp = void (*)(void (*run)(void*), void* data, unsigned threads, unsigned flags);

// Starts a function on the threads of the OpenMP runtime that torch brought into this process; null without one. These
// threads keep their cores busy for some milliseconds after each operator of torch, waiting for the next, so that
// threads of our own would get half of the cores.
inline OpenMp open_mp() {
#if defined(__linux__)
  static const OpenMp found = reinterpret_cast<OpenMp>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#else
  return nullptr;
#endif
}

// calls work(begin, end) over parts of [0, n) on at most `threads` threads, each with at least `grain` items
template <typename Work>
void parallel_for(int64_t n, int64_t grain, int threads, const Work& work) {
  struct Parts {
    const Work& work;
    int64_t n, count;
    std::atomic<int64_t> next{0};

    void run() {
      for (int64_t part = next++; part < count; part = next++) work(n * part / count, n * (part + 1) / count);
    }
  };
  Parts parts{work, n, std::max<int64_t>(1, std::min<int64_t>(threads, n / std::max<int64_t>(1, grain)))};
  if (parts.count == 1) return parts.run();
  if (const OpenMp start = open_mp()) {
    const auto run = [](void* data) { static_cast<Parts*>(data)->run(); };
    return start(run, &parts, static_cast<unsigned>(parts.count), 0);
  }
  std::vector<std::thread> others;
  for (int64_t part = 1; part < parts.count; ++part) others.emplace_back([&] { parts.run(); });
  parts.run();
  for (std::thread& other : others) other.join();
}

}  // namespace mimfast
