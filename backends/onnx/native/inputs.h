// From the inputs of VQExperts to a Layer. Every shape is checked here, so that no later code can
// read out of bounds.
#pragma once
#include <string>

#include "layer.h"
#include "reader.h"

namespace moecc {

// 0 x, 1 topk_index, 2 topk_weight, 3.. gate_up, 15.. down (both in the order of vq4.TENSORS),
// 27 post_norm
constexpr size_t INPUTS = 28, PROJECTION = 12;

const Input& input(size_t i, bool half);

// Throws Invalid if moecc/ir/gates.py does not have a name.
Gating gating(const std::string& act, const std::string& gate, float alpha, float limit);

// Throws Invalid if shapes do not fit each other or an expert's index is out of range.
Layer read(const ort::Api& api, const OrtKernelContext* context, bool half, const Gating& gating, float eps);

}  // namespace moecc
