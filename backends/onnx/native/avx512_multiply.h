// The product for many inputs, and for few if there are signs or codes of two weights:
//
//   1. an input is 24-bit fixed point with one scale, in three signed bytes (`prepare`)
//   2. blocks are decoded to unsigned bytes, weight + 128, four neighbouring columns in 32 bits
//   3. vpdpbusd multiplies and adds those four; the sums start from -128 sum(x)
#pragma once
#include "avx512.h"

namespace moecc {
namespace {

constexpr int LEVELS = 3;  // bytes of an input

template <int V>
struct ByteBook {  // per component, weight + 128 by code
  alignas(64) uint8_t of[V][256];

  explicit ByteBook(const int8_t* codebook) {
    for (int i = 0; i < V; i++)
      for (int c = 0; c < 256; c += 16) {
        const __m128i bytes = _mm512_cvtepi32_epi8(component<V>(codebook, c, i));
        _mm_store_si128(reinterpret_cast<__m128i*>(of[i] + c), _mm_xor_si128(bytes, _mm_set1_epi8(-128)));
      }
  }
};

constexpr int64_t CHUNK = 4;  // column blocks at a time: 16 kB of decoded weights
constexpr int64_t SOON = 2;   // rows of them that are fetched ahead
constexpr int64_t QUADS = CHUNK * BLOCK / 4;

struct Input {  // the columns of a chunk
  int32_t start[4];  // -128 * the sum of the digits of each level
  int8_t digits[QUADS][LEVELS][4];
};

struct Head {
  float scale;
  float pad[15];
};

int64_t prepared_bytes(int64_t column_blocks) {
  const int64_t chunks = (column_blocks + CHUNK - 1) / CHUNK;
  return (static_cast<int64_t>(sizeof(Head) + sizeof(Input) * chunks) + 63) / 64 * 64;
}

void prepare(const float* x, int64_t column_blocks, void* prepared) {
  const int64_t columns = column_blocks * BLOCK;
  __m512 most = _mm512_setzero_ps(), wrong = _mm512_setzero_ps();
  for (int64_t k = 0; k < columns; k += 16) {
    const __m512 v = _mm512_loadu_ps(x + k);
    most = _mm512_max_ps(most, _mm512_abs_ps(v));
    // 0, or NaN if any value is infinite or NaN.
    wrong = _mm512_fmadd_ps(v, _mm512_setzero_ps(), wrong);
  }
  const float largest = _mm512_reduce_max_ps(most);
  const float limit = 8290000.0f;  // 126.5 * 65536: the top digit stays within +-127
  Head* head = static_cast<Head*>(prepared);
  const bool tiny = largest < 1e-30f;
  head->scale = (tiny ? 0.0f : largest / limit) + _mm512_reduce_add_ps(wrong);
  const __m512 factor = _mm512_set1_ps(tiny ? 0.0f : limit / largest);
  Input* in = reinterpret_cast<Input*>(head + 1);
  const __m512i half = _mm512_set1_epi32(128);
  for (int64_t chunk = 0; chunk * CHUNK < column_blocks; chunk++, in++) {
    __m128i sum[LEVELS] = {_mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128()};
    const int64_t start = chunk * CHUNK * BLOCK;
    const int64_t end = start + CHUNK * BLOCK < columns ? start + CHUNK * BLOCK : columns;
    for (int64_t k = start; k < end; k += 16) {
      __m512i rest = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), factor));
      for (int level = 0; level < LEVELS; level++) {
        const __m128i digits = _mm512_cvtepi32_epi8(rest);
        alignas(16) int8_t bytes[16];
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes), digits);
        for (int quad = 0; quad < 4; quad++) memcpy(in->digits[(k - start) / 4 + quad][level], bytes + 4 * quad, 4);
        sum[level] = _mm_dpbusd_epi32(sum[level], _mm_set1_epi8(1), digits);
        rest = _mm512_srai_epi32(_mm512_add_epi32(rest, half), 8);
      }
    }
    for (int level = 0; level < LEVELS; level++) {
      alignas(16) int32_t four[4];
      _mm_store_si128(reinterpret_cast<__m128i*>(four), sum[level]);
      in->start[level] = -128 * (four[0] + four[1] + four[2] + four[3]);
    }
  }
}

// Turns four planes of 64 rows into four registers with the four bytes of a row side by side.
inline void store_quad(const __m512i* p, uint8_t* w) {
  const __m512i a = _mm512_unpacklo_epi8(p[0], p[1]), b = _mm512_unpackhi_epi8(p[0], p[1]);
  const __m512i c = _mm512_unpacklo_epi8(p[2], p[3]), d = _mm512_unpackhi_epi8(p[2], p[3]);
  _mm512_store_si512(w, _mm512_unpacklo_epi16(a, c));
  _mm512_store_si512(w + 64, _mm512_unpackhi_epi16(a, c));
  _mm512_store_si512(w + 128, _mm512_unpacklo_epi16(b, d));
  _mm512_store_si512(w + 192, _mm512_unpackhi_epi16(b, d));
}

struct Blocks {  // one block's codes and signs
  const uint8_t* codes;
  const uint8_t* signs;

  Blocks(const Coded& m, int64_t column, int64_t row)
      : codes(m.block(column, row)), signs(m.signs ? m.sign_block(column, row) : nullptr) {}
};

// Decodes one block to w [16 quads of columns, 256], and prefetches the block `ahead`.
template <int V>
void decode(const Coded& m, const Blocks& block, const Blocks& ahead, const ByteBook<V>& book, uint8_t* w) {
  __m512i t[V][4];
  for (int i = 0; i < V; i++)
    for (int j = 0; j < 4; j++) t[i][j] = load512(book.of[i] + 64 * j);
  const __m512i ones = _mm512_set1_epi8(-1);
  for (int64_t quad = 0; quad < BLOCK / 4; quad++) {
    __m512i p[4];
    for (int i = 0; i < 4; i += V) {
      const int64_t at = (quad * 4 + i) / V * BLOCK;
      fetch(ahead.codes + at);
      const __m512i c = load512(block.codes + at);
      const __mmask64 high = _mm512_movepi8_mask(c);
      for (int j = 0; j < V; j++) p[i + j] = look_up(t[j][0], t[j][1], t[j][2], t[j][3], c, high);
    }
    if (m.signs) {  // -1 - w, which is 255 - (w + 128) in bytes
      fetch(ahead.signs + quad * 32);
      // Byte i has the signs of rows i and i + 32.
      const __m256i two = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block.signs + quad * 32));
      const __m512i rows = _mm512_inserti64x4(_mm512_castsi256_si512(two), _mm256_srli_epi16(two, 4), 1);
      for (int i = 0; i < 4; i++)
        p[i] = _mm512_mask_sub_epi8(p[i], _mm512_test_epi8_mask(rows, _mm512_set1_epi8(static_cast<char>(1 << i))), ones, p[i]);
    }
    store_quad(p, w + quad * 256);
  }
}

// Members, not arrays: a compiler keeps them in registers.
struct Rows {  // sums of 64 rows
  __m512i q0, q1, q2, q3;

  explicit Rows(int32_t start) { q0 = q1 = q2 = q3 = _mm512_set1_epi32(start); }
  void add(__m512i w0, __m512i w1, __m512i w2, __m512i w3, const int8_t* digits) {
    int32_t four;
    memcpy(&four, digits, sizeof four);
    const __m512i d = _mm512_set1_epi32(four);
    dot_to(q0, w0, d);
    dot_to(q1, w1, d);
    dot_to(q2, w2, d);
    dot_to(q3, w3, d);
  }
};

struct Levels {  // of one input
  Rows l0, l1, l2;

  explicit Levels(const Input* x) : l0(x->start[0]), l1(x->start[1]), l2(x->start[2]) {}
  void add(__m512i w0, __m512i w1, __m512i w2, __m512i w3, const int8_t (*digits)[4]) {
    l0.add(w0, w1, w2, w3, digits[0]);
    l1.add(w0, w1, w2, w3, digits[1]);
    l2.add(w0, w1, w2, w3, digits[2]);
  }
  static void add_to(float* y, __m512i a, __m512i b, __m512i c, __m512 scale) {
    __m512 total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(b), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(a));
    total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(c), _mm512_set1_ps(65536.0f), total);
    _mm512_storeu_ps(y, _mm512_fmadd_ps(total, scale, _mm512_loadu_ps(y)));
  }
  void add_to(float* y, float scale) const {
    const __m512 s = _mm512_set1_ps(scale);
    add_to(y, l0.q0, l1.q0, l2.q0, s);
    add_to(y + 16, l0.q1, l1.q1, l2.q1, s);
    add_to(y + 32, l0.q2, l1.q2, l2.q2, s);
    add_to(y + 48, l0.q3, l1.q3, l2.q3, s);
  }
};

// y [64 rows] += scale * (w - 128) x, for one input or two
void accumulate(const uint8_t* w, int64_t quads, const Input* x, float scale, float* y) {
  Levels sums(x);
  for (int64_t quad = 0; quad < quads; quad++, w += 256)
    sums.add(load512(w), load512(w + 64), load512(w + 128), load512(w + 192), x->digits[quad]);
  sums.add_to(y, scale);
}

void accumulate(const uint8_t* w, int64_t quads, const Input* const* x, const float* scale, float* const* y) {
  Levels sums0(x[0]), sums1(x[1]);
  for (int64_t quad = 0; quad < quads; quad++, w += 256) {
    const __m512i w0 = load512(w), w1 = load512(w + 64), w2 = load512(w + 128), w3 = load512(w + 192);
    sums0.add(w0, w1, w2, w3, x[0]->digits[quad]);
    sums1.add(w0, w1, w2, w3, x[1]->digits[quad]);
  }
  sums0.add_to(y[0], scale[0]);
  sums1.add_to(y[1], scale[1]);
}

template <int V>
void multiply_groups(const Coded& m, const void* const* x, float* const* y, int64_t inputs, int64_t first, int64_t last) {
  const ByteBook<V> book(m.codebook);
  alignas(64) uint8_t w[QUADS * 256];
  for (int64_t i = 0; i < inputs; i++) memset(y[i] + first * BLOCK, 0, sizeof(float) * (last - first) * BLOCK);
  for (int64_t column = 0; column < m.column_blocks; column += CHUNK) {
    const int64_t width = m.column_blocks - column < CHUNK ? m.column_blocks - column : CHUNK;
    const int64_t quads = width * BLOCK / 4;
    for (int64_t row = first; row < last; row++) {
      for (int64_t c = column; c < column + width; c++) {
        const int64_t soon = row + SOON;  // after the last rows come the first of the next columns
        const int64_t next = soon < last || c + CHUNK >= m.column_blocks ? c : c + CHUNK;
        const Blocks ahead(m, next, soon < last ? soon : first + (soon - last) % (last - first));
        decode<V>(m, Blocks(m, c, row), ahead, book, w + (c - column) * BLOCK * BLOCK);
      }
      for (int64_t i = 0; i < inputs; i += 2) {
        const Input* in[2];
        float scale[2];
        float* out[2];
        const int64_t n = inputs - i < 2 ? 1 : 2;
        for (int64_t j = 0; j < n; j++) {
          const Head* head = static_cast<const Head*>(x[i + j]);
          in[j] = reinterpret_cast<const Input*>(head + 1) + column / CHUNK;
          scale[j] = head->scale;
          out[j] = y[i + j] + row * BLOCK;
        }
        if (n == 2)
          accumulate(w, quads, in, scale, out);
        else
          accumulate(w, quads, in[0], scale[0], out[0]);
      }
    }
  }
  for (int64_t i = 0; i < inputs; i++)
    for (int64_t row = first; row < last; row++) natural(y[i] + row * BLOCK);
}

void multiply(const Coded& m, const void* const* x, float* const* y, int64_t inputs, int64_t first, int64_t last) {
  if (m.v == 4)
    multiply_groups<4>(m, x, y, inputs, first, last);
  else
    multiply_groups<2>(m, x, y, inputs, first, last);
}

}  // namespace
}  // namespace moecc
