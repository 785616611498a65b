// The part of CUDA that csrc/*.cu uses, for an ordinary C++ compiler: the tests run every kernel without a GPU.
//
// Blocks run one after the other. The threads of a block are cooperative fibers (ucontext), resumed in alternating
// order, so that a value read without the barrier it needs comes out wrong here too. __shared__ is static storage; it
// keeps what the block before left there; dynamic shared memory starts as NaN. A warp operation is a barrier of its 32
// lanes. An asynchronous copy happens when its thread waits for it. A block that can no longer move raises an error
// instead of hanging. Not emulated: time, memory ordering, partial warp masks, block sizes that are not a multiple
// of 32.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct CUstream_st;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace mimfast::emulate {

constexpr int kWarp = 32;
constexpr int kWords = 3;  // that a lane can show at once
constexpr size_t kStackBytes = 64 * 1024;

// `data` and `count` are double buffers indexed by the parity of `generation`: whoever is still reading the last
// round's values cannot be overtaken by more than one round, so one barrier per operation is enough.
struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
  uint64_t data[2][kWarp] = {};
  uint64_t words[2][kWarp][kWords] = {};
  int count[2] = {};

  void release() {
    arrived = 0;
    ++generation;
    count[generation & 1] = 0;
  }
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int group;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  dim3 index;
  bool done = false;
  const Barrier* waits_at = nullptr;
  uint64_t waits_since = 0;
  std::vector<Copy> copies;  // asynchronous, not yet waited for
  int group = 0;             // of the next copy

  bool ready() const { return !done && (waits_at == nullptr || waits_at->generation != waits_since); }
};

struct Machine {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  Barrier block;
  size_t current = 0;
  int alive = 0;
  void (*call)(void*) = nullptr;
  void* kernel = nullptr;
  std::exception_ptr error;
  std::vector<std::max_align_t> shared;  // dynamic

  int lane() const { return static_cast<int>(current % kWarp); }
  Barrier& warp() { return warps[current / kWarp]; }

  void arrive(Barrier& barrier, int expected) {
    Fiber& self = fibers[current];
    self.waits_since = barrier.generation;
    if (++barrier.arrived == expected) return barrier.release();
    self.waits_at = &barrier;
    swapcontext(&self.context, &scheduler);
    self.waits_at = nullptr;
  }

  void finish() {
    fibers[current].done = true;
    if (--alive > 0 && block.arrived == alive) block.release();  // threads that have left count as arrived
  }
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

inline void fiber_main() {
  Machine& m = machine();
  try {
    m.call(m.kernel);
  } catch (...) {
    m.error = std::current_exception();
  }
  m.finish();
  swapcontext(&m.fibers[m.current].context, &m.scheduler);
}

inline void run_block(Machine& m, int threads) {
  m.block = Barrier{};
  m.warps.assign(threads / kWarp, Barrier{});
  m.alive = threads;
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = m.fibers[t];
    fiber.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    fiber.done = false;
    fiber.waits_at = nullptr;
    fiber.copies.clear();
    fiber.group = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (bool forward = true; m.alive > 0; forward = !forward) {
    bool moved = false;
    for (int step = 0; step < threads; ++step) {
      m.current = forward ? step : threads - 1 - step;
      if (!m.fibers[m.current].ready()) continue;
      moved = true;
      threadIdx = m.fibers[m.current].index;
      swapcontext(&m.scheduler, &m.fibers[m.current].context);
      if (m.error) std::rethrow_exception(std::exchange(m.error, nullptr));
    }
    if (!moved)
      throw std::runtime_error("emulate: block " + std::to_string(blockIdx.x) + " cannot go on: " +
                               std::to_string(m.alive) + " threads wait at barriers that the others do not reach");
  }
}

// runs `kernel` (a callable without arguments) for every thread of every block
template <typename Kernel>
void run(dim3 grid, dim3 block, size_t shared_bytes, Kernel kernel) {
  Machine& m = machine();
  const int threads = static_cast<int>(block.x * block.y * block.z);
  if (threads % kWarp != 0 || threads == 0 || threads > 1024)
    throw std::runtime_error("emulate: block has " + std::to_string(threads) +
                             " threads, expected a multiple of 32 up to 1024 because warps are emulated whole");
  while (m.fibers.size() < static_cast<size_t>(threads)) m.fibers.emplace_back();
  m.call = [](void* k) { (*static_cast<Kernel*>(k))(); };
  m.kernel = &kernel;
  m.shared.resize((shared_bytes + sizeof(std::max_align_t) - 1) / sizeof(std::max_align_t));
  gridDim = grid;
  blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        if (!m.shared.empty()) std::memset(m.shared.data(), 0xff, m.shared.size() * sizeof(m.shared[0]));
        run_block(m, threads);
      }
}

// every lane shows `value`; returns where the 32 values stand
template <typename T>
const uint64_t* show(unsigned lanes, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "warp operations move at most 8 bytes");
  if (lanes != 0xffffffffu) throw std::runtime_error("emulate: only whole warps are emulated, mask must be 0xffffffff");
  Machine& m = machine();
  Barrier& warp = m.warp();
  uint64_t* data = warp.data[warp.generation & 1];
  std::memcpy(&data[m.lane()], &value, sizeof(T));
  m.arrive(warp, kWarp);
  return data;
}

template <typename T>
T shuffle(unsigned lanes, T value, int source) {
  const uint64_t* data = show(lanes, value);
  T result;
  std::memcpy(&result, &data[source], sizeof(T));
  return result;
}

// the same for kWords words, of 4 bytes each twice
using Words = uint64_t[kWords];
inline const Words* show_words(const Words& value) {
  Machine& m = machine();
  Barrier& warp = m.warp();
  Words* words = warp.words[warp.generation & 1];
  std::memcpy(words[m.lane()], value, sizeof(Words));
  m.arrive(warp, kWarp);
  return words;
}

inline void copy_async(void* to, const void* from, size_t bytes) {
  Fiber& self = machine().fibers[machine().current];
  self.copies.push_back({to, from, bytes, self.group});
}

inline void copy_commit() { ++machine().fibers[machine().current].group; }

// makes the copies of all but the last `left` groups
inline void copy_wait(int left) {
  Fiber& self = machine().fibers[machine().current];
  std::vector<Copy> rest;
  for (const Copy& copy : self.copies)
    if (copy.group < self.group - left)
      std::memcpy(copy.to, copy.from, copy.bytes);
    else
      rest.push_back(copy);
  self.copies.swap(rest);
}

// matrix i of 8 x 8 has the rows, of 16 bytes, whose addresses lanes 8 i to 8 i + 7 bring; every lane gets two values
// of each: of row lane / 4 from column 2 (lane % 4) on, or of the same place in the transposed matrix
inline void load_matrices(uint32_t* to, int count, bool transposed, const void* row) {
  const uint64_t* rows = show(0xffffffffu, reinterpret_cast<uint64_t>(row));
  const int lane = machine().lane();
  for (int i = 0; i < count; ++i)
    for (int e = 0; e < 2; ++e) {
      const int r = transposed ? lane % 4 * 2 + e : lane / 4, c = transposed ? lane / 4 : lane % 4 * 2 + e;
      const uint16_t value = reinterpret_cast<const uint16_t*>(rows[8 * i + r])[c];
      to[i] = e == 0 ? value : to[i] | uint32_t{value} << 16;
    }
}

inline float widen(uint16_t bits, bool bf16) {
  const uint32_t sign = uint32_t{bits} >> 15 << 31;
  uint32_t wide = uint32_t{bits} << 16;
  float value;
  if (!bf16) {
    const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
    if (exponent == 0) return std::ldexp(static_cast<float>(mantissa), -24) * (sign ? -1.0f : 1.0f);
    wide = sign | (exponent == 31 ? 0xffu : exponent + 112) << 23 | mantissa << 13;
  }
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

inline uint16_t narrow(float value, bool bf16) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return 0x7fff;
  if (bf16) return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  if (size < 0x38800000u)  // below 2^-14 in steps of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(std::ldexp(std::fabs(value), 24))));
  const uint32_t rounded = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
  return static_cast<uint16_t>(sign | (rounded > 0x7c00u ? 0x7c00u : rounded));
}

// d += a b, with a [16, 8 steps] and b [8 steps, 8] in the layout of mma.m16n8k8 or k16
inline void multiply(float (&d)[4], const uint32_t* a, const uint32_t* b, int steps, bool bf16) {
  Words mine = {};
  std::memcpy(mine, a, 8 * steps);
  std::memcpy(&mine[2], b, 4 * steps);
  const Words* all = show_words(mine);
  const int lane = machine().lane();
  // value `at` (0 or 1) of register `reg` of another lane
  auto value = [&](int from, int word, int reg, int at) {
    uint16_t halves[4];
    std::memcpy(halves, &all[from][word], sizeof(halves));
    return widen(halves[2 * reg + at], bf16);
  };
  for (int e = 0; e < 4; ++e) {
    const int column = lane % 4 * 2 + e % 2;
    float sum = 0.0f;
    for (int k = 0; k < 8 * steps; ++k) {
      const int quad = k % 8 / 2;
      // register 2 (k / 8) + e / 2 of a is word k / 8, half e / 2
      sum += value(lane / 4 * 4 + quad, k / 8, e / 2, k % 2) * value(column * 4 + quad, 2, k / 8, k % 2);
    }
    d[e] += sum;
  }
}

}  // namespace mimfast::emulate

inline void __syncthreads() {
  auto& m = mimfast::emulate::machine();
  m.arrive(m.block, m.alive);
}

inline int __syncthreads_count(int predicate) {
  auto& m = mimfast::emulate::machine();
  int& count = m.block.count[m.block.generation & 1];
  count += predicate != 0;
  m.arrive(m.block, m.alive);
  return count;
}

inline void __syncwarp(unsigned lanes = 0xffffffffu) { mimfast::emulate::show(lanes, 0); }

inline unsigned __ballot_sync(unsigned lanes, int predicate) {
  const uint64_t* data = mimfast::emulate::show(lanes, uint64_t{predicate != 0});
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= static_cast<unsigned>(data[lane]) << lane;
  return result;
}

inline int __reduce_add_sync(unsigned lanes, int value) {
  const uint64_t* data = mimfast::emulate::show(lanes, uint64_t{static_cast<uint32_t>(value)});
  uint32_t result = 0;
  for (int lane = 0; lane < 32; ++lane) result += static_cast<uint32_t>(data[lane]);
  return static_cast<int>(result);
}

template <typename T>
T __shfl_sync(unsigned lanes, T value, int source) {
  return mimfast::emulate::shuffle(lanes, value, source & 31);
}

template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, int flip) {
  return mimfast::emulate::shuffle(lanes, value, mimfast::emulate::machine().lane() ^ flip);
}

template <typename T>
T __shfl_down_sync(unsigned lanes, T value, int by) {
  const int lane = mimfast::emulate::machine().lane();
  return mimfast::emulate::shuffle(lanes, value, lane + by < 32 ? lane + by : lane);
}

template <typename T>
T __shfl_up_sync(unsigned lanes, T value, int by) {
  const int lane = mimfast::emulate::machine().lane();
  return mimfast::emulate::shuffle(lanes, value, lane >= by ? lane - by : lane);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// fibers switch only at barriers, so a plain read-modify-write is atomic here
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
