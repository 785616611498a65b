// Products of 16-bit matrices by mma.sync, and the copies that feed them; when emulated, what emulate.h makes of them.
// Every warp function is called by all 32 lanes. Two 16-bit values share a register, the first in the lower half.
#pragma once

#include "device.cuh"

namespace mimfast {

// 16 bytes, which move at once
struct alignas(16) Chunk {
  uint32_t word[4];
};

#ifdef __CUDACC__
using SharedAt = uint32_t;  // an address in shared memory
#else
using SharedAt = uintptr_t;
#endif

__device__ __forceinline__ SharedAt shared_at(const void* address) {
#ifdef __CUDACC__
  return static_cast<uint32_t>(__cvta_generic_to_shared(address));
#else
  return reinterpret_cast<uintptr_t>(address);
#endif
}

// starts to copy 16 bytes (or 4) into shared memory
__device__ __forceinline__ void copy_async(Chunk* to, const void* from) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_at(to)), "l"(from) : "memory");
#else
  emulate::copy_async(to, from, 16);
#endif
}

__device__ __forceinline__ void copy_async(int32_t* to, const int32_t* from) {
#ifdef __CUDACC__
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_at(to)), "l"(from) : "memory");
#else
  emulate::copy_async(to, from, 4);
#endif
}

// what this thread started since the last commit is one group
__device__ __forceinline__ void copy_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulate::copy_commit();
#endif
}

// waits for all of this thread's groups but the last kLeft; other threads see what came after a barrier
template <int kLeft>
__device__ __forceinline__ void copy_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#else
  emulate::copy_wait(kLeft);
#endif
}

// kCount (1, 2, 4) matrices of 8 x 8: lane 8 i + r brings the address of row r of matrix i and gets of each the values
// of row lane / 4, columns 2 (lane % 4) and the next; kTransposed: of the transposed matrix
template <int kCount, bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t* to, SharedAt row) {
#ifdef __CUDACC__
  if constexpr (kCount == 4 && !kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row));
  else if constexpr (kCount == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row));
  else if constexpr (!kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(row));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(row));
#else
  emulate::load_matrices(to, kCount, kTransposed, reinterpret_cast<const void*>(row));
#endif
}

// d += a b, a [16, 16] and b [16, 8]. A lane has of d rows g and g + 8, g = lane / 4, columns 2 (lane % 4) and the
// next; of a four of load_matrices by quarters, down before across; of b two of its transpose
template <bool kBf16>
__device__ __forceinline__ void multiply_16(float (&d)[4], const uint32_t* a, const uint32_t* b) {
#ifdef __CUDACC__
  if constexpr (kBf16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulate::multiply(d, a, b, 2, kBf16);
#endif
}

// the same for a [16, 8] and b [8, 8]
template <bool kBf16>
__device__ __forceinline__ void multiply_8(float (&d)[4], const uint32_t* a, const uint32_t* b) {
#ifdef __CUDACC__
  if constexpr (kBf16)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
#else
  emulate::multiply(d, a, b, 1, kBf16);
#endif
}

// two values, rounded to nearest
template <bool kBf16>
__device__ __forceinline__ uint32_t pack(float first, float second) {
#ifdef __CUDACC__
  uint32_t both;
  if constexpr (kBf16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
#else
  return emulate::narrow(first, kBf16) | uint32_t{emulate::narrow(second, kBf16)} << 16;
#endif
}

// the values of a register
template <bool kBf16>
__device__ __forceinline__ void unpack(uint32_t both, float& first, float& second) {
#ifdef __CUDACC__
  if constexpr (kBf16) {
    first = __uint_as_float(both << 16);
    second = __uint_as_float(both & 0xffff0000u);
  } else {
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(first), "=f"(second)
        : "r"(both));
  }
#else
  first = emulate::widen(static_cast<uint16_t>(both), kBf16);
  second = emulate::widen(static_cast<uint16_t>(both >> 16), kBf16);
#endif
}

// 2^x; 0 for -inf
__device__ __forceinline__ float power_of_2(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

}  // namespace mimfast
