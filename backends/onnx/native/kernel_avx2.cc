// AVX2, FMA and F16C: the float kernels in vectors of eight.
#define LANES 8
#define ROWS 2
#include <immintrin.h>

#include "attend.h"
#include "floats.h"
#include "gates.h"
#include "half.h"

namespace moecc {
namespace {

void from_half(const uint16_t* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  from_half_portable(x + i, y + i, n - i);
}

void to_half(const float* x, uint16_t* y, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
  to_half_portable(x + i, y + i, n - i);
}

}  // namespace

extern const Kernels AVX2_KERNELS = {
    "avx2", 3, 1, 0, lookup, nullptr, nullptr, multiply, apply_gate, add_coefficients, dot, add, add_product, scores, mix,
    softmax, from_half, to_half,
};
}  // namespace moecc
