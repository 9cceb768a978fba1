// Which kernels run: the best ones for the CPU, or those that the environment variable MOECC_ISA
// names.
#pragma once
#include "kernels.h"

namespace moecc {

// Throws Invalid if MOECC_ISA names kernels that this CPU or this build does not have.
const Kernels& choose_kernels();

}  // namespace moecc
