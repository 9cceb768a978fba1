// From the op's inputs to a Layer: every shape is checked here, so that nothing behind it can read out of bounds.
#pragma once
#include <stdexcept>
#include <string>

#include "abi.h"
#include "layer.h"

namespace moecc {

struct Invalid : std::invalid_argument {  // what() is for the user
  using std::invalid_argument::invalid_argument;
};

// 0 x, 1 topk_index, 2 topk_weight, 3.. gate_up, 15.. down (each in the order of vq4.TENSORS), 27 post_norm
constexpr size_t INPUTS = 28, PROJECTION = 12;

constexpr int input_type(size_t i, bool half) {
  if (i == 0) return half ? ort::FLOAT16 : ort::FLOAT;
  if (i == 1) return ort::INT64;
  if (i == 2 || i == INPUTS - 1) return ort::FLOAT;
  constexpr int types[PROJECTION] = {
      ort::UINT8, ort::UINT8, ort::INT8, ort::FLOAT,  // codes, signs, codebook, scale
      ort::FLOAT, ort::FLOAT, ort::INT8, ort::FLOAT,  // bias, basis, coef, coef_scale
      ort::UINT8, ort::UINT8, ort::INT8, ort::FLOAT,  // those of the mean
  };
  return types[(i - 3) % PROJECTION];
}

constexpr bool required(size_t i) {
  if (i < 3) return true;
  if (i == INPUTS - 1) return false;
  const size_t of = (i - 3) % PROJECTION;
  return of == 0 || of == 2 || of == 3;
}

// Invalid where a name is none that moecc/gates.py has.
Gating gating(const std::string& act, const std::string& gate, float alpha, float limit);

// Invalid where shapes do not fit each other or an expert's index is out of range.
Layer read(const ort::Api& api, const OrtKernelContext* context, bool half, const Gating& gating, float eps);

}  // namespace moecc
