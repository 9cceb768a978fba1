// The common basis of both products of the AVX-512 kernels.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 about its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#include <math.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace moecc {
namespace {

inline __m512i load512(const void* p) { return _mm512_loadu_si512(p); }

// Sums that stay in registers over a loop. If they are assignments of intrinsics, GCC 12 copies
// each once per turn and stores half of 24 to the stack, which is 2.2 times slower.
inline void add_to8(__m512i& sum, __m512i x) { asm("vpaddb %1, %0, %0" : "+v"(sum) : "v"(x)); }
inline void dot_to(__m512i& sum, __m512i w, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
}

// Prefetches to L2, because L1 is full of tables or of decoded weights. An address beyond the codes
// does no harm. Always inline: GCC takes a function that only prefetches for one without effect and
// drops its calls.
inline __attribute__((always_inline)) void fetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
}

// Returns component i of the centroids of 16 codes from c on, as whole numbers.
template <int V>
inline __m512i component(const int8_t* codebook, int c, int i) {
  if (V == 4) return _mm512_srai_epi32(_mm512_slli_epi32(load512(codebook + 4 * c), 24 - 8 * i), 24);
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codebook + 2 * c));
  return _mm512_srai_epi32(_mm512_slli_epi32(_mm512_cvtepi16_epi32(pairs), 24 - 8 * i), 24);
}

// Returns table[code] of 64 codes; high: the codes whose top bit is set.
inline __m512i look_up(__m512i t0, __m512i t1, __m512i t2, __m512i t3, __m512i codes, __mmask64 high) {
  return _mm512_mask_blend_epi8(high, _mm512_permutex2var_epi8(t0, codes, t1), _mm512_permutex2var_epi8(t2, codes, t3));
}

// Puts the sums of 64 rows in their natural order, in place. Vector q = 0..3 holds rows
// 16 L + 4 q + 0..3 in its 128-bit lane L.
inline void natural(float* y) {
  const __m512 q0 = _mm512_loadu_ps(y), q1 = _mm512_loadu_ps(y + 16), q2 = _mm512_loadu_ps(y + 32),
               q3 = _mm512_loadu_ps(y + 48);
  const __m512 a = _mm512_shuffle_f32x4(q0, q1, 0x44), b = _mm512_shuffle_f32x4(q2, q3, 0x44);
  const __m512 c = _mm512_shuffle_f32x4(q0, q1, 0xee), d = _mm512_shuffle_f32x4(q2, q3, 0xee);
  _mm512_storeu_ps(y, _mm512_shuffle_f32x4(a, b, 0x88));
  _mm512_storeu_ps(y + 16, _mm512_shuffle_f32x4(a, b, 0xdd));
  _mm512_storeu_ps(y + 32, _mm512_shuffle_f32x4(c, d, 0x88));
  _mm512_storeu_ps(y + 48, _mm512_shuffle_f32x4(c, d, 0xdd));
}

}  // namespace
}  // namespace moecc
