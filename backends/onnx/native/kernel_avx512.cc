// AVX-512 with VBMI and VNNI: byte permutes look codes up 64 rows at a time, in fixed point instead
// of float.
//
// Relative error of a layer; loud: one channel of x is 100 times as large as the others.
//
//                          alike    loud
//   float32                5e-7
//   avx512_lookup.h        2e-5     4e-5
//   avx512_multiply.h      5e-7     1.3e-6
#define LANES 16
#include "avx512_lookup.h"
#include "avx512_multiply.h"
#include "attend.h"
#include "dense.h"
#include "gates.h"
#include "half.h"

namespace moecc {
namespace {

void from_half(const uint16_t* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(y + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))));
  from_half_portable(x + i, y + i, n - i);
}

void to_half(const float* x, uint16_t* y, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i),
                        _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
  to_half_portable(x + i, y + i, n - i);
}

}  // namespace

extern const Kernels AVX512_KERNELS = {
    "avx512", 8, 0, 8, lookup, prepared_bytes, prepare, multiply, apply_gate, add_coefficients, dot, add, add_product, scores,
    mix, softmax, from_half, to_half,
};
}  // namespace moecc
