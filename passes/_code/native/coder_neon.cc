// AArch64: vectors of 4 floats.
#define LANES 4
#include "coder.h"

namespace moecc {
extern const MoeccCoder NEON_CODER = {"neon", choose, sweep, decode, pull};
}  // namespace moecc
