// The coder for this CPU.
#include "coder.h"

extern "C" __attribute__((visibility("default"))) const MoeccCoder* moecc_coder() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return &moecc::AVX512_CODER;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &moecc::AVX2_CODER;
#elif defined(__aarch64__)
  return &moecc::NEON_CODER;
#endif
  return &moecc::SCALAR_CODER;
}
