// Which kernels run: the best that the CPU has, or those that the environment variable MOECC_ISA names.
#pragma once
#include "kernels.h"

namespace moecc {

// Invalid where MOECC_ISA names what this CPU or this build does not have.
const Kernels& choose_kernels();

}  // namespace moecc
