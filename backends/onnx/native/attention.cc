// The steps of attention:
//
//   1. the past is copied, with the room behind it, and the new keys and values are written behind
//      it; queries and keys are normed and rotated
//   2. the queries of one group of heads share its keys: ROWS of them at a time are scored, masked
//      and mixed. Keys that none of them may see are left out
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "buffer.h"

namespace moecc {
namespace {

constexpr int64_t ROWS = 16;   // queries at a time
constexpr int64_t KEYS = 64;   // at a time, so that they stay in the L1 cache
constexpr int64_t WORKERS = 64;  // more than there are threads

class Run {
 public:
  Run(const Attention& a, const Kernels& kernels, const Parallel& parallel, void* y, void* key, void* value)
      : a_(a), k_(kernels), parallel_(parallel), y_(y), key_(key), value_(value), per_group_(a.heads / a.groups),
        q_(a.batch * a.heads * a.tokens * a.width), one_(groups() * a.width), q_norm_(a.width), k_norm_(a.width),
        angles_(2 * a.batch * a.tokens * a.angles), wide_key_(a.half ? groups() * a.total() * a.width : 0),
        wide_value_(a.half ? groups() * a.total() * a.value_width : 0) {}

  void run() {
    widen(a_.q_norm, q_norm_.at(0), a_.width);
    widen(a_.k_norm, k_norm_.at(0), a_.width);
    widen(a_.cos, cos(0), a_.batch * a_.tokens * a_.angles);
    widen(a_.sin, sin(0), a_.batch * a_.tokens * a_.angles);
    parallel_.each(groups(), [&](int64_t i) noexcept { append(i / a_.groups, i % a_.groups); });
    const int64_t queries = per_group_ * a_.tokens, pieces = (queries + ROWS - 1) / ROWS;
    const int64_t count = groups() * pieces, workers = std::min(count, WORKERS);
    const int64_t room = ROWS * (a_.total() + a_.value_width);
    // By worker: memory for all pieces would grow with the square of the tokens.
    Buffer<float> scratch(workers * room);
    parallel_.each(workers, [&](int64_t worker) noexcept {
      for (int64_t i = worker; i < count; i += workers) {
        const int64_t first = i % pieces * ROWS;
        attend(i / pieces, first, std::min(ROWS, queries - first), scratch.at(worker * room));
      }
    });
  }

 private:
  int64_t groups() const { return a_.batch * a_.groups; }
  float* cos(int64_t token) const { return angles_.at(token * a_.angles); }
  float* sin(int64_t token) const { return angles_.at((a_.batch * a_.tokens + token) * a_.angles); }
  int64_t bytes() const { return a_.half ? 2 : 4; }

  void widen(const void* from, float* to, int64_t n) const {
    if (!from) return;
    if (a_.half)
      k_.from_half(static_cast<const uint16_t*>(from), to, n);
    else
      memcpy(to, from, sizeof(float) * n);
  }
  void narrow(const float* from, void* to, int64_t n) const {
    if (a_.half)
      k_.to_half(from, static_cast<uint16_t*>(to), n);
    else
      memcpy(to, from, sizeof(float) * n);
  }
  static const void* at(const void* p, int64_t bytes) { return static_cast<const char*>(p) + bytes; }
  static void* at(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }

  // Keys of group i.
  void* key_of(int64_t i) const { return at(key_, i * a_.present_room * a_.width * bytes()); }
  void* value_of(int64_t i) const { return at(value_, i * a_.present_room * a_.value_width * bytes()); }

  // Reads one head of a token, from `channel` of its rows on, to x [width] in float32, normed and
  // rotated.
  void prepare(int64_t token, int64_t channel, const float* norm, float* x) const {
    widen(at(a_.rows, (token * a_.row_width() + channel) * bytes()), x, a_.width);
    if (norm) {
      const float factor = 1.0f / std::sqrt(k_.dot(x, x, a_.width) / static_cast<float>(a_.width) + a_.eps);
      for (int64_t i = 0; i < a_.width; i++) x[i] *= factor * norm[i];
    }
    const float *c = cos(token), *s = sin(token);
    const int64_t n = a_.angles, step = a_.interleaved ? 2 : 1, other = a_.interleaved ? 1 : n;
    for (int64_t i = 0; i < n; i++) {
      const float u = x[i * step], v = x[i * step + other];
      x[i * step] = u * c[i] - v * s[i];
      x[i * step + other] = v * c[i] + u * s[i];
    }
  }

  // Copies one group of the past but for the place of the new tokens: room behind them too, so that
  // no output holds what was in memory before.
  void copy(const void* past, void* present, int64_t channels) const {
    const int64_t token = channels * bytes(), total = a_.total();
    memcpy(present, past, a_.past * token);
    if (a_.present_room > total) memcpy(at(present, total * token), at(past, total * token), (a_.present_room - total) * token);
  }

  // Prepares one group: appends to its cache, makes its queries.
  void append(int64_t row, int64_t group) const {
    const int64_t i = row * a_.groups + group, d = a_.width, e = a_.value_width, past = a_.past, total = a_.total();
    void *key = key_of(i), *value = value_of(i);
    if (key_ != a_.past_key) copy(at(a_.past_key, i * a_.past_room * d * bytes()), key, d);
    if (value_ != a_.past_value) copy(at(a_.past_value, i * a_.past_room * e * bytes()), value, e);
    float* q = q_.at(i * per_group_ * a_.tokens * d);
    float* one = one_.at(i * d);
    for (int64_t t = 0; t < a_.tokens; t++) {
      const int64_t token = row * a_.tokens + t, keys = a_.heads * d, values = keys + a_.groups * d;
      prepare(token, keys + group * d, a_.k_norm ? k_norm_.at(0) : nullptr, one);
      narrow(one, at(key, (past + t) * d * bytes()), d);
      memcpy(at(value, (past + t) * e * bytes()), at(a_.rows, (token * a_.row_width() + values + group * e) * bytes()), e * bytes());
      for (int64_t h = 0; h < per_group_; h++, q += d) {
        prepare(token, (group * per_group_ + h) * d, a_.q_norm ? q_norm_.at(0) : nullptr, q);
        for (int64_t j = 0; j < d; j++) q[j] *= a_.scale;
      }
    }
    if (!a_.half) return;
    widen(key, wide_key_.at(i * total * d), total * d);
    widen(value, wide_value_.at(i * total * e), total * e);
  }

  // Says which keys query `q` (token, then head) of a group sees.
  const uint8_t* mask(int64_t i, int64_t q) const {
    const int64_t row = i / a_.groups, head = i % a_.groups * per_group_ + q % per_group_;
    const int64_t plane = (a_.mask_per_row ? row : 0) * (a_.mask_per_head ? a_.heads : 1) + (a_.mask_per_head ? head : 0);
    return a_.mask + (plane * a_.tokens + q / per_group_) * a_.total();
  }

  // Computes queries first..first+n-1 of group i. scratch: [ROWS, total] scores,
  // [ROWS, value_width] results.
  void attend(int64_t i, int64_t first, int64_t n, float* scratch) const {
    const int64_t d = a_.width, e = a_.value_width, total = a_.total();
    const float* key = a_.half ? wide_key_.at(i * total * d) : static_cast<const float*>(key_of(i));
    const float* value = a_.half ? wide_value_.at(i * total * e) : static_cast<const float*>(value_of(i));
    const float* q = q_.at((i * per_group_ * a_.tokens + first) * d);
    float *scores = scratch, *y = scratch + ROWS * total;
    int64_t from = total, to = 0;  // keys that any of the queries sees
    for (int64_t r = 0; r < n; r++) {
      const uint8_t *seen = mask(i, first + r), *end = seen + total;
      from = std::min<int64_t>(from, std::find_if(seen, end, [](uint8_t m) { return m; }) - seen);
      while (end > seen + to && !end[-1]) end--;
      to = std::max<int64_t>(to, end - seen);
    }
    for (int64_t t = from; t < to; t += KEYS) k_.scores(q, n, key + t * d, std::min(KEYS, to - t), d, scores + t, total);
    memset(y, 0, sizeof(float) * n * e);
    for (int64_t r = 0; r < n && from < to; r++) k_.softmax(scores + r * total + from, mask(i, first + r) + from, to - from);
    for (int64_t t = from; t < to; t += KEYS)
      k_.mix(scores + t, total, n, value + t * e, std::min(KEYS, to - t), e, y);
    for (int64_t r = 0; r < n; r++) {
      const int64_t token = i / a_.groups * a_.tokens + (first + r) / per_group_;
      const int64_t head = i % a_.groups * per_group_ + (first + r) % per_group_;
      narrow(y + r * e, at(y_, (token * a_.heads + head) * e * bytes()), e);
    }
  }

  const Attention& a_;
  const Kernels& k_;
  const Parallel& parallel_;
  void *const y_, *const key_, *const value_;
  const int64_t per_group_;                // heads of queries per head of keys
  Buffer<float> q_;                        // [batch, groups, tokens, per_group, width]
  Buffer<float> one_;                      // [batch, groups, width]: the key in the making
  Buffer<float> q_norm_, k_norm_, angles_; // in float32; all cosines, all sines
  Buffer<float> wide_key_, wide_value_;    // the whole cache in float32, if it is float16
};

}  // namespace

void attend(const Attention& a, const Kernels& kernels, const Parallel& parallel, void* y, void* present_key, void* present_value) {
  Run(a, kernels, parallel, y, present_key, present_value).run();
}

}  // namespace moecc
