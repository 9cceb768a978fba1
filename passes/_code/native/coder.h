// The inner loops of coding: nearest centroids with error feedback, in vectors of LANES floats.
//
// A block of columns of some rows is coded here; what its changes do to later columns is one matrix
// product of the caller's. Rows do not depend on each other, so a row's codes are the same whatever
// rows it is coded with. Each kernel file includes this with LANES of its instruction set.
#pragma once
#include <cstdint>
#include <cstring>

#include "lookup.h"

extern "C" {
// What the search for the nearest centroid needs of one expert's block. V: columns of a group.
struct MoeccSearch {
  int64_t group;         // V: 2 or 4
  int64_t patterns;      // rows of `base`: 1, or 2^V if signs are stored apart
  int64_t image_stride;  // floats from one group's `image` to the next; 0: all have the same
  const float* inner;    // [G, V, V]: makes of a value what `image` is multiplied by
  const float* metric;   // [G, V, V]: an error d of a group costs |d metric|^2
  const float* image;    // [G or 1, V, 256]
  const float* base;     // [G, patterns, 256]: of each centroid, its cost at zero
  const float* table;    // [256, V]: centroids
};

// Some rows of one expert's block. Strides are in elements of their own arrays.
struct MoeccBlock {
  int64_t rows, columns;
  float* pull;           // [rows, columns]: choose: the weights that are left; sweep: (W - Q) H
  int64_t pull_stride;
  float* dense;          // [rows, columns]: sweep: the values so far, and then the new ones
  int64_t dense_stride;
  const float* carry;    // [columns, columns]: choose: of U; sweep: of H
  int64_t carry_stride;
  const float* inverse;  // [G, V, V]: sweep: of H's blocks
  float* moved;          // [rows, columns], without gaps: what later columns have to follow
  int64_t* codes;        // [rows, G]
  int64_t codes_stride;
  uint8_t* negative;     // [rows, columns]: null unless signs are stored apart
  int64_t negative_stride;
};

typedef void (*MoeccStep)(const MoeccSearch*, const MoeccBlock*);
struct MoeccCoder {
  const char* name;
  MoeccStep choose, sweep;
  MoeccLookup decode, pull;
};
}

namespace moecc {
#ifdef LANES
namespace {

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

constexpr int64_t CENTROIDS = 256;
constexpr int TOGETHER = 4;  // rows that read a table at once

inline Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

// x A of one group
template <int V>
inline void times(const float* x, const float* a, float* y) {
  for (int i = 0; i < V; i++) y[i] = x[0] * a[i];
  for (int j = 1; j < V; j++)
    for (int i = 0; i < V; i++) y[i] += x[j] * a[j * V + i];
}

// The first centroid of least cost for each of R rows.
template <int V, int R>
inline void nearest(const float* image, const float* const* base, const float (*x)[V], int32_t* code) {
  Vec least[R];
  Ints at[R] = {}, here;
  for (int i = 0; i < LANES; i++) here[i] = i;
  for (int r = 0; r < R; r++) least[r] = Vec{} + __builtin_inff();
  for (int64_t c = 0; c < CENTROIDS; c += LANES) {
    Vec columns[V];
    for (int v = 0; v < V; v++) columns[v] = load(image + v * CENTROIDS + c);
    for (int r = 0; r < R; r++) {
      Vec cost = load(base[r] + c);
      for (int v = 0; v < V; v++) cost += columns[v] * x[r][v];
      const Ints better = cost < least[r];
      least[r] = better ? cost : least[r];
      at[r] = better ? here : at[r];
    }
    here += LANES;
  }
  for (int r = 0; r < R; r++) {
    float best = least[r][0];
    int32_t found = at[r][0];
    for (int i = 1; i < LANES; i++)
      if (least[r][i] < best || (least[r][i] == best && at[r][i] < found)) best = least[r][i], found = at[r][i];
    code[r] = found;
  }
}

// One group's search for R rows.
template <int V, int R>
struct Group {
  Group(const MoeccSearch& search, int64_t group) : s(search), g(group) {}

  const MoeccSearch& s;
  const int64_t g;
  int32_t code[R];
  bool negative[R][V];
  float q[R][V];  // the chosen values

  template <bool SIGNED>
  void find(const float (*t)[V]) {
    const float* inner = s.inner + g * V * V;
    const float* base = s.base + g * s.patterns * CENTROIDS;
    const float* own[R];
    float x[R][V];
    for (int r = 0; r < R; r++) {
      float shifted[V];
      int64_t pattern = 0;
      for (int v = 0; v < V; v++) {
        shifted[v] = SIGNED ? t[r][v] + 0.5f : t[r][v];
        negative[r][v] = SIGNED && shifted[v] < 0;
        pattern |= int64_t(negative[r][v]) << v;
      }
      times<V>(shifted, inner, x[r]);
      for (int v = 0; v < V; v++) x[r][v] *= negative[r][v] ? 2.0f : -2.0f;
      own[r] = base + pattern * CENTROIDS;
    }
    nearest<V, R>(s.image + g * s.image_stride, own, x, code);
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) {
        const float p = s.table[code[r] * V + v];
        q[r][v] = (negative[r][v] ? -p : p) - (SIGNED ? 0.5f : 0.0f);
      }
  }

  // The cost of an error of one row.
  float cost(const float* t, const float* value) const {
    float d[V], y[V], sum = 0;
    for (int v = 0; v < V; v++) d[v] = t[v] - value[v];
    times<V>(d, s.metric + g * V * V, y);
    for (int v = 0; v < V; v++) sum += y[v] * y[v];
    return sum;
  }
};

// later -= d carry, for the columns of the block behind a group
template <int V>
inline void follow(float* later, const float* d, const float* carry, int64_t stride, int64_t count) {
  int64_t k = 0;
  for (; k + LANES <= count; k += LANES) {
    Vec sum = load(later + k);
    for (int v = 0; v < V; v++) sum -= load(carry + v * stride + k) * d[v];
    store(later + k, sum);
  }
  for (; k < count; k++)
    for (int v = 0; v < V; v++) later[k] -= d[v] * carry[v * stride + k];
}

template <int V, bool SIGNED, int R>
void choose_rows(const MoeccSearch& s, const MoeccBlock& b, int64_t row) {
  for (int64_t j = 0; j < b.columns; j += V) {
    Group<V, R> group(s, j / V);
    float t[R][V];
    for (int r = 0; r < R; r++) memcpy(t[r], b.pull + (row + r) * b.pull_stride + j, sizeof t[r]);
    group.template find<SIGNED>(t);
    for (int r = 0; r < R; r++) {
      const int64_t at = row + r;
      float d[V], carried[V];
      for (int v = 0; v < V; v++) d[v] = t[r][v] - group.q[r][v];
      times<V>(d, s.metric + group.g * V * V, carried);
      memcpy(b.moved + at * b.columns + j, carried, sizeof carried);
      b.codes[at * b.codes_stride + group.g] = group.code[r];
      if (SIGNED)
        for (int v = 0; v < V; v++) b.negative[at * b.negative_stride + j + v] = group.negative[r][v];
      follow<V>(b.pull + at * b.pull_stride + j + V, carried, b.carry + j * b.carry_stride + j + V, b.carry_stride,
                b.columns - j - V);
    }
  }
}

template <int V, bool SIGNED, int R>
void sweep_rows(const MoeccSearch& s, const MoeccBlock& b, int64_t row) {
  for (int64_t j = 0; j < b.columns; j += V) {
    Group<V, R> group(s, j / V);
    float t[R][V];
    for (int r = 0; r < R; r++) {
      const float* old = b.dense + (row + r) * b.dense_stride + j;
      times<V>(b.pull + (row + r) * b.pull_stride + j, b.inverse + group.g * V * V, t[r]);
      for (int v = 0; v < V; v++) t[r][v] += old[v];
    }
    group.template find<SIGNED>(t);
    for (int r = 0; r < R; r++) {
      const int64_t at = row + r;
      float* old = b.dense + at * b.dense_stride + j;
      float* d = b.moved + at * b.columns + j;
      // the search looks at the signs of t alone, so the code so far, of other signs, may be better
      if (SIGNED && !(group.cost(t[r], group.q[r]) < group.cost(t[r], old))) {
        for (int v = 0; v < V; v++) d[v] = 0;
        continue;
      }
      b.codes[at * b.codes_stride + group.g] = group.code[r];
      bool same = true;
      for (int v = 0; v < V; v++) {
        if (SIGNED) b.negative[at * b.negative_stride + j + v] = group.negative[r][v];
        d[v] = group.q[r][v] - old[v];
        old[v] = group.q[r][v];
        same = same && d[v] == 0;
      }
      if (!same)
        follow<V>(b.pull + at * b.pull_stride + j + V, d, b.carry + j * b.carry_stride + j + V, b.carry_stride,
                  b.columns - j - V);
    }
  }
}

template <int V, bool SIGNED>
void choose_all(const MoeccSearch& s, const MoeccBlock& b) {
  int64_t row = 0;
  for (; row + TOGETHER <= b.rows; row += TOGETHER) choose_rows<V, SIGNED, TOGETHER>(s, b, row);
  for (; row < b.rows; row++) choose_rows<V, SIGNED, 1>(s, b, row);
}

template <int V, bool SIGNED>
void sweep_all(const MoeccSearch& s, const MoeccBlock& b) {
  int64_t row = 0;
  for (; row + TOGETHER <= b.rows; row += TOGETHER) sweep_rows<V, SIGNED, TOGETHER>(s, b, row);
  for (; row < b.rows; row++) sweep_rows<V, SIGNED, 1>(s, b, row);
}

void choose(const MoeccSearch* s, const MoeccBlock* b) {
  if (s->group == 2) return choose_all<2, false>(*s, *b);
  s->patterns == 1 ? choose_all<4, false>(*s, *b) : choose_all<4, true>(*s, *b);
}

void sweep(const MoeccSearch* s, const MoeccBlock* b) {
  if (s->group == 2) return sweep_all<2, false>(*s, *b);
  s->patterns == 1 ? sweep_all<4, false>(*s, *b) : sweep_all<4, true>(*s, *b);
}

}  // namespace
#endif

extern const MoeccCoder SCALAR_CODER, AVX2_CODER, AVX512_CODER, NEON_CODER;
}  // namespace moecc
