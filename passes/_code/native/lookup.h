// Between codes and the values that they stand for: a matrix of an expert decoded, and the gradient
// of such a matrix pulled back to the codebook and to the scales of its rows.
//
// Rows do not depend on each other but for the sums over a codebook, which are added row by row.
#pragma once
#include <cstdint>
#include <cstring>

extern "C" {
// Some rows of one expert's matrix. Strides are in elements of their own arrays.
struct MoeccRows {
  int64_t rows, columns;
  int64_t group;         // columns of a code: 2 or 4
  const uint8_t* codes;  // [rows, at least columns / group]
  int64_t codes_stride;
  const uint8_t* signs;  // [rows, at least columns / 8]: null unless signs are stored apart
  int64_t signs_stride;
  const float* book;     // [256, group]
  const float* scale;    // [rows]
  float* dense;          // [rows, columns], without gaps: the matrix, or its gradient
  float* book_grad;      // [256, group]
  float* scale_grad;     // [rows]
};

typedef void (*MoeccLookup)(const MoeccRows*);
}

namespace moecc {
#ifdef LANES
namespace {

// A vector of a group's columns.
template <int V>
struct Columns;
template <>
struct Columns<2> {
  typedef float Vec __attribute__((vector_size(8)));
};
template <>
struct Columns<4> {
  typedef float Vec __attribute__((vector_size(16)));
};
template <int V>
using Few = typename Columns<V>::Vec;

template <int V>
inline Few<V> take(const float* p) {
  Few<V> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <int V>
inline void put(float* p, Few<V> v) {
  memcpy(p, &v, sizeof v);
}

// 1 or -1 for each column of a group, by its sign bits.
template <int V>
struct Signs {
  Few<V> of[16];
  Signs() {
    for (unsigned bits = 0; bits < 16; bits++)
      for (int i = 0; i < V; i++) of[bits][i] = bits >> i & 1 ? -1.0f : 1.0f;
  }
};

// The groups of one row: what they stand for, and the signs that are stored apart.
template <int V, bool SIGNED>
struct Row {
  Row(const MoeccRows& all, int64_t r, const Signs<V>& signs)
      : table(signs), book(all.book), codes(all.codes + r * all.codes_stride),
        bits(SIGNED ? all.signs + r * all.signs_stride : nullptr) {}

  const Signs<V>& table;
  const float* book;
  const uint8_t* codes;
  const uint8_t* bits;

  Few<V> sign(int64_t g) const { return table.of[bits[g / 2] >> (g % 2 ? 4 : 0) & 15]; }
  Few<V> value(int64_t g) const {
    const Few<V> p = take<V>(book + V * codes[g]);
    return SIGNED ? (p + 0.5f) * sign(g) - 0.5f : p;
  }
};

template <int V, bool SIGNED>
void decode_rows(const MoeccRows& m) {
  const Signs<V> signs;
  const int64_t whole = m.columns / V, left = m.columns % V;
  for (int64_t r = 0; r < m.rows; r++) {
    const Row<V, SIGNED> row(m, r, signs);
    const float scale = m.scale[r];
    float* out = m.dense + r * m.columns;
    for (int64_t g = 0; g < whole; g++) put<V>(out + g * V, row.value(g) * scale);
    for (int64_t i = 0; i < left; i++) out[whole * V + i] = row.value(whole)[i] * scale;
  }
}

template <int V, bool SIGNED>
void pull_rows(const MoeccRows& m) {
  constexpr int APART = 4;  // sums, so that equal codes side by side do not wait for each other
  constexpr int64_t SIZE = 256 * V;
  float sums[APART][SIZE] = {};
  const Signs<V> signs;
  const int64_t whole = m.columns / V, left = m.columns % V;
  for (int64_t r = 0; r < m.rows; r++) {
    const Row<V, SIGNED> row(m, r, signs);
    const float scale = m.scale[r];
    const float* grad = m.dense + r * m.columns;
    Few<V> dots[APART] = {};
    const auto add = [&](int64_t g, int apart, Few<V> x) {
      dots[apart] += x * row.value(g);
      float* sum = sums[apart] + V * row.codes[g];
      put<V>(sum, take<V>(sum) + (SIGNED ? x * row.sign(g) : x) * scale);
    };
    int64_t g = 0;
    for (; g + APART <= whole; g += APART)
      for (int i = 0; i < APART; i++) add(g + i, i, take<V>(grad + (g + i) * V));
    for (; g < whole; g++) add(g, 0, take<V>(grad + g * V));
    if (left) {
      Few<V> x = {};
      for (int64_t i = 0; i < left; i++) x[i] = grad[whole * V + i];
      add(whole, 0, x);
    }
    const Few<V> dot = (dots[0] + dots[1]) + (dots[2] + dots[3]);
    float sum = 0;
    for (int v = 0; v < V; v++) sum += dot[v];
    m.scale_grad[r] = sum;
  }
  for (int64_t i = 0; i < SIZE; i++) m.book_grad[i] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
}

void decode(const MoeccRows* m) {
  if (m->group == 2) return decode_rows<2, false>(*m);
  m->signs ? decode_rows<4, true>(*m) : decode_rows<4, false>(*m);
}

void pull(const MoeccRows* m) {
  if (m->group == 2) return pull_rows<2, false>(*m);
  m->signs ? pull_rows<4, true>(*m) : pull_rows<4, false>(*m);
}

}  // namespace
#endif
}  // namespace moecc
