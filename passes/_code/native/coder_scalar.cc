// Any CPU: vectors of 4 floats.
#define LANES 4
#include "coder.h"

namespace moecc {
extern const MoeccCoder SCALAR_CODER = {"scalar", choose, sweep, decode, pull};
}  // namespace moecc
