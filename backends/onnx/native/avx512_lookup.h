// The product for few inputs, of codes of four weights without signs. Per column block and input:
//
//   1. for a group of four columns, t[c] = sum_i codebook[c, i] x[i] of all 256 codes, in float
//   2. brought to 23 bits with one scale per block by adding 1.5 * 2^23, rounded to 19, and cut into three tables of bytes
//   3. the codes of 64 rows are one register: two vpermi2b and a blend by the code's top bit look a byte up for all rows
//   4. bytes are summed over a block's groups in 16 bits, and those sums go to float with the block's scale
//
// Relative error of a product: 1e-5. With two tables, 16 bits, it would be 1e-4, at 5/6 of the time.
#pragma once
#include "avx512.h"

namespace moecc {
namespace {

struct FloatBook {  // per component, weight by code
  alignas(64) float of[4][256];
  float largest;  // norm of a centroid

  explicit FloatBook(const int8_t* codebook) {
    __m512 most = _mm512_setzero_ps();
    for (int c = 0; c < 256; c += 16) {
      __m512 square = _mm512_setzero_ps();
      for (int i = 0; i < 4; i++) {
        const __m512 w = _mm512_cvtepi32_ps(component<4>(codebook, c, i));
        _mm512_store_ps(of[i] + c, w);
        square = _mm512_fmadd_ps(w, w, square);
      }
      most = _mm512_max_ps(most, square);
    }
    largest = sqrtf(_mm512_reduce_max_ps(most));
  }
};

constexpr int GROUPS = BLOCK / 4;     // of a block
constexpr int SIZE = GROUPS * BLOCK;  // bytes of a block of codes
constexpr int FAR = 16;               // blocks ahead that are fetched: about as long as memory takes

struct Sums {  // t[c] of the groups, cut in three: bits 16..22, 8..15 and 4..7. What is lower is rounded away
  alignas(64) uint8_t high[GROUPS][256], middle[GROUPS][256], low[GROUPS][256];
};

constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: a float of this size has its unit in the last bit
constexpr float RANGE = 4194200.0f;   // 2^22, less what rounding may add
constexpr int ZERO = 64;              // what 0 is in `high`

void fill(const FloatBook& book, const float* x, float factor, Sums& sums) {
  alignas(64) uint8_t order[128];  // of two registers: their bytes 2 and 1, their bytes 0
  for (int i = 0; i < 32; i++) {
    const int at = 4 * (i % 16) + (i < 16 ? 0 : 64);
    order[i] = static_cast<uint8_t>(at + 2);
    order[32 + i] = static_cast<uint8_t>(at + 1);
    order[64 + i] = order[96 + i] = static_cast<uint8_t>(at);
  }
  const __m512i bytes21 = load512(order), bytes0 = load512(order + 64), four_bits = _mm512_set1_epi8(15);
  const __m512 shift = _mm512_set1_ps(SHIFT + 8);  // half of what is cut off
  for (int g = 0; g < GROUPS; g += 2) {  // two at a time: the codebook is read half as often
    __m512 in[2][4];
    for (int i = 0; i < 8; i++) in[i / 4][i % 4] = _mm512_set1_ps(x[g * 4 + i] * factor);
    for (int c = 0; c < 256; c += 64) {
      __m512i z[2][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        __m512 t = shift, u = shift;
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          const __m512 w = _mm512_load_ps(book.of[i] + c + 16 * j);
          t = _mm512_fmadd_ps(w, in[0][i], t);
          u = _mm512_fmadd_ps(w, in[1][i], u);
        }
        z[0][j] = _mm512_castps_si512(t);
        z[1][j] = _mm512_castps_si512(u);
      }
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        const __m512i a = _mm512_permutex2var_epi8(z[h][0], bytes21, z[h][1]);
        const __m512i b = _mm512_permutex2var_epi8(z[h][2], bytes21, z[h][3]);
        const __m512i d = _mm512_permutex2var_epi8(z[h][0], bytes0, z[h][1]);
        const __m512i e = _mm512_permutex2var_epi8(z[h][2], bytes0, z[h][3]);
        const __m512i low = _mm512_srli_epi16(_mm512_mask_blend_epi64(0xf0, d, e), 4);
        _mm512_store_si512(sums.high[g + h] + c, _mm512_shuffle_i64x2(a, b, 0x44));
        _mm512_store_si512(sums.middle[g + h] + c, _mm512_shuffle_i64x2(a, b, 0xee));
        _mm512_store_si512(sums.low[g + h] + c, _mm512_and_si512(low, four_bits));
      }
    }
  }
}

// Calls add(r, bytes) with what a table gives for R row blocks, of one group or the sum of TOGETHER. Meanwhile it fetches AHEAD
// blocks.
template <int R, int TOGETHER, int AHEAD, class Add>
inline __attribute__((always_inline)) void for_groups(const uint8_t (*table)[256], const uint8_t* codes, const uint8_t* ahead,
                                                      Add&& add) {
  for (int g = 0; g < GROUPS; g += TOGETHER) {
    __m512i t[TOGETHER][4];
#pragma GCC unroll 2
    for (int h = 0; h < TOGETHER; h++) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) t[h][i] = load512(table[g + h] + 64 * i);
#pragma GCC unroll 4
      for (int r = 0; r < AHEAD; r++) fetch(ahead + r * SIZE + (g + h) * BLOCK);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      __m512i sum{};
#pragma GCC unroll 2
      for (int h = 0; h < TOGETHER; h++) {
        const __m512i c = load512(codes + r * SIZE + (g + h) * BLOCK);
        const __m512i bytes = look_up(t[h][0], t[h][1], t[h][2], t[h][3], c, _mm512_movepi8_mask(c));
        sum = h ? _mm512_add_epi8(sum, bytes) : bytes;
      }
      add(r, sum);
    }
  }
}

// Sums of R blocks of 64 rows in 16 bits: even rows, odd rows.
template <int R>
struct Words {
  __m512i even[R], odd[R];
};

// The sums of one part of the tables, high or middle, less `zero`, a multiple of 256. Bytes are added as they lie, two rows to
// a word, and the odd rows once more; before that TOGETHER of them to a byte, two of `high`, which is below 128.
template <int R, int TOGETHER, int AHEAD>
inline __attribute__((always_inline)) Words<R> sum_words(const uint8_t (*table)[256], const uint8_t* codes,
                                                         const uint8_t* ahead, int zero) {
  __m512i whole[R], odd[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) whole[r] = odd[r] = _mm512_set1_epi16(static_cast<short>(-zero));
  for_groups<R, TOGETHER, AHEAD>(table, codes, ahead, [&](int r, __m512i bytes) __attribute__((always_inline)) {
    add_to16(whole[r], bytes);
    add_to16(odd[r], _mm512_srli_epi16(bytes, 8));
  });
  Words<R> sums;
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    sums.even[r] = _mm512_sub_epi16(whole[r], _mm512_slli_epi16(odd[r], 8));
    sums.odd[r] = odd[r];
  }
  return sums;
}

// The same of the lowest part, 4 bits of which 16 add up to a byte.
template <int R, int AHEAD>
inline __attribute__((always_inline)) Words<R> sum_bytes(const uint8_t (*table)[256], const uint8_t* codes,
                                                         const uint8_t* ahead) {
  __m512i whole[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) whole[r] = _mm512_setzero_si512();
  for_groups<R, 1, AHEAD>(table, codes, ahead, [&](int r, __m512i bytes) __attribute__((always_inline)) {
    add_to8(whole[r], bytes);
  });
  Words<R> sums;
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    sums.even[r] = _mm512_and_si512(whole[r], _mm512_set1_epi16(255));
    sums.odd[r] = _mm512_srli_epi16(whole[r], 8);
  }
  return sums;
}

// 16 rows: y += scale * (65536 high + 256 middle + 16 low)
template <bool UPPER>
inline void add_rows(float* y, __m512i high, __m512i middle, __m512i low, __m512 scale) {
  const __m512i weights = _mm512_set1_epi32(256 << 16 | 16), zero = _mm512_setzero_si512();
  const __m512i pairs = UPPER ? _mm512_unpackhi_epi16(low, middle) : _mm512_unpacklo_epi16(low, middle);
  const __m512i top = UPPER ? _mm512_unpackhi_epi16(zero, high) : _mm512_unpacklo_epi16(zero, high);
  const __m512i sum = _mm512_add_epi32(_mm512_madd_epi16(pairs, weights), top);
  _mm512_storeu_ps(y, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, _mm512_loadu_ps(y)));
}

// R row blocks: y += scale * sums, rows in the order 0 2 4 6, 16 18.. | 8 10.. | 1 3.. | 9 11..
template <int R>
void gather(const uint8_t* codes, const Sums& sums, float scale, float* y) {
  constexpr int A = (R + 2) / 3, B = (R + 1) / 3, C = R / 3;  // together R
  const uint8_t* ahead = codes + FAR * SIZE;
  const Words<R> high = sum_words<R, 2, A>(sums.high, codes, ahead, ZERO * GROUPS);
  const Words<R> middle = sum_words<R, 1, B>(sums.middle, codes, ahead + A * SIZE, 0);
  const Words<R> low = sum_bytes<R, C>(sums.low, codes, ahead + (A + B) * SIZE);
  const __m512 s = _mm512_set1_ps(scale);
#pragma GCC unroll 4
  for (int r = 0; r < R; r++, y += BLOCK) {
    add_rows<false>(y, high.even[r], middle.even[r], low.even[r], s);
    add_rows<true>(y + 16, high.even[r], middle.even[r], low.even[r], s);
    add_rows<false>(y + 32, high.odd[r], middle.odd[r], low.odd[r], s);
    add_rows<true>(y + 48, high.odd[r], middle.odd[r], low.odd[r], s);
  }
}

inline void interleave(float* y) {  // from `gather`'s order to `natural`'s
  const __m512 e0 = _mm512_loadu_ps(y), e1 = _mm512_loadu_ps(y + 16), o0 = _mm512_loadu_ps(y + 32),
               o1 = _mm512_loadu_ps(y + 48);
  _mm512_storeu_ps(y, _mm512_unpacklo_ps(e0, o0));
  _mm512_storeu_ps(y + 16, _mm512_unpackhi_ps(e0, o0));
  _mm512_storeu_ps(y + 32, _mm512_unpacklo_ps(e1, o1));
  _mm512_storeu_ps(y + 48, _mm512_unpackhi_ps(e1, o1));
}

float largest_group(const float* x) {  // norm
  double largest = 0;  // the square of a float is within its range
  for (int g = 0; g < GROUPS; g++) {
    double square = 0;
    for (int i = 0; i < 4; i++) square += static_cast<double>(x[g * 4 + i]) * x[g * 4 + i];
    largest = square > largest || square != square ? square : largest;  // NaN stays
  }
  return static_cast<float>(sqrt(largest));
}

void lookup(const Coded& m, const float* const* x, float* const* y, int64_t inputs, int64_t first, int64_t last) {
  const FloatBook book(m.codebook);
  Sums sums;
  for (int64_t i = 0; i < inputs; i++) memset(y[i], 0, sizeof(float) * m.row_blocks * BLOCK);
  for (int64_t column = first; column < last; column++)
    for (int64_t i = 0; i < inputs; i++) {
      const float* in = x[i] + column * BLOCK;
      const float bound = largest_group(in) * book.largest;
      if (bound < 1e-30f) continue;  // all of it is zero, or as good as
      fill(book, in, RANGE / bound, sums);
      const float scale = bound / RANGE;
      int64_t row = 0;
      for (; row + 4 <= m.row_blocks; row += 4) gather<4>(m.block(column, row), sums, scale, y[i] + row * BLOCK);
      for (; row < m.row_blocks; row++) gather<1>(m.block(column, row), sums, scale, y[i] + row * BLOCK);
    }
  for (int64_t i = 0; i < inputs; i++)
    for (int64_t row = 0; row < m.row_blocks; row++) {
      interleave(y[i] + row * BLOCK);
      natural(y[i] + row * BLOCK);
    }
}

}  // namespace
}  // namespace moecc
