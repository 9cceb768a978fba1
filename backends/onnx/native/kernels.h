// The functions that differ between instruction sets, one table of them for each. The table is
// chosen when a node is created.
//
// A kernel file is compiled with flags of its own, so no other file may be linked against its
// functions: it includes no C++ library header with inline code, and everything in it but its table
// is in an unnamed namespace.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moecc {

constexpr int64_t BLOCK = 64;  // rows and columns of a block of codes (layout.py)

constexpr int64_t blocks(int64_t n) { return n / BLOCK + (n % BLOCK != 0); }

// One coded matrix of `row_blocks` x `column_blocks` blocks, unscaled.
struct Coded {
  const uint8_t* codes;    // [column_blocks, row_blocks, 64/v, 64]
  const uint8_t* signs;    // [column_blocks, row_blocks, 16, 32], or null
  const int8_t* codebook;  // [256, v]
  int64_t v;               // weights per code, 4 or 2
  int64_t row_blocks, column_blocks;

  const uint8_t* block(int64_t column, int64_t row) const {
    return codes + (column * row_blocks + row) * (BLOCK / v * BLOCK);
  }
  const uint8_t* sign_block(int64_t column, int64_t row) const {
    return signs + (column * row_blocks + row) * (BLOCK * BLOCK / 8);
  }
};

enum class Act { SILU, GELU, GELU_TANH, RELU, RELU2, SIGMOID, TANH, IDENTITY };
enum class Gate { NONE, GLU, CLAMP, CLAMP_AFTER, OAI, SOFTCAP };

template <class E>
struct Named {
  const char* name;
  E value;
};

constexpr Named<Act> ACTS[] = {
    {"silu", Act::SILU},   {"gelu", Act::GELU},       {"gelu_tanh", Act::GELU_TANH}, {"relu", Act::RELU},
    {"relu2", Act::RELU2}, {"sigmoid", Act::SIGMOID}, {"tanh", Act::TANH},           {"identity", Act::IDENTITY},
};
// Everything is float32 here, so gates that differ in the type they compute in are the same.
constexpr Named<Gate> GATES[] = {
    {"none", Gate::NONE},       {"glu", Gate::GLU},         {"f32", Gate::GLU},
    {"clamp", Gate::CLAMP},     {"clamp_f32", Gate::CLAMP}, {"clamp_after", Gate::CLAMP_AFTER},
    {"oai", Gate::OAI},         {"softcap", Gate::SOFTCAP},
};

struct Gating {  // moecc/ir/gates.py
  Act act;
  Gate gate;
  float alpha, limit;
};

struct Kernels {
  const char* name;

  // `lookup` is faster than `multiply` up to so many inputs, for codes of four weights and of two,
  // and from so many row blocks on, for its tables cost the same for few rows. It is called only
  // then, and only without signs.
  int64_t few_of_four, few_of_two, least_row_blocks;
  // y[i] [64 row_blocks] = the product of inputs x[i] [64 column_blocks] with the columns of blocks
  // first..last-1 alone
  void (*lookup)(const Coded&, const float* const* x, float* const* y, int64_t inputs, int64_t first, int64_t last);

  // The form in which `multiply` reads an input: its size, and how to make it. Null if it reads the
  // input itself.
  int64_t (*prepared_bytes)(int64_t column_blocks);
  void (*prepare)(const float* x, int64_t column_blocks, void* prepared);
  // y[i] = the rows of blocks first..last-1 of the product, with all columns
  void (*multiply)(const Coded&, const void* const* x, float* const* y, int64_t inputs, int64_t first, int64_t last);

  // h [f] from rows [2 f] (gate rows first), or [f] without a gate.
  void (*gate)(const Gating&, const float* rows, float* h, int64_t f);
  // y[i] += scale[i] * sum_j a[i, j] x[j]; a i8 [rows, columns]
  void (*add_coefficients)(float* y, const int8_t* a, const float* scale, const float* x, int64_t rows, int64_t columns);
  // sum_j a[j] b[j]
  float (*dot)(const float* a, const float* b, int64_t n);
  // y += s x;  y += s x z
  void (*add)(float* y, float s, const float* x, int64_t n);
  void (*add_product)(float* y, float s, const float* x, const float* z, int64_t n);
  // s[i, t] = sum_j q[i, j] k[t, j]; q [queries, width], k [keys, width]; rows of s are `stride`
  // apart
  void (*scores)(const float* q, int64_t queries, const float* k, int64_t keys, int64_t width, float* s, int64_t stride);
  // y[i] += sum_t s[i, t] v[t]; v [keys, width], y [queries, width]
  void (*mix)(const float* s, int64_t stride, int64_t queries, const float* v, int64_t keys, int64_t width, float* y);
  // s = its softmax over those t whose mask is not 0, and 0 elsewhere
  void (*softmax)(float* s, const uint8_t* mask, int64_t n);
  void (*from_half)(const uint16_t* x, float* y, int64_t n);
  void (*to_half)(const float* x, uint16_t* y, int64_t n);
};

extern const Kernels SCALAR_KERNELS;
#if defined(__x86_64__)
extern const Kernels AVX2_KERNELS, AVX512_KERNELS;
#elif defined(__aarch64__)
extern const Kernels NEON_KERNELS;
#endif

}  // namespace moecc
