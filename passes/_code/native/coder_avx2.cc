// AVX2 and FMA: vectors of 8 floats.
#define LANES 8
#include "coder.h"

namespace moecc {
extern const MoeccCoder AVX2_CODER = {"avx2", choose, sweep, decode, pull};
}  // namespace moecc
