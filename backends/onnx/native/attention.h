// One call of CachedAttention, checked. backends/onnx/rewrites/attention.py says what it computes.
#pragma once
#include <cstddef>
#include <cstdint>

#include "layer.h"

namespace moecc {

struct Attention {
  int64_t batch = 0, tokens = 0, past = 0;
  // Tokens for which a head of the cache has memory, before the call and after it.
  int64_t past_room = 0, present_room = 0;
  int64_t heads = 0, groups = 0;           // of queries, of keys and values
  int64_t width = 0, value_width = 0;      // channels of a key, of a value
  bool half = false;                       // rows, cache, norms and angles are float16, not float32
  // [batch, tokens, heads width + groups width + groups value_width]
  const void* rows = nullptr;
  const void* past_key = nullptr;          // [batch, groups, past_room, width]
  const void* past_value = nullptr;        // [batch, groups, past_room, value_width]
  const uint8_t* mask = nullptr;           // [batch or 1, heads or 1, tokens, past + tokens]
  bool mask_per_row = false, mask_per_head = false;
  const void* q_norm = nullptr;            // [width], or null
  const void* k_norm = nullptr;
  const void* cos = nullptr;               // [batch, tokens, angles], or null
  const void* sin = nullptr;
  int64_t angles = 0;                      // one for every two rotated channels
  bool interleaved = false;
  float scale = 0, eps = 0;

  int64_t total() const { return past + tokens; }
  // By the number of multiplications.
  bool small() const { return batch * heads * tokens * total() * (width + value_width) < 200000; }
  int64_t row_width() const { return (heads + groups) * width + groups * value_width; }
};

// Computes y [batch, tokens, heads value_width], and present_key and present_value [batch, groups,
// present_room, ...]: the past with the new keys and values behind it, and the past's own numbers in
// the room that is left. They may be the memory of the past; then nothing is copied.
void attend(const Attention& a, const Kernels& kernels, const Parallel& parallel, void* y, void* present_key, void* present_value);

}  // namespace moecc
