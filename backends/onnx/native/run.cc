// A layer, in the order in which it is computed:
//
//   1. routes are sorted by expert; x becomes float32 in rows padded to whole blocks
//   2. one product of all chosen experts' gate_up (and the mean's) with their tokens
//   3. per route: scale, the shared part, bias, gate -> h
//   4. one product of all chosen experts' down with their h, and of the mean with sum_e w_e h_e
//   5. per token: scale, bias, weighted sum, the shared part
//
// If each expert's output has a norm, down's shared part is applied per route before it.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "layer.h"
#include "product.h"

namespace moecc {
namespace {

// Routes at a time: each expert gets enough tokens, and intermediate results stay small.
constexpr int64_t ROUTES = 4096;

class Chunk {  // some of the tokens
 public:
  Chunk(const Layer& layer, const Kernels& kernels, const Parallel& parallel, int64_t first, int64_t tokens, void* y)
      : l_(layer), k_(kernels), parallel_(parallel), first_(first), tokens_(tokens), routes_(tokens * layer.top_k), y_(y),
        width_(blocks(layer.hidden) * BLOCK), inner_(blocks(layer.intermediate) * BLOCK), x_(tokens * width_),
        h_((routes_ + tokens) * inner_), x_low_(tokens * layer.gate_up.rank),
        h_low_(routes_ * layer.down.rank) {}

  void run() {
    sort();
    widen();
    Product up(k_, x_.at(0), tokens_, width_);
    add_experts(up, l_.gate_up.coded, token_);
    if (l_.gate_up.mean) up.add(l_.gate_up.mean.of(0), counting_.data(), tokens_);
    up.run(parallel_);
    hidden(up);
    Product down(k_, h_.at(0), routes_ + tokens_, inner_);
    add_experts(down, l_.down.coded, counting_);
    if (l_.down.mean && l_.post_norm) down.add(l_.down.mean.of(0), counting_.data(), routes_);
    if (l_.down.mean && !l_.post_norm) {
      sum_hidden();
      down.add(l_.down.mean.of(0), counting_.data() + routes_, tokens_);
    }
    down.run(parallel_);
    combine(down);
  }

 private:
  float weight(int64_t route) const { return l_.weight[first_ * l_.top_k + route]; }

  // Sorts routes (t * k + j) by expert. Below, an entry is a route's place in this order.
  void sort() {
    const int64_t* index = l_.index + first_ * l_.top_k;
    start_.assign(static_cast<size_t>(l_.experts) + 1, 0);
    for (int64_t route = 0; route < routes_; route++) start_[index[route] + 1]++;
    for (int64_t e = 0; e < l_.experts; e++) start_[e + 1] += start_[e];
    std::vector<int64_t> next(start_.begin(), start_.end() - 1);
    expert_.resize(routes_);
    token_.resize(routes_);
    entry_.resize(routes_);
    counting_.resize(routes_ + tokens_);
    for (int64_t i = 0; i < routes_ + tokens_; i++) counting_[i] = i;
    for (int64_t route = 0; route < routes_; route++) {
      const int64_t entry = next[index[route]]++;
      entry_[route] = entry;
      expert_[entry] = index[route];
      token_[entry] = route / l_.top_k;
    }
  }

  void add_experts(Product& product, const Matrix& matrix, const std::vector<int64_t>& rows) const {
    for (int64_t e = 0; e < l_.experts; e++) product.add(matrix.of(e), rows.data() + start_[e], start_[e + 1] - start_[e]);
  }

  // Makes x float32, and its coordinates in gate_up's basis.
  void widen() {
    parallel_.each(tokens_, [&](int64_t t) noexcept {
      float* x = x_.at(t * width_);
      const int64_t at = (first_ + t) * l_.hidden;
      if (l_.half)
        k_.from_half(static_cast<const uint16_t*>(l_.x) + at, x, l_.hidden);
      else
        memcpy(x, static_cast<const float*>(l_.x) + at, sizeof(float) * l_.hidden);
      memset(x + l_.hidden, 0, sizeof(float) * (width_ - l_.hidden));
      for (int64_t r = 0; r < l_.gate_up.rank; r++)
        *x_low_.at(t * l_.gate_up.rank + r) = k_.dot(l_.gate_up.basis + r * l_.hidden, x, l_.hidden);
    });
  }

  // y[n] = scale[n] y[n]
  static void rescale(float* y, const float* scale, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] *= scale[i];
  }

  void hidden(const Product& up) {
    const Projection& p = l_.gate_up;
    const int64_t rows = p.coded.rows;
    // result() adds up an entry's parts, so it is called once for each of the mean's.
    std::vector<const float*> mean(p.mean ? tokens_ : 0);
    for (size_t t = 0; t < mean.size(); t++) mean[t] = up.result(routes_ + static_cast<int64_t>(t));
    parallel_.each(routes_, [&](int64_t i) noexcept {
      const int64_t e = expert_[i], t = token_[i];
      float* y = up.result(i);
      rescale(y, p.coded.scale + e * rows, rows);
      if (p.mean) k_.add_product(y, 1.0f, mean[t], p.mean.scale, rows);
      if (p.bias) k_.add(y, 1.0f, p.bias + e * rows, rows);
      if (p.rank)
        k_.add_coefficients(y, p.coef + e * rows * p.rank, p.coef_scale + e * rows, x_low_.at(t * p.rank), rows, p.rank);
      float* h = h_.at(i * inner_);
      k_.gate(l_.gating, y, h, l_.intermediate);
      memset(h + l_.intermediate, 0, sizeof(float) * (inner_ - l_.intermediate));
      const Projection& d = l_.down;
      if (!d.rank) return;
      float* low = h_low_.at(i * d.rank);
      memset(low, 0, sizeof(float) * d.rank);
      k_.add_coefficients(low, d.coef + e * d.rank * l_.intermediate, d.coef_scale + e * d.rank, h, d.rank, l_.intermediate);
    });
  }

  void sum_hidden() {
    parallel_.each(tokens_, [&](int64_t t) noexcept {
      float* sum = h_.at((routes_ + t) * inner_);
      memset(sum, 0, sizeof(float) * inner_);
      for (int64_t route = t * l_.top_k; route < (t + 1) * l_.top_k; route++)
        k_.add(sum, weight(route), h_.at(entry_[route] * inner_), inner_);
    });
  }

  void combine(const Product& down) {
    Buffer<float> sums(l_.half ? tokens_ * l_.hidden : 0);
    parallel_.each(tokens_, [&](int64_t t) noexcept {
      const int64_t d = l_.hidden, at = (first_ + t) * d;
      float* y = l_.half ? sums.at(t * d) : static_cast<float*>(y_) + at;
      memset(y, 0, sizeof(float) * d);
      for (int64_t route = t * l_.top_k; route < (t + 1) * l_.top_k; route++) add_route(down, y, route);
      if (!l_.post_norm) add_shared(down, y, t);
      if (l_.half) k_.to_half(y, static_cast<uint16_t*>(y_) + at, d);
    });
  }

  void add_route(const Product& down, float* y, int64_t route) const {
    const Projection& p = l_.down;
    const int64_t i = entry_[route], e = expert_[i], d = l_.hidden;
    float* one = down.result(i);
    if (!l_.post_norm) {
      k_.add_product(y, weight(route), one, p.coded.scale + e * d, d);
      if (p.bias) k_.add(y, weight(route), p.bias + e * d, d);
      return;
    }
    rescale(one, p.coded.scale + e * d, d);
    if (p.bias) k_.add(one, 1.0f, p.bias + e * d, d);
    for (int64_t r = 0; r < p.rank; r++) k_.add(one, *h_low_.at(i * p.rank + r), p.basis + r * d, d);
    if (p.mean) k_.add_product(one, 1.0f, down.result(routes_ + i), p.mean.scale, d);
    rescale(one, l_.post_norm, d);
    const float square = k_.dot(one, one, d) / static_cast<float>(d);
    k_.add(y, weight(route) / std::sqrt(square + l_.eps), one, d);
  }

  void add_shared(const Product& down, float* y, int64_t t) const {
    const Projection& p = l_.down;
    for (int64_t r = 0; r < p.rank; r++) {
      float sum = 0;
      for (int64_t route = t * l_.top_k; route < (t + 1) * l_.top_k; route++)
        sum += weight(route) * *h_low_.at(entry_[route] * p.rank + r);
      k_.add(y, sum, p.basis + r * l_.hidden, l_.hidden);
    }
    if (p.mean) k_.add_product(y, 1.0f, down.result(routes_ + t), p.mean.scale, l_.hidden);
  }

  const Layer& l_;
  const Kernels& k_;
  const Parallel& parallel_;
  const int64_t first_, tokens_, routes_;
  void* const y_;
  const int64_t width_, inner_;                                 // D and F in whole blocks
  // start_ by expert; expert_ and token_ by entry; entry_ by route; counting_ is 0, 1, 2...
  std::vector<int64_t> start_, expert_, token_, entry_, counting_;
  Buffer<float> x_, h_;  // [tokens, width]; [routes + tokens, inner], in the order of entries
  // Coordinates: [tokens, rank] in gate_up's basis, [routes, rank] in down's.
  Buffer<float> x_low_, h_low_;
};

}  // namespace

void run(const Layer& layer, const Kernels& kernels, const Parallel& parallel, void* y) {
  const int64_t step = std::max<int64_t>(ROUTES / layer.top_k, 1);
  for (int64_t t = 0; t < layer.tokens; t += step)
    Chunk(layer, kernels, parallel, t, std::min(step, layer.tokens - t), y).run();
}

}  // namespace moecc
