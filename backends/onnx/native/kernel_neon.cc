// 64-bit ARM: the float kernels in vectors of four, with 32 registers.
#define LANES 4
#define ROWS 4
#include <arm_neon.h>

#include "attend.h"
#include "floats.h"
#include "gates.h"
#include "half.h"

namespace moecc {
namespace {

void from_half(const uint16_t* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) vst1q_f32(y + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x + i))));
  from_half_portable(x + i, y + i, n - i);
}

void to_half(const float* x, uint16_t* y, int64_t n) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) vst1_u16(y + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(x + i))));
  to_half_portable(x + i, y + i, n - i);
}

}  // namespace

extern const Kernels NEON_KERNELS = {
    "neon", 3, 1, 0, lookup, nullptr, nullptr, multiply, apply_gate, add_coefficients, dot, add, add_product, scores, mix,
    softmax, from_half, to_half,
};
}  // namespace moecc
