// Any CPU: the float kernels, compiled without flags.
#define LANES 4
#define ROWS 2
#include "attend.h"
#include "floats.h"
#include "gates.h"
#include "half.h"

namespace moecc {
extern const Kernels SCALAR_KERNELS = {
    "scalar", 3, 1, 0, lookup, nullptr, nullptr, multiply, apply_gate, add_coefficients, dot, add, add_product, scores, mix, softmax,
    from_half_portable, to_half_portable,
};
}  // namespace moecc
