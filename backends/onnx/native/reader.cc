#include "reader.h"

namespace moecc {

std::string text(const Shape& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); i++) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

std::string quoted(const std::string& name) {
  constexpr size_t LONGEST = 60;
  std::string s = "'";
  for (const unsigned char c : name.substr(0, LONGEST)) {
    constexpr char DIGITS[] = "0123456789abcdef";
    if (c >= ' ' && c <= '~')
      s += static_cast<char>(c);
    else
      s += {'\\', 'x', DIGITS[c >> 4], DIGITS[c & 15]};
  }
  return s + (name.size() > LONGEST ? "...'" : "'");
}

Tensor Reader::get(size_t i, const Input& input, bool may_be_empty) const {
  Tensor t{input.name, nullptr, {}};
  const OrtValue* value = nullptr;
  if (i < count_) api_.check(ort::KernelContext_GetInput, context_, i, &value);
  if (value) read(value, input, may_be_empty, t);
  if (!t && input.required) throw Invalid(std::string(t.name) + " is missing");
  return t;
}

void Reader::read(const OrtValue* value, const Input& input, bool may_be_empty, Tensor& t) const {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  api_.check(ort::GetTensorTypeAndShape, value, &info);
  int type = 0;
  size_t rank = 0;
  OrtStatus* failed = api_.status(ort::GetTensorElementType, const_cast<const OrtTensorTypeAndShapeInfo*>(info), &type);
  if (!failed) failed = api_.status(ort::GetDimensionsCount, const_cast<const OrtTensorTypeAndShapeInfo*>(info), &rank);
  int64_t dims[Shape::MOST] = {};
  if (!failed && rank <= Shape::MOST)
    failed = api_.status(ort::GetDimensions, const_cast<const OrtTensorTypeAndShapeInfo*>(info), &dims[0], rank);
  api_.release(ort::ReleaseTensorTypeAndShapeInfo, info);
  if (failed) throw ort::Failed{failed};
  if (rank > Shape::MOST) throw Invalid(t.name + (" has " + std::to_string(rank)) + " dimensions");
  if (type != input.type) throw Invalid(std::string(t.name) + " has the wrong element type");
  t.shape = Shape(dims, rank);
  int64_t elements = 1;
  for (int64_t d : t.shape) elements *= d;
  if (!elements && !may_be_empty) return;
  static const char nothing = 0;
  void* data = nullptr;
  api_.check(ort::GetTensorMutableData, const_cast<OrtValue*>(value), &data);
  t.data = data ? data : &nothing;
}

}  // namespace moecc
