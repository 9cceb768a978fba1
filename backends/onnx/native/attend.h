// The arithmetic of attention in float32: a few queries with many keys, in vectors of LANES floats.
// For kernel files (see kernels.h).
#pragma once
#include "dense.h"
#include "gates.h"

namespace moecc {
namespace {

constexpr int KEYS = 4;                            // of a tile
constexpr int QUERIES = LANES == 16 ? 4 : 2;       // of a tile: its sums stay in registers
constexpr int WIDE = LANES == 16 ? 4 : 2;          // vectors of a value's channels

inline Four folded(Vec v) {
  Four quarters[LANES / 4], t{};
  memcpy(quarters, &v, sizeof v);
  for (int i = 0; i < LANES / 4; i++) t += quarters[i];
  return t;
}

// Q queries with KEYS keys
template <int Q>
inline void score_tile(const float* q, const float* k, int64_t width, float* s, int64_t stride) {
  Vec sums[Q][KEYS] = {};
  int64_t j = 0;
  for (; j + LANES <= width; j += LANES) {
    Vec key[KEYS];
    for (int t = 0; t < KEYS; t++) key[t] = load(k + t * width + j);
    for (int i = 0; i < Q; i++) {
      const Vec query = load(q + i * width + j);
      for (int t = 0; t < KEYS; t++) sums[i][t] += query * key[t];
    }
  }
  for (int i = 0; i < Q; i++) {
    const Fours f = transposed(folded(sums[i][0]), folded(sums[i][1]), folded(sums[i][2]), folded(sums[i][3]));
    Four total = (f.a + f.b) + (f.c + f.d);
    for (int64_t rest = j; rest < width; rest++)
      for (int t = 0; t < KEYS; t++) total[t] += q[i * width + rest] * k[t * width + rest];
    put(s + i * stride, total);
  }
}

void scores(const float* q, int64_t queries, const float* k, int64_t keys, int64_t width, float* s, int64_t stride) {
  int64_t t = 0;
  for (; t + KEYS <= keys; t += KEYS) {
    int64_t i = 0;
    for (; i + QUERIES <= queries; i += QUERIES)
      score_tile<QUERIES>(q + i * width, k + t * width, width, s + i * stride + t, stride);
    for (; i < queries; i++) score_tile<1>(q + i * width, k + t * width, width, s + i * stride + t, stride);
  }
  for (; t < keys; t++)
    for (int64_t i = 0; i < queries; i++) s[i * stride + t] = dot(q + i * width, k + t * width, width);
}

// Q queries, W vectors of channels
template <int Q, int W>
inline void mix_tile(const float* s, int64_t stride, const float* v, int64_t keys, int64_t width, float* y) {
  Vec sums[Q][W];
  for (int i = 0; i < Q; i++)
    for (int w = 0; w < W; w++) sums[i][w] = load(y + i * width + w * LANES);
  for (int64_t t = 0; t < keys; t++) {
    Vec value[W];
    for (int w = 0; w < W; w++) value[w] = load(v + t * width + w * LANES);
    for (int i = 0; i < Q; i++)
      for (int w = 0; w < W; w++) sums[i][w] += all(s[i * stride + t]) * value[w];
  }
  for (int i = 0; i < Q; i++)
    for (int w = 0; w < W; w++) store(y + i * width + w * LANES, sums[i][w]);
}

template <int Q>
void mix_queries(const float* s, int64_t stride, const float* v, int64_t keys, int64_t width, float* y) {
  int64_t c = 0;
  for (; c + WIDE * LANES <= width; c += WIDE * LANES) mix_tile<Q, WIDE>(s, stride, v + c, keys, width, y + c);
  for (; c + LANES <= width; c += LANES) mix_tile<Q, 1>(s, stride, v + c, keys, width, y + c);
  for (; c < width; c++)
    for (int i = 0; i < Q; i++)
      for (int64_t t = 0; t < keys; t++) y[i * width + c] += s[i * stride + t] * v[t * width + c];
}

void mix(const float* s, int64_t stride, int64_t queries, const float* v, int64_t keys, int64_t width, float* y) {
  int64_t i = 0;
  for (; i + QUERIES <= queries; i += QUERIES) mix_queries<QUERIES>(s + i * stride, stride, v, keys, width, y + i * width);
  for (; i < queries; i++) mix_queries<1>(s + i * stride, stride, v, keys, width, y + i * width);
}

void softmax(float* s, const uint8_t* mask, int64_t n) {
  constexpr float LEAST = -3.0e38f;
  for (int64_t t = 0; t < n; t++) s[t] = mask[t] ? s[t] : LEAST;
  Vec most_of = all(LEAST), total_of{};
  int64_t t = 0;
  for (; t + LANES <= n; t += LANES) {
    const Vec v = load(s + t);
    most_of = v > most_of ? v : most_of;
  }
  float most = LEAST, total = 0;
  for (int i = 0; i < LANES; i++) most = most_of[i] > most ? most_of[i] : most;
  for (; t < n; t++) most = s[t] > most ? s[t] : most;
  for (t = 0; t < n; t++) {
    const float e = exponential(s[t] - most);
    s[t] = mask[t] ? e : 0.0f;
  }
  for (t = 0; t + LANES <= n; t += LANES) total_of += load(s + t);
  for (total = sum(total_of); t < n; t++) total += s[t];
  const float factor = total > 0 ? 1.0f / total : 0.0f;  // nothing to attend to: zeros
  for (t = 0; t < n; t++) s[t] *= factor;
}

}  // namespace
}  // namespace moecc
