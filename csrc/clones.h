// Functions compiled for several instruction sets, of which the best is chosen when the module is loaded, where
// compiler and C library can do that. What such a function calls must be MIMFAST_INLINE: a function left outside would
// be the default one.
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define MIMFAST_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#define MIMFAST_INLINE inline __attribute__((always_inline))
#else
#define MIMFAST_CLONES
#define MIMFAST_INLINE inline
#endif
