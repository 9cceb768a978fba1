// One call of the op: its operands, checked.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace moecc {

struct Matrix {  // a coded matrix per expert, or one for all; codes are null if there is none
  const uint8_t* codes = nullptr;
  const uint8_t* signs = nullptr;
  const int8_t* codebook = nullptr;
  const float* scale = nullptr;  // [experts, rows]
  int64_t books = 0, v = 0, rows = 0, columns = 0;

  explicit operator bool() const { return codes; }
  Coded of(int64_t expert) const {
    const int64_t r = blocks(rows), c = blocks(columns), area = r * c * BLOCK * BLOCK;
    return {codes + expert * area / v, signs ? signs + expert * area / 8 : nullptr,
            codebook + (books > 1 ? expert : 0) * 256 * v, v, r, c};
  }
};

struct Projection {  // moecc/ir/vq4.py; gate_up [N, D], down [D, F]
  Matrix coded, mean;
  const float* bias = nullptr;        // [E, rows]
  const float* basis = nullptr;       // [rank, D]
  const int8_t* coef = nullptr;       // [E, N, rank] | [E, rank, F]
  const float* coef_scale = nullptr;  // [E, N] | [E, rank]
  int64_t rank = 0;
};

struct Layer {
  int64_t tokens = 0, top_k = 0, experts = 0, hidden = 0, intermediate = 0;
  bool half = false;              // x and y are float16, not float32
  const void* x = nullptr;        // [tokens, hidden]
  const int64_t* index = nullptr;  // [tokens, top_k], each in 0..experts-1
  const float* weight = nullptr;  // [tokens, top_k]
  Projection gate_up, down;
  const float* post_norm = nullptr;  // [hidden]
  Gating gating{};
  float eps = 0;

  // By the number of multiplications.
  bool small() const { return tokens * top_k * hidden * (gate_up.coded.rows + intermediate) < 1 << 20; }
};

// Calls task(data, 0..count-1) on several threads and returns when all are done.
class Parallel {
 public:
  using Task = void (*)(void* data, size_t i);
  virtual void run(size_t count, Task task, void* data) const = 0;

  // f must not throw: it runs on other threads.
  template <class F>
  void each(int64_t count, F&& f) const {
    if (count <= 0) return;
    run(static_cast<size_t>(count), [](void* data, size_t i) { (*static_cast<F*>(data))(static_cast<int64_t>(i)); }, &f);
  }

 protected:
  ~Parallel() = default;
};

class Serial final : public Parallel {  // for work that is done before another thread wakes up
 public:
  void run(size_t count, Task task, void* data) const override {
    for (size_t i = 0; i < count; i++) task(data, i);
  }
};

// Computes y [tokens, hidden], float32 or float16 as layer.half says. Throws std::bad_alloc if
// there is no memory.
void run(const Layer& layer, const Kernels& kernels, const Parallel& parallel, void* y);

}  // namespace moecc
