// moecc::VQExperts: one kernel for float32 and one for float16.
#include "custom_op.h"
#include "inputs.h"

namespace moecc {
namespace {

class Experts {
 public:
  Experts(const Op& op, const Attributes& a)
      : half_(op.half), kernels_(choose_kernels()),
        gating_(gating(a.string("act"), a.string("gate"), a.number("alpha"), a.number("limit"))), eps_(a.number("eps")) {}

  void compute(const ort::Api& api, OrtKernelContext* context) const {
    const Layer layer = read(api, context, half_, gating_, eps_);
    void* y = output(api, context, 0, {layer.tokens, layer.hidden});
    with_threads(api, context, layer.small(), [&](const Parallel& parallel) { run(layer, kernels_, parallel, y); });
  }

 private:
  bool half_;
  const Kernels& kernels_;
  Gating gating_;
  float eps_;
};

}  // namespace

std::vector<Op> experts_ops() {
  std::vector<Op> ops;
  for (const bool half : {false, true}) {
    std::vector<Input> inputs;
    for (size_t i = 0; i < INPUTS; i++) inputs.push_back(input(i, half));
    ops.push_back(make_op<Experts>("VQExperts", inputs, {{"y", inputs[0].type}}, half));
  }
  return ops;
}

}  // namespace moecc
