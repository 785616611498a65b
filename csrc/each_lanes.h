// Includes the file named by MIMFAST_LANES_FILE once for each set of instructions, in the namespaces base, avx2 and
// avx512, with that set switched on and MIMFAST_LANES telling how many fp32 it computes at once. Without an include
// guard. Templates are compiled where they are used and not where they stand: theirs need MIMFAST_TARGET themselves.

namespace base {
#define MIMFAST_LANES 4
#define MIMFAST_TARGET
#include MIMFAST_LANES_FILE
#undef MIMFAST_LANES
#undef MIMFAST_TARGET
}  // namespace base

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MIMFAST_X86 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define MIMFAST_LANES 8
#define MIMFAST_TARGET __attribute__((target("avx2,fma")))
#include MIMFAST_LANES_FILE
#undef MIMFAST_LANES
#undef MIMFAST_TARGET
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
namespace avx512 {
#define MIMFAST_LANES 16
#define MIMFAST_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#include MIMFAST_LANES_FILE
#undef MIMFAST_LANES
#undef MIMFAST_TARGET
}  // namespace avx512
#pragma GCC pop_options
#endif
#undef MIMFAST_LANES_FILE

// 16 where this machine has the instructions of avx512, 8 where it has those of avx2, else 4
inline int lanes_here() {
#ifdef MIMFAST_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return 16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
  return 4;
}
