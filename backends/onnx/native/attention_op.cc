// moecc::CachedAttention: with Norm in its name, queries and keys are normed; with Rope, rotated.
#include "attention.h"
#include "custom_op.h"

namespace moecc {
namespace {

class CachedAttention {
 public:
  CachedAttention(const Op& op, const Attributes& a)
      : op_(op), kernels_(choose_kernels()), scale_(a.number("scale")), eps_(a.number("eps")),
        interleaved_(a.integer("interleaved") != 0) {}

  void compute(const ort::Api& api, OrtKernelContext* context) const {
    const Attention a = read(Reader(api, context));
    void* y = output(api, context, 0, {a.batch, a.tokens, a.heads * a.value_width});
    void* key = output(api, context, 1, {a.batch, a.groups, a.present_room, a.width});
    void* value = output(api, context, 2, {a.batch, a.groups, a.present_room, a.value_width});
    with_threads(api, context, a.small(), [&](const Parallel& parallel) { attend(a, kernels_, parallel, y, key, value); });
  }

 private:
  Attention read(const Reader& inputs) const {
    size_t next = 0;
    const auto get = [&](bool may_be_empty = false) {
      const size_t i = next++;
      return inputs.get(i, op_.inputs[i], may_be_empty);
    };
    const Tensor rows = get(), past_key = get(true), past_value = get(true), mask = get();
    rows.expect_rank(3, "[B, S, row width]");
    past_key.expect_rank(4, "[B, G, P, d]");
    past_value.expect_rank(4, "[B, G, P, e]");
    Attention a;
    a.half = op_.half;
    a.scale = scale_;
    a.eps = eps_;
    a.interleaved = interleaved_;
    a.batch = rows.shape[0];
    a.tokens = rows.shape[1];
    a.groups = past_key.shape[1];
    a.past_room = past_key.shape[2];
    a.width = past_key.shape[3];
    a.value_width = past_value.shape[3];
    if (a.groups < 1 || a.width < 1 || a.value_width < 1) throw Invalid("past_key or past_value has no heads or channels");
    a.rows = rows.data;
    a.past_key = past_key.as<void>({a.batch, a.groups, a.past_room, a.width});
    a.past_value = past_value.as<void>({a.batch, a.groups, a.past_room, a.value_width});
    const int64_t queries = rows.shape[2] - a.groups * (a.width + a.value_width);
    a.heads = queries / a.width;
    if (queries < 1 || queries % a.width || a.heads % a.groups)
      throw Invalid("rows has shape " + text(rows.shape) + ", which leaves no whole heads of queries beside past_key " +
                    text(past_key.shape) + " and past_value " + text(past_value.shape));
    mask.expect_rank(4, "[B or 1, H or 1, S, P + S]");
    a.past = mask.shape[3] - a.tokens;
    // A cache with room for the new tokens keeps its size, a full one grows.
    a.present_room = a.past_room == a.past ? a.total() : a.past_room;
    if (a.past < 0 || a.present_room < a.total())
      throw Invalid("past_key has room for " + std::to_string(a.past_room) + " tokens, mask " + text(mask.shape) + " is of " +
                    std::to_string(a.past) + " past and " + std::to_string(a.tokens) + " new ones");
    a.mask_per_row = mask.shape[0] != 1;
    a.mask_per_head = mask.shape[1] != 1;
    a.mask = mask.as<uint8_t>({a.mask_per_row ? a.batch : 1, a.mask_per_head ? a.heads : 1, a.tokens, a.total()});
    if (op_.name.find("Norm") != std::string::npos) {
      a.q_norm = get().as<void>({a.width});
      a.k_norm = get().as<void>({a.width});
    }
    if (op_.name.find("Rope") != std::string::npos) {
      const Tensor cos = get(), sin = get();
      cos.expect_rank(3, "[B, S, angles]");
      a.angles = cos.shape[2];
      if (2 * a.angles > a.width) throw Invalid("cos has shape " + text(cos.shape) + ", more angles than pairs of channels");
      a.cos = cos.as<void>({a.batch, a.tokens, a.angles});
      a.sin = sin.as<void>({a.batch, a.tokens, a.angles});
    }
    return a;
  }

  const Op& op_;
  const Kernels& kernels_;
  float scale_, eps_;
  bool interleaved_;
};

}  // namespace

std::vector<Op> attention_ops() {
  std::vector<Op> ops;
  for (const bool half : {false, true})
    for (const bool normed : {false, true})
      for (const bool rotated : {false, true}) {
        const int type = half ? ort::FLOAT16 : ort::FLOAT;
        std::string name = "CachedAttention";
        std::vector<Input> inputs{{"rows", type}, {"past_key", type}, {"past_value", type}, {"mask", ort::BOOL}};
        if (normed) {
          name += "Norm";
          for (const char* n : {"q_norm", "k_norm"}) inputs.push_back({n, type});
        }
        if (rotated) {
          name += "Rope";
          for (const char* n : {"cos", "sin"}) inputs.push_back({n, type});
        }
        ops.push_back(make_op<CachedAttention>(name, inputs, {{"y", type}, {"present_key", type}, {"present_value", type}}, half));
      }
  return ops;
}

}  // namespace moecc
