// The coded product in float32, for instruction sets without byte lookups, in vectors of LANES
// floats, ROWS of them at a time.
//
//   lookup     a group of v columns has a table t[c] = sum_i codebook[c, i] x[i] of all 256 codes;
//              a weight row then adds one entry per code
//   multiply   a block is decoded to 64 x 64 floats and multiplied with all inputs
#pragma once
#include "dense.h"

namespace moecc {
namespace {

struct Planes {  // the codebook, one plane per component
  alignas(64) float of[4][256];

  explicit Planes(const Coded& m) {
    for (int64_t c = 0; c < 256; c++)
      for (int64_t i = 0; i < m.v; i++) of[i][c] = static_cast<float>(m.codebook[c * m.v + i]);
  }
};

void fill_table(const Planes& planes, int64_t v, const float* x, float* table) {
  for (int64_t c = 0; c < 256; c += LANES) {
    Vec t = load(planes.of[0] + c) * x[0] + load(planes.of[1] + c) * x[1];
    if (v == 4) t += load(planes.of[2] + c) * x[2] + load(planes.of[3] + c) * x[3];
    store(table + c, t);
  }
}

void lookup(const Coded& m, const float* const* x, float* const* y, int64_t inputs, int64_t first, int64_t last) {
  const Planes planes(m);
  const int64_t groups = BLOCK / m.v;
  alignas(64) float tables[BLOCK / 2][256];
  for (int64_t i = 0; i < inputs; i++) memset(y[i], 0, sizeof(float) * m.row_blocks * BLOCK);
  for (int64_t column = first; column < last; column++)
    for (int64_t i = 0; i < inputs; i++) {
      for (int64_t g = 0; g < groups; g++) fill_table(planes, m.v, x[i] + column * BLOCK + g * m.v, tables[g]);
      for (int64_t row = 0; row < m.row_blocks; row++) {
        const uint8_t* codes = m.block(column, row);
        for (int64_t g = 0; g < groups; g++) __builtin_prefetch(codes + 4096 + g * BLOCK);
        for (int64_t r = 0; r < BLOCK; r += 8) {
          float s[8] = {};
          for (int64_t g = 0; g < groups; g++) {
            const float* t = tables[g];
            uint64_t eight;  // codes of eight rows
            memcpy(&eight, codes + g * BLOCK + r, sizeof eight);
            for (int j = 0; j < 8; j++) s[j] += t[eight >> (8 * j) & 255u];
          }
          float* out = y[i] + row * BLOCK + r;
          for (int j = 0; j < 8; j++) out[j] += s[j];
        }
      }
    }
}

typedef double Two __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(4 * LANES)));

template <int V>
struct Centroids {  // the codebook, one centroid after the other
  alignas(64) float of[256][V];

  explicit Centroids(const int8_t* codebook) {
    for (int c = 0; c < 256; c++)
      for (int i = 0; i < V; i++) of[c][i] = static_cast<float>(codebook[c * V + i]);
  }
  Four two(uint32_t a, uint32_t b) const {  // the pairs of two codes
    double first, second;
    memcpy(&first, of[a], 8);
    memcpy(&second, of[b], 8);
    return reinterpret_cast<Four>(Two{first, second});
  }
  Four one(uint32_t c) const {
    Four f;
    memcpy(&f, of[c], 16);
    return f;
  }
};

// Writes the weights of four rows' codes into V columns of w [columns, 64], from their row on.
inline void decode_four(const Centroids<4>& book, uint32_t codes, float* w) {
  const Four a = book.one(codes & 255), b = book.one(codes >> 8 & 255);
  const Four c = book.one(codes >> 16 & 255), d = book.one(codes >> 24);
  const Fours t = transposed(a, b, c, d);
  put(w, t.a);
  put(w + BLOCK, t.b);
  put(w + 2 * BLOCK, t.c);
  put(w + 3 * BLOCK, t.d);
}

inline void decode_four(const Centroids<2>& book, uint32_t codes, float* w) {
  const Four ab = book.two(codes & 255, codes >> 8 & 255), cd = book.two(codes >> 16 & 255, codes >> 24);
  put(w, PICK(ab, cd, 0, 2, 4, 6));
  put(w + BLOCK, PICK(ab, cd, 1, 3, 5, 7));
}

void apply_signs(const uint8_t* signs, float* w) {
  for (int64_t g = 0; g < BLOCK / 4; g++, signs += BLOCK / 2)
    for (int64_t r = 0; r < BLOCK; r += LANES) {
      Mask bits;  // of four columns, in a row's number
      for (int i = 0; i < LANES; i++) bits[i] = signs[r % (BLOCK / 2) + i] >> (r < BLOCK / 2 ? 0 : 4);
      for (int64_t c = 0; c < 4; c++) {
        float* column = w + (g * 4 + c) * BLOCK + r;
        const Vec v = load(column);
        store(column, (bits & (1 << c)) != 0 ? -1.0f - v : v);
      }
    }
}

// Decodes one block to w [64 columns, 64 rows], and prefetches a block not far behind it.
template <int V>
void decode_block(const Coded& m, const Centroids<V>& book, int64_t column, int64_t row, float* w) {
  const uint8_t* codes = m.block(column, row);
  for (int64_t g = 0; g < BLOCK / V; g++, codes += BLOCK) {
    __builtin_prefetch(codes + 4096);
    for (int64_t r = 0; r < BLOCK; r += 4) {
      uint32_t four;
      memcpy(&four, codes + r, sizeof four);
      decode_four(book, four, w + g * V * BLOCK + r);
    }
  }
  if (m.signs) apply_signs(m.sign_block(column, row), w);
}

template <int INPUTS>
void multiply_block(const float* w, const float* const* x, float* const* y) {
  for (int64_t r = 0; r < BLOCK; r += ROWS * LANES) {
    Vec s[INPUTS][ROWS] = {};
    for (int64_t k = 0; k < BLOCK; k++) {
      Vec v[ROWS];
      for (int j = 0; j < ROWS; j++) v[j] = load(w + k * BLOCK + r + j * LANES);
      for (int i = 0; i < INPUTS; i++)
        for (int j = 0; j < ROWS; j++) s[i][j] += v[j] * x[i][k];
    }
    for (int i = 0; i < INPUTS; i++)
      for (int j = 0; j < ROWS; j++) {
        float* out = y[i] + r + j * LANES;
        store(out, load(out) + s[i][j]);
      }
  }
}

template <int V>
void multiply_groups(const Coded& m, const float* const* x, float* const* y, int64_t inputs, int64_t first, int64_t last) {
  const Centroids<V> book(m.codebook);
  alignas(64) float w[BLOCK * BLOCK];
  constexpr int64_t AT_ONCE = 4;
  for (int64_t i = 0; i < inputs; i++) memset(y[i] + first * BLOCK, 0, sizeof(float) * (last - first) * BLOCK);
  for (int64_t column = 0; column < m.column_blocks; column++)
    for (int64_t row = first; row < last; row++) {
      decode_block<V>(m, book, column, row, w);
      for (int64_t i = 0; i < inputs; i += AT_ONCE) {
        const int64_t n = inputs - i < AT_ONCE ? inputs - i : AT_ONCE;
        const float* in[AT_ONCE];
        float* out[AT_ONCE];
        for (int64_t j = 0; j < n; j++) {
          in[j] = x[i + j] + column * BLOCK;
          out[j] = y[i + j] + row * BLOCK;
        }
        switch (n) {
          case 1: multiply_block<1>(w, in, out); break;
          case 2: multiply_block<2>(w, in, out); break;
          case 3: multiply_block<3>(w, in, out); break;
          default: multiply_block<4>(w, in, out);
        }
      }
    }
}

void multiply(const Coded& m, const void* const* prepared, float* const* y, int64_t inputs, int64_t first, int64_t last) {
  const auto x = reinterpret_cast<const float* const*>(prepared);
  if (m.v == 4)
    multiply_groups<4>(m, x, y, inputs, first, last);
  else
    multiply_groups<2>(m, x, y, inputs, first, last);
}

}  // namespace
}  // namespace moecc
