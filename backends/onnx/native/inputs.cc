#include "inputs.h"

namespace moecc {
namespace {

constexpr Input FLOATS[INPUTS] = {
    {"x", ort::FLOAT}, {"topk_index", ort::INT64}, {"topk_weight", ort::FLOAT},
    {"gate_up_codes", ort::UINT8}, {"gate_up_signs", ort::UINT8, false}, {"gate_up_codebook", ort::INT8},
    {"gate_up_scale", ort::FLOAT}, {"gate_up_bias", ort::FLOAT, false}, {"gate_up_basis", ort::FLOAT, false},
    {"gate_up_coef", ort::INT8, false}, {"gate_up_coef_scale", ort::FLOAT, false},
    {"gate_up_mean_codes", ort::UINT8, false}, {"gate_up_mean_signs", ort::UINT8, false},
    {"gate_up_mean_codebook", ort::INT8, false}, {"gate_up_mean_scale", ort::FLOAT, false},
    {"down_codes", ort::UINT8}, {"down_signs", ort::UINT8, false}, {"down_codebook", ort::INT8},
    {"down_scale", ort::FLOAT}, {"down_bias", ort::FLOAT, false}, {"down_basis", ort::FLOAT, false},
    {"down_coef", ort::INT8, false}, {"down_coef_scale", ort::FLOAT, false}, {"down_mean_codes", ort::UINT8, false},
    {"down_mean_signs", ort::UINT8, false}, {"down_mean_codebook", ort::INT8, false},
    {"down_mean_scale", ort::FLOAT, false},
    {"post_norm", ort::FLOAT, false},
};
constexpr Input HALF_X{"x", ort::FLOAT16};

class Inputs : Reader {
 public:
  Inputs(const ort::Api& api, const OrtKernelContext* context, bool half) : Reader(api, context), half_(half) {}
  Tensor get(size_t i, bool may_be_empty = false) const { return Reader::get(i, input(i, half_), may_be_empty); }

 private:
  bool half_;
};

// Reads four inputs from `first` on: codes, signs, codebook and scale of [experts, rows, columns].
// If rows is -1, scale says how many there are.
Matrix read_matrix(const Inputs& inputs, size_t first, int64_t experts, int64_t rows, int64_t columns) {
  const Tensor codes = inputs.get(first), signs = inputs.get(first + 1);
  const Tensor codebook = inputs.get(first + 2), scale = inputs.get(first + 3);
  Matrix m;
  // Without codes the matrix is absent, whatever else is there: a model that has it in other layers
  // alone gives this one empty codes.
  if (!codes) return m;
  for (const Tensor* t : {&codebook, &scale})
    if (!*t) throw Invalid(std::string(t->name) + " is missing");
  if (rows < 0) {
    scale.expect_rank(2, "[E, N]");
    rows = scale.shape[1];
  }
  const bool shaped = codebook.shape.size() == 3 && (codebook.shape[0] == 1 || codebook.shape[0] == experts) &&
                      codebook.shape[1] == 256 && (codebook.shape[2] == 2 || codebook.shape[2] == 4);
  if (!shaped)
    throw Invalid(std::string(codebook.name) + " has shape " + text(codebook.shape) + ", expected [1 or " + std::to_string(experts) +
                  ", 256, 2 or 4]");
  m.books = codebook.shape[0];
  m.v = codebook.shape[2];
  m.rows = rows;
  m.columns = columns;
  m.codebook = static_cast<const int8_t*>(codebook.data);
  m.scale = scale.as<float>({experts, rows});
  m.codes = codes.as<uint8_t>({experts, blocks(columns), blocks(rows), BLOCK / m.v, BLOCK});
  if (signs) {
    if (m.v != 4) throw Invalid(std::string(signs.name) + " is given with a codebook of pairs; only groups of four have signs");
    m.signs = signs.as<uint8_t>({experts, blocks(columns), blocks(rows), BLOCK / 4, BLOCK / 2});
  }
  return m;
}

Projection read_projection(const Inputs& inputs, size_t first, int64_t experts, int64_t hidden, int64_t rows, int64_t columns) {
  const bool input_side = rows < 0;
  Projection p;
  p.coded = read_matrix(inputs, first, experts, rows, columns);
  rows = p.coded.rows;
  if (const Tensor bias = inputs.get(first + 4)) p.bias = bias.as<float>({experts, rows});
  const Tensor basis = inputs.get(first + 5), coef = inputs.get(first + 6), coef_scale = inputs.get(first + 7);
  if (basis && !(coef && coef_scale))
    throw Invalid(std::string(basis.name) + ", " + coef.name + " and " + coef_scale.name + " must be given together");
  if (basis) {
    basis.expect_rank(2, "[r, D]");
    p.rank = basis.shape[0];
    p.basis = basis.as<float>({p.rank, hidden});
    p.coef = input_side ? coef.as<int8_t>({experts, rows, p.rank}) : coef.as<int8_t>({experts, p.rank, columns});
    p.coef_scale = coef_scale.as<float>({experts, input_side ? rows : p.rank});
  }
  p.mean = read_matrix(inputs, first + 8, 1, rows, columns);
  return p;
}

template <class E, size_t N>
E find(const char* what, const std::string& name, const Named<E> (&all)[N]) {
  std::string names;
  for (const Named<E>& one : all) {
    if (name == one.name) return one.value;
    names += (names.empty() ? "" : ", ") + std::string(one.name);
  }
  throw Invalid(std::string(what) + " " + quoted(name) + " is unknown; known are " + names);
}

}  // namespace

const Input& input(size_t i, bool half) { return i == 0 && half ? HALF_X : FLOATS[i]; }

Gating gating(const std::string& act, const std::string& gate, float alpha, float limit) {
  return {find("act", act, ACTS), find("gate", gate, GATES), alpha, limit};
}

Layer read(const ort::Api& api, const OrtKernelContext* context, bool half, const Gating& gating, float eps) {
  const Inputs inputs(api, context, half);
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
  codes.expect_rank(5, "five dimensions");
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
