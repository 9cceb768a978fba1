// moecc::CausalMask, which backends/onnx/rewrites/masks.py defines.
#include <algorithm>
#include <cstring>

#include "custom_op.h"

namespace moecc {
namespace {

class CausalMask {
 public:
  CausalMask(const Op& op, const Attributes& a) : op_(op), window_(a.integer("window")) {
    if (window_ < 1) throw Invalid("window is " + std::to_string(window_) + ", expected 1 or more");
  }

  void compute(const ort::Api& api, OrtKernelContext* context) const {
    const Reader inputs(api, context);
    const Tensor ids = inputs.get(0, op_.inputs[0], true), counts = inputs.get(1, op_.inputs[1], true);
    ids.expect_rank(2, "[B, S]");
    counts.expect_rank(2, "[B, T]");
    const int64_t batch = ids.shape[0], tokens = ids.shape[1], total = counts.shape[1];
    if (total < tokens)
      throw Invalid("attention_mask has shape " + text(counts.shape) + ", which is of fewer tokens than input_ids " + text(ids.shape));
    const int64_t* counted = counts.as<int64_t>({batch, total});
    auto* y = static_cast<uint8_t*>(output(api, context, 0, {batch, 1, tokens, total}));
    for (int64_t b = 0; b < batch; b++, counted += total)
      for (int64_t place = total - tokens; place < total; place++, y += total) {
        const int64_t first = std::max<int64_t>(place + 1 - window_, 0);
        memset(y, 0, static_cast<size_t>(total));
        for (int64_t t = first; t <= place; t++) y[t] = counted[t] != 0;
      }
  }

 private:
  const Op& op_;
  int64_t window_;
};

}  // namespace

std::vector<Op> mask_ops() {
  std::vector<Op> ops;
  ops.push_back(make_op<CausalMask>("CausalMask", {{"input_ids", ort::INT64}, {"attention_mask", ort::INT64}}, {{"y", ort::BOOL}}, false));
  return ops;
}

}  // namespace moecc
