// AVX-512F: vectors of 16 floats.
#define LANES 16
#include "coder.h"

namespace moecc {
extern const MoeccCoder AVX512_CODER = {"avx512", choose, sweep, decode, pull};
}  // namespace moecc
