#include "inputs.h"

#include <initializer_list>
#include <vector>

namespace moecc {
namespace {

using Shape = std::vector<int64_t>;

std::string text(const Shape& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); i++) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

constexpr const char* TENSORS[PROJECTION] = {
    "codes", "signs", "codebook", "scale", "bias", "basis", "coef", "coef_scale",
    "mean_codes", "mean_signs", "mean_codebook", "mean_scale",
};

std::string name_of(size_t i) {
  if (i < 3) return i == 0 ? "x" : i == 1 ? "topk_index" : "topk_weight";
  if (i == INPUTS - 1) return "post_norm";
  return std::string(i < 3 + PROJECTION ? "gate_up_" : "down_") + TENSORS[(i - 3) % PROJECTION];
}

struct Tensor {
  std::string name;
  const void* data = nullptr;  // null: absent
  Shape shape;

  explicit operator bool() const { return data; }
  void expect(const Shape& wanted) const {
    if (shape != wanted) throw Invalid(name + " has shape " + text(shape) + ", expected " + text(wanted));
  }
  template <class T>
  const T* as(const Shape& wanted) const {
    expect(wanted);
    return static_cast<const T*>(data);
  }
};

class Reader {
 public:
  Reader(const ort::Api& api, const OrtKernelContext* context, bool half) : api_(api), context_(context), half_(half) {
    api.check(ort::KernelContext_GetInputCount, context, &count_);
  }

  // A tensor without elements counts as absent, unless it may have none.
  Tensor get(size_t i, bool may_be_empty = false) const {
    Tensor t{name_of(i), nullptr, {}};
    const OrtValue* value = nullptr;
    if (i < count_) api_.check(ort::KernelContext_GetInput, context_, i, &value);
    if (value) read(i, value, may_be_empty, t);
    if (!t && required(i)) throw Invalid(t.name + " is missing");
    return t;
  }

 private:
  void read(size_t i, const OrtValue* value, bool may_be_empty, Tensor& t) const {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    api_.check(ort::GetTensorTypeAndShape, value, &info);
    int type = 0;
    size_t rank = 0;
    OrtStatus* failed = api_.status(ort::GetTensorElementType, const_cast<const OrtTensorTypeAndShapeInfo*>(info), &type);
    if (!failed) failed = api_.status(ort::GetDimensionsCount, const_cast<const OrtTensorTypeAndShapeInfo*>(info), &rank);
    int64_t dims[8] = {};
    if (!failed && rank <= 8)
      failed = api_.status(ort::GetDimensions, const_cast<const OrtTensorTypeAndShapeInfo*>(info), &dims[0], rank);
    api_.release(ort::ReleaseTensorTypeAndShapeInfo, info);
    if (failed) throw ort::Failed{failed};
    if (rank > 8) throw Invalid(t.name + " has " + std::to_string(rank) + " dimensions");
    if (type != input_type(i, half_)) throw Invalid(t.name + " has the wrong element type");
    t.shape.assign(dims, dims + rank);
    int64_t elements = 1;
    for (int64_t d : t.shape) elements *= d;
    if (!elements && !may_be_empty) return;
    static const char nothing = 0;
    void* data = nullptr;
    api_.check(ort::GetTensorMutableData, const_cast<OrtValue*>(value), &data);
    t.data = data ? data : &nothing;
  }

  const ort::Api& api_;
  const OrtKernelContext* context_;
  size_t count_ = 0;
  bool half_;
};

// Four inputs from `first` on: codes, signs, codebook, scale of [experts, rows, columns]; rows -1: as scale has it.
Matrix read_matrix(const Reader& inputs, size_t first, int64_t experts, int64_t rows, int64_t columns) {
  const Tensor codes = inputs.get(first), signs = inputs.get(first + 1);
  const Tensor codebook = inputs.get(first + 2), scale = inputs.get(first + 3);
  Matrix m;
  if (!codes) return m;  // absent, whatever else is there: a model that has it in other layers only gives an empty one
  for (const Tensor* t : {&codebook, &scale})
    if (!*t) throw Invalid(t->name + " is missing");
  if (rows < 0) {
    if (scale.shape.size() != 2) throw Invalid(scale.name + " has shape " + text(scale.shape) + ", expected [E, N]");
    rows = scale.shape[1];
  }
  const bool shaped = codebook.shape.size() == 3 && (codebook.shape[0] == 1 || codebook.shape[0] == experts) &&
                      codebook.shape[1] == 256 && (codebook.shape[2] == 2 || codebook.shape[2] == 4);
  if (!shaped)
    throw Invalid(codebook.name + " has shape " + text(codebook.shape) + ", expected [1 or " + std::to_string(experts) +
                  ", 256, 2 or 4]");
  m.books = codebook.shape[0];
  m.v = codebook.shape[2];
  m.rows = rows;
  m.columns = columns;
  m.codebook = static_cast<const int8_t*>(codebook.data);
  m.scale = scale.as<float>({experts, rows});
  m.codes = codes.as<uint8_t>({experts, blocks(columns), blocks(rows), BLOCK / m.v, BLOCK});
  if (signs) {
    if (m.v != 4) throw Invalid(signs.name + " is given with a codebook of pairs; only groups of four have signs");
    m.signs = signs.as<uint8_t>({experts, blocks(columns), blocks(rows), BLOCK, BLOCK / 8});
  }
  return m;
}

Projection read_projection(const Reader& inputs, size_t first, int64_t experts, int64_t hidden, int64_t rows, int64_t columns) {
  const bool input_side = rows < 0;
  Projection p;
  p.coded = read_matrix(inputs, first, experts, rows, columns);
  rows = p.coded.rows;
  if (const Tensor bias = inputs.get(first + 4)) p.bias = bias.as<float>({experts, rows});
  const Tensor basis = inputs.get(first + 5), coef = inputs.get(first + 6), coef_scale = inputs.get(first + 7);
  if (basis && !(coef && coef_scale))
    throw Invalid(basis.name + ", " + coef.name + " and " + coef_scale.name + " must be given together");
  if (basis) {
    if (basis.shape.size() != 2) throw Invalid(basis.name + " has shape " + text(basis.shape) + ", expected [r, D]");
    p.rank = basis.shape[0];
    p.basis = basis.as<float>({p.rank, hidden});
    p.coef = input_side ? coef.as<int8_t>({experts, rows, p.rank}) : coef.as<int8_t>({experts, p.rank, columns});
    p.coef_scale = coef_scale.as<float>({experts, input_side ? rows : p.rank});
  }
  p.mean = read_matrix(inputs, first + 8, 1, rows, columns);
  return p;
}

template <class E>
struct Named {
  const char* name;
  E value;
};

template <class E, size_t N>
E find(const char* what, const std::string& name, const Named<E> (&all)[N]) {
  std::string names;
  for (const Named<E>& one : all) {
    if (name == one.name) return one.value;
    names += (names.empty() ? "" : ", ") + std::string(one.name);
  }
  throw Invalid(std::string(what) + " '" + name + "' is unknown; known are " + names);
}

}  // namespace

Gating gating(const std::string& act, const std::string& gate, float alpha, float limit) {
  static constexpr Named<Act> ACTS[] = {
      {"silu", Act::SILU},   {"gelu", Act::GELU},       {"gelu_tanh", Act::GELU_TANH}, {"relu", Act::RELU},
      {"relu2", Act::RELU2}, {"sigmoid", Act::SIGMOID}, {"tanh", Act::TANH},           {"identity", Act::IDENTITY},
  };
  static constexpr Named<Gate> GATES[] = {  // in float32 what works there and what works in x's type are the same
      {"none", Gate::NONE},       {"glu", Gate::GLU},         {"f32", Gate::GLU},
      {"clamp", Gate::CLAMP},     {"clamp_f32", Gate::CLAMP}, {"clamp_after", Gate::CLAMP_AFTER},
      {"oai", Gate::OAI},         {"softcap", Gate::SOFTCAP},
  };
  return {find("act", act, ACTS), find("gate", gate, GATES), alpha, limit};
}

Layer read(const ort::Api& api, const OrtKernelContext* context, bool half, const Gating& gating, float eps) {
  const Reader inputs(api, context, half);
  const Tensor x = inputs.get(0, true), index = inputs.get(1, true), weight = inputs.get(2, true), codes = inputs.get(3);
  Layer layer;
  layer.half = half;
  layer.gating = gating;
  layer.eps = eps;
  if (x.shape.size() != 2 || x.shape[1] < 1) throw Invalid("x has shape " + text(x.shape) + ", expected [tokens, D]");
  layer.tokens = x.shape[0];
  layer.hidden = x.shape[1];
  if (index.shape.size() != 2 || index.shape[0] != layer.tokens || index.shape[1] < 1)
    throw Invalid("topk_index has shape " + text(index.shape) + ", expected [" + std::to_string(layer.tokens) + ", k]");
  layer.top_k = index.shape[1];
  layer.x = x.data;
  layer.index = static_cast<const int64_t*>(index.data);
  layer.weight = weight.as<float>(index.shape);
  if (codes.shape.size() != 5) throw Invalid(codes.name + " has shape " + text(codes.shape) + ", expected five dimensions");
  layer.experts = codes.shape[0];
  for (int64_t i = 0; i < layer.tokens * layer.top_k; i++)
    if (layer.index[i] < 0 || layer.index[i] >= layer.experts)
      throw Invalid("topk_index " + std::to_string(layer.index[i]) + " is outside 0.." + std::to_string(layer.experts - 1));
  layer.gate_up = read_projection(inputs, 3, layer.experts, layer.hidden, -1, layer.hidden);
  const int64_t rows = layer.gate_up.coded.rows;
  if (gating.gate != Gate::NONE && rows % 2)
    throw Invalid("gate_up_scale has " + std::to_string(rows) + " rows, a gate needs an even number");
  layer.intermediate = gating.gate == Gate::NONE ? rows : rows / 2;
  layer.down = read_projection(inputs, 3 + PROJECTION, layer.experts, layer.hidden, layer.hidden, layer.intermediate);
  if (const Tensor norm = inputs.get(INPUTS - 1)) layer.post_norm = norm.as<float>({layer.hidden});
  return layer;
}

}  // namespace moecc
