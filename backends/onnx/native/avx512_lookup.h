// The product for few inputs, of codes of four weights without signs. Per column block and input:
//
//   1. a group of four columns has t[c] = sum_i codebook[c, i] x[i] of all 256 codes, in whole
//      numbers
//   2. t is rounded to 18 bits, with one scale per block, and cut into three tables of 6 bits
//   3. the codes of 64 rows are one register: two vpermi2b and a blend by the code's top bit look a
//      byte up for all rows
//   4. bytes are summed over four groups as they are, then in 16 bits over the block; that sum
//      becomes float with its scale
//
// Relative error of a product: 1.3e-5 if channels are alike; of a layer with one channel 100 times
// as loud: 4e-5.
#pragma once
#include "avx512.h"

namespace moecc {
namespace {

struct Book {  // by code: 256 w of components 0 and 1, and of 2 and 3; w + 128 of all
  alignas(64) int16_t high[2][256][2];
  alignas(64) uint8_t low[256][4];
  float largest;  // the largest norm of a centroid, or the bound by the digits of x if that is more

  explicit Book(const int8_t* codebook) {
    __m512 most = _mm512_set1_ps(65.0f * 65.0f);
    for (int c = 0; c < 256; c += 16) {
      __m512 square = _mm512_setzero_ps();
      __m512i w[4];
      for (int i = 0; i < 4; i++) {
        w[i] = component<4>(codebook, c, i);
        const __m512 f = _mm512_cvtepi32_ps(w[i]);
        square = _mm512_fmadd_ps(f, f, square);
      }
      for (int i = 0; i < 2; i++) {
        const __m512i even = _mm512_and_si512(_mm512_slli_epi32(w[2 * i], 8), _mm512_set1_epi32(0xffff));
        _mm512_store_si512(high[i][c], _mm512_or_si512(even, _mm512_slli_epi32(w[2 * i + 1], 24)));
      }
      _mm512_store_si512(low[c], _mm512_xor_si512(load512(codebook + 4 * c), _mm512_set1_epi8(-128)));
      most = _mm512_max_ps(most, square);
    }
    largest = sqrtf(_mm512_reduce_max_ps(most));
  }
};

constexpr int GROUPS = BLOCK / 4;     // of a block
constexpr int SIZE = GROUPS * BLOCK;  // bytes of a block of codes
constexpr int FAR = 16;               // blocks to prefetch ahead: they take about as long as memory
constexpr int PARTS = 3;              // of t: bits 24..29, 18..23, 12..17; lower ones are rounded
constexpr int QUAD = 4;               // groups whose bytes are added: 4 * 63 fits a byte

struct Sums {
  alignas(64) uint8_t of[GROUPS][PARTS][256];
};

// HALF: half of the unit of rounding. OFFSET: makes t not negative. RANGE: of t, with room for
// rounding. ZERO: is 0 in the first part.
constexpr int HALF = 1 << 11, OFFSET = 1 << 29;
constexpr float RANGE = static_cast<float>(OFFSET - 4096);
constexpr int ZERO = 32;

// x in two digits, 256 h + l: pairs of h and quadruples of l of a group side by side, and the start
// of its t
struct Digits {
  alignas(64) int16_t high[GROUPS][4];
  alignas(64) int8_t low[GROUPS][4];
  alignas(64) int32_t start[GROUPS];

  Digits(const float* x, float factor) {
    for (int g = 0; g < GROUPS; g += 4) {
      const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + g * 4), _mm512_set1_ps(factor)));
      const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
      const __m128i l = _mm512_cvtepi32_epi8(v);
      _mm256_store_si256(reinterpret_cast<__m256i*>(high[g]), _mm512_cvtepi32_epi16(h));
      _mm_store_si128(reinterpret_cast<__m128i*>(low[g]), l);
      const __m128i offset = _mm_set1_epi32(OFFSET + HALF);
      _mm_store_si128(reinterpret_cast<__m128i*>(start + g),
                      _mm_sub_epi32(offset, _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8(-128), l)));
    }
  }
};

inline __m512i four_bytes(const void* p) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  return _mm512_set1_epi32(four);
}

void fill(const Book& book, const float* x, float factor, Sums& sums) {
  // Of two registers: their bytes 3 and 2, their bytes 2 and 3, their bytes 1.
  alignas(64) uint8_t order[192];
  for (int i = 0; i < 32; i++) {
    const int at = 4 * (i % 16) + (i < 16 ? 0 : 64);
    order[i] = order[96 + i] = static_cast<uint8_t>(at + 3);
    order[32 + i] = order[64 + i] = static_cast<uint8_t>(at + 2);
    order[128 + i] = order[160 + i] = static_cast<uint8_t>(at + 1);
  }
  const __m512i bytes32 = load512(order), bytes23 = load512(order + 64), bytes1 = load512(order + 128);
  const __m512i four_bits = _mm512_set1_epi8(15), six_bits = _mm512_set1_epi8(63);
  const Digits digits(x, factor);
  for (int g = 0; g < GROUPS; g += 2) {  // two at a time: the codebook is read half as often
    for (int c = 0; c < 256; c += 64) {
      __m512i z[2][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const __m512i a = load512(book.high[0][c + 16 * j]), b = load512(book.high[1][c + 16 * j]);
        const __m512i l = load512(book.low[c + 16 * j]);
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
          __m512i t = _mm512_set1_epi32(digits.start[g + h]);
          t = _mm512_dpwssd_epi32(t, a, four_bytes(digits.high[g + h]));
          t = _mm512_dpwssd_epi32(t, b, four_bytes(digits.high[g + h] + 2));
          z[h][j] = _mm512_dpbusd_epi32(t, l, four_bytes(digits.low[g + h]));
        }
      }
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        const __m512i p = _mm512_permutex2var_epi8(z[h][0], bytes32, z[h][1]);
        const __m512i q = _mm512_permutex2var_epi8(z[h][2], bytes23, z[h][3]);
        const __m512i d = _mm512_permutex2var_epi8(z[h][0], bytes1, z[h][1]);
        const __m512i e = _mm512_permutex2var_epi8(z[h][2], bytes1, z[h][3]);
        const __m512i byte3 = _mm512_mask_blend_epi64(0xf0, p, q), byte2 = _mm512_shuffle_i64x2(p, q, 0x4e);
        const __m512i byte1 = _mm512_mask_blend_epi64(0xf0, d, e);
        const __m512i low = _mm512_ternarylogic_epi32(four_bits, _mm512_srli_epi16(byte1, 4), _mm512_slli_epi16(byte2, 4), 0xca);
        _mm512_store_si512(sums.of[g + h][0] + c, byte3);
        _mm512_store_si512(sums.of[g + h][1] + c, _mm512_and_si512(_mm512_srli_epi16(byte2, 2), six_bits));
        _mm512_store_si512(sums.of[g + h][2] + c, _mm512_and_si512(low, six_bits));
      }
    }
  }
}

template <int R>
using Bytes = __m512i[QUAD][R][PARTS];  // sums of 64 rows, for four quads of groups

// Sums the entries of the tables for R row blocks.
template <int R>
inline __attribute__((always_inline)) void sum_bytes(const uint8_t* codes, const Sums& sums, Bytes<R>& bytes) {
  const uint8_t* ahead = codes + FAR * SIZE;
  for (int quad = 0; quad < QUAD; quad++) {
    __m512i sum[R][PARTS];
#pragma GCC unroll 4
    for (int i = 0; i < GROUPS / QUAD; i++) {
      const int g = quad * (GROUPS / QUAD) + i;
      __m512i t[PARTS][4];
#pragma GCC unroll 3
      for (int p = 0; p < PARTS; p++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) t[p][j] = load512(sums.of[g][p] + 64 * j);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const __m512i c = load512(codes + r * SIZE + g * BLOCK);
        fetch(ahead + (g * R + r) * BLOCK);
        const __mmask64 high = _mm512_movepi8_mask(c);
#pragma GCC unroll 3
        for (int p = 0; p < PARTS; p++) {
          const __m512i found = look_up(t[p][0], t[p][1], t[p][2], t[p][3], c, high);
          if (i == 0)
            sum[r][p] = found;
          else
            add_to8(sum[r][p], found);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
      for (int p = 0; p < PARTS; p++) bytes[quad][r][p] = sum[r][p];
  }
}

// The sums of a block's 64 rows in 16 bits.
struct Words {
  __m512i even, odd;  // rows

  // Adds up part p of row block r: bytes as they lie, two rows to a word, and the odd rows once
  // more.
  template <int R>
  Words(const Bytes<R>& bytes, int r, int p) {
    __m512i whole = bytes[0][r][p];
    odd = _mm512_srli_epi16(whole, 8);
#pragma GCC unroll 4
    for (int quad = 1; quad < QUAD; quad++) {
      whole = _mm512_add_epi16(whole, bytes[quad][r][p]);
      odd = _mm512_add_epi16(odd, _mm512_srli_epi16(bytes[quad][r][p], 8));
    }
    even = _mm512_sub_epi16(whole, _mm512_slli_epi16(odd, 8));
  }
};

inline __m512i add_shifted(__m512i middle, __m512i high) {  // middle + 64 (high - zero)
  return _mm512_add_epi16(middle, _mm512_slli_epi16(_mm512_sub_epi16(high, _mm512_set1_epi16(ZERO * GROUPS)), 6));
}

inline void add_rows(float* y, __m512i pairs, __m512 scale) {  // 16 rows: y += scale * (first + 64 second)
  const __m512i sum = _mm512_madd_epi16(pairs, _mm512_set1_epi32(64 << 16 | 1));
  _mm512_storeu_ps(y, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, _mm512_loadu_ps(y)));
}

// R row blocks: y += scale * t, rows in the order 0 2 4 6, 16 18.. | 8 10.. | 1 3.. | 9 11..
template <int R>
__attribute__((noinline)) void gather(const uint8_t* codes, const Sums& sums, float scale, float* y) {
  Bytes<R> bytes;
  sum_bytes<R>(codes, sums, bytes);
  const __m512 s = _mm512_set1_ps(scale * (2 * HALF));
#pragma GCC unroll 1
  for (int r = 0; r < R; r++, y += BLOCK) {
    const Words high(bytes, r, 0), middle(bytes, r, 1), low(bytes, r, 2);
    const __m512i even = add_shifted(middle.even, high.even), odd = add_shifted(middle.odd, high.odd);
    add_rows(y, _mm512_unpacklo_epi16(low.even, even), s);
    add_rows(y + 16, _mm512_unpackhi_epi16(low.even, even), s);
    add_rows(y + 32, _mm512_unpacklo_epi16(low.odd, odd), s);
    add_rows(y + 48, _mm512_unpackhi_epi16(low.odd, odd), s);
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
  double largest = 0;  // double, because its range has the square of every float
  for (int g = 0; g < GROUPS; g++) {
    double square = 0;
    for (int i = 0; i < 4; i++) square += static_cast<double>(x[g * 4 + i]) * x[g * 4 + i];
    largest = square > largest || square != square ? square : largest;  // NaN stays
  }
  return static_cast<float>(sqrt(largest));
}

void lookup(const Coded& m, const float* const* x, float* const* y, int64_t inputs, int64_t first, int64_t last) {
  const int64_t soon = (last - first) * m.row_blocks < FAR ? (last - first) * m.row_blocks : FAR;
  // Fetch the first codes while the first tables are made.
  for (int64_t i = 0; i < soon * SIZE; i += 64) fetch(m.block(first, 0) + i);
  const Book book(m.codebook);
  Sums sums;
  for (int64_t i = 0; i < inputs; i++) memset(y[i], 0, sizeof(float) * m.row_blocks * BLOCK);
  for (int64_t column = first; column < last; column++)
    for (int64_t i = 0; i < inputs; i++) {
      const float* in = x[i] + column * BLOCK;
      const float bound = largest_group(in) * book.largest;
      if (bound < 1e-30f) continue;  // all of x is zero, or as good as zero
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
