// Activations and gates of moecc/ir/gates.py in float32, as loops that a compiler vectorises. For
// kernel files (see kernels.h).
#pragma once
#include <math.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace moecc {
namespace {

// e^x to 2 units in the last place: 2^n p(r), r = x - n ln 2 in +-ln(2)/2. Beyond float's range it
// is the nearest power within, so that sums and quotients stay finite. NaN stays NaN.
inline float exponential(float x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: a float of this size has its unit in the last bit
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  float n = x * 1.44269504f + shift;
  uint32_t bits;
  memcpy(&bits, &n, sizeof bits);
  n -= shift;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  bits = (bits - 0x4b400000u + 127u) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
inline float at_most(float x, float limit) { return x > limit ? limit : x; }  // NaN stays
inline float within(float x, float limit) { return at_most(x < -limit ? -limit : x, limit); }

template <Act A>
inline float activation(float x) {
  switch (A) {
    case Act::SILU: return x * sigmoid(x);
    case Act::GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    // 0.5 (1 + tanh(u)) = sigmoid(2 u)
    case Act::GELU_TANH: return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
    case Act::RELU: return x < 0.0f ? 0.0f : x;
    case Act::RELU2: return x < 0.0f ? 0.0f : x * x;
    case Act::SIGMOID: return sigmoid(x);
    case Act::TANH: return tanhf(x);
    case Act::IDENTITY: return x;
  }
  return x;
}

template <Act A>
void gate_with(const Gating& g, const float* rows, float* h, int64_t f) {
  const float* up = rows + f;
  const float limit = g.limit;
  switch (g.gate) {
    case Gate::NONE:
      for (int64_t i = 0; i < f; i++) h[i] = activation<A>(rows[i]);
      return;
    case Gate::GLU:
      for (int64_t i = 0; i < f; i++) h[i] = activation<A>(rows[i]) * up[i];
      return;
    case Gate::CLAMP:
      for (int64_t i = 0; i < f; i++) h[i] = activation<A>(at_most(rows[i], limit)) * within(up[i], limit);
      return;
    case Gate::CLAMP_AFTER:
      for (int64_t i = 0; i < f; i++) h[i] = at_most(activation<A>(rows[i]), limit) * within(up[i], limit);
      return;
    default: return;
  }
}

void apply_gate(const Gating& g, const float* rows, float* h, int64_t f) {
  const float* up = rows + f;
  const float alpha = g.alpha, limit = g.limit;
  if (g.gate == Gate::OAI) {
    for (int64_t i = 0; i < f; i++) {
      const float x = at_most(rows[i], limit);
      h[i] = (within(up[i], limit) + 1.0f) * (x * sigmoid(x * alpha));
    }
    return;
  }
  if (g.gate == Gate::SOFTCAP) {
    for (int64_t i = 0; i < f; i++)
      h[i] = tanhf(rows[i] / alpha) * alpha * sigmoid(rows[i]) * (tanhf(up[i] / limit) * limit);
    return;
  }
  switch (g.act) {
    case Act::SILU: return gate_with<Act::SILU>(g, rows, h, f);
    case Act::GELU: return gate_with<Act::GELU>(g, rows, h, f);
    case Act::GELU_TANH: return gate_with<Act::GELU_TANH>(g, rows, h, f);
    case Act::RELU: return gate_with<Act::RELU>(g, rows, h, f);
    case Act::RELU2: return gate_with<Act::RELU2>(g, rows, h, f);
    case Act::SIGMOID: return gate_with<Act::SIGMOID>(g, rows, h, f);
    case Act::TANH: return gate_with<Act::TANH>(g, rows, h, f);
    case Act::IDENTITY: return gate_with<Act::IDENTITY>(g, rows, h, f);
  }
}

}  // namespace
}  // namespace moecc
