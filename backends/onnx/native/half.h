// float16 in integer arithmetic, for instruction sets without a conversion. For kernel files (see
// kernels.h).
#pragma once
#include <cstdint>
#include <cstring>

namespace moecc {
namespace {

inline float half_value(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = h & 0x7fffu;
  uint32_t bits = (rest << 13) + (112u << 23);  // exponent bias 15 -> 127
  float value;
  if (rest >= 0x7c00u) bits += 112u << 23;  // infinity, NaN
  if (rest < 0x0400u) {                     // subnormal: a whole number of 2^-24
    value = static_cast<float>(rest) * 5.9604644775390625e-8f;
    memcpy(&bits, &value, sizeof bits);
  }
  bits |= sign;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t half_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  // 65520 and more round to infinity.
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  // Below 2^-14, adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded to even.
  if (bits < 0x38800000u) {
    float magnitude;
    memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xfffu + (bits >> 13 & 1u);  // to nearest, ties to even
  return static_cast<uint16_t>(sign | ((bits - (112u << 23)) >> 13));
}

inline void from_half_portable(const uint16_t* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = half_value(x[i]);
}

inline void to_half_portable(const float* x, uint16_t* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = half_bits(x[i]);
}

}  // namespace
}  // namespace moecc
