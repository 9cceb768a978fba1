// The dense arithmetic around the coded matrices, in vectors of LANES floats. The including kernel
// file sets LANES to 4, 8 or 16.
#pragma once
#include <cstdint>
#include <cstring>
#if LANES > 4
#include <immintrin.h>
#endif

#include "kernels.h"

namespace moecc {
namespace {

typedef float Vec __attribute__((vector_size(4 * LANES)));

typedef float Four __attribute__((vector_size(16)));

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, (int32_t __attribute__((vector_size(16)))){i, j, k, l})
#endif

struct Fours {
  Four a, b, c, d;
};

inline Fours transposed(Four a, Four b, Four c, Four d) {
  const Four ab = PICK(a, b, 0, 4, 1, 5), cd = PICK(c, d, 0, 4, 1, 5), ba = PICK(a, b, 2, 6, 3, 7), dc = PICK(c, d, 2, 6, 3, 7);
  return {PICK(ab, cd, 0, 1, 4, 5), PICK(ab, cd, 2, 3, 6, 7), PICK(ba, dc, 0, 1, 4, 5), PICK(ba, dc, 2, 3, 6, 7)};
}

inline void put(float* p, Four v) { memcpy(p, &v, sizeof v); }

inline Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
inline Vec all(float x) { return Vec{} + x; }
inline float sum(Vec v) {
  float s = 0;
  for (int i = 0; i < LANES; i++) s += v[i];
  return s;
}

float dot(const float* a, const float* b, int64_t n) {
  Vec s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + LANES) * load(b + i + LANES);
    s2 += load(a + i + 2 * LANES) * load(b + i + 2 * LANES);
    s3 += load(a + i + 3 * LANES) * load(b + i + 3 * LANES);
  }
  for (; i + LANES <= n; i += LANES) s0 += load(a + i) * load(b + i);
  float s = sum((s0 + s1) + (s2 + s3));
  for (; i < n; i++) s += a[i] * b[i];
  return s;
}

// Returns LANES bytes as floats. GCC 12 takes __builtin_convertvector apart into single bytes.
inline Vec widened(const int8_t* p) {
#if LANES == 16
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif LANES == 8
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return Vec{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
#endif
}

// Returns the products of a and x, added up to four.
inline Four dot_bytes(const int8_t* a, const float* x, int64_t n) {
  Vec s{};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) s += widened(a + i) * load(x + i);
  Four quarters[LANES / 4], t{};
  memcpy(quarters, &s, sizeof s);
  for (int q = 0; q < LANES / 4; q++) t += quarters[q];
  for (; i < n; i++) t[0] += static_cast<float>(a[i]) * x[i];
  return t;
}

// Four rows at a time, so that each row's sum is one of the four lanes of a vector.
void add_coefficients(float* y, const int8_t* a, const float* scale, const float* x, int64_t rows, int64_t columns) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4, a += 4 * columns) {
    const Fours t = transposed(dot_bytes(a, x, columns), dot_bytes(a + columns, x, columns),
                               dot_bytes(a + 2 * columns, x, columns), dot_bytes(a + 3 * columns, x, columns));
    Four factor, sum;
    memcpy(&factor, scale + i, sizeof factor);
    memcpy(&sum, y + i, sizeof sum);
    put(y + i, sum + factor * ((t.a + t.b) + (t.c + t.d)));
  }
  for (; i < rows; i++, a += columns) {
    const Four t = dot_bytes(a, x, columns);
    y[i] += scale[i] * ((t[0] + t[1]) + (t[2] + t[3]));
  }
}

void add(float* y, float s, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] += s * x[i];
}

void add_product(float* y, float s, const float* x, const float* z, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] += s * (x[i] * z[i]);
}

}  // namespace
}  // namespace moecc
