// An op's inputs as tensors. Their type is checked here, their shape by the op.
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "abi.h"

namespace moecc {

struct Invalid : std::invalid_argument {  // what() is for the user
  using std::invalid_argument::invalid_argument;
};

class Shape {  // of at most MOST dimensions, so that it needs no allocation
 public:
  static constexpr size_t MOST = 8;
  Shape() = default;
  Shape(std::initializer_list<int64_t> dims) : Shape(dims.begin(), dims.size()) {}
  Shape(const int64_t* dims, size_t rank) : rank_(rank) { std::copy(dims, dims + rank, dims_); }

  size_t size() const { return rank_; }
  const int64_t* data() const { return dims_; }
  const int64_t* begin() const { return dims_; }
  const int64_t* end() const { return dims_ + rank_; }
  int64_t operator[](size_t i) const { return dims_[i]; }
  bool operator==(const Shape& other) const { return std::equal(begin(), end(), other.begin(), other.end()); }

 private:
  int64_t dims_[MOST] = {};
  size_t rank_ = 0;
};

std::string text(const Shape& shape);

// A name that a file gives, as messages show it: in quotes, with escapes, and cut if it is long.
std::string quoted(const std::string& name);

struct Input {
  const char* name;
  int type;  // of ort::Type
  bool required = true;
};

struct Tensor {
  const char* name;
  const void* data = nullptr;  // null: absent
  Shape shape;

  explicit operator bool() const { return data; }
  void expect_rank(size_t rank, const char* wanted) const {
    if (shape.size() != rank) throw Invalid(name + (" has shape " + text(shape)) + ", expected " + wanted);
  }
  template <class T>
  const T* as(const Shape& wanted) const {
    if (!(shape == wanted)) throw Invalid(name + (" has shape " + text(shape)) + ", expected " + text(wanted));
    return static_cast<const T*>(data);
  }
};

class Reader {
 public:
  Reader(const ort::Api& api, const OrtKernelContext* context) : api_(api), context_(context) {
    api.check(ort::KernelContext_GetInputCount, context, &count_);
  }

  // Returns an input. A tensor without elements counts as absent, unless it may be empty. Throws
  // Invalid if a required one is absent.
  Tensor get(size_t i, const Input& input, bool may_be_empty = false) const;

 private:
  void read(const OrtValue* value, const Input& input, bool may_be_empty, Tensor& t) const;

  const ort::Api& api_;
  const OrtKernelContext* context_;
  size_t count_ = 0;
};

}  // namespace moecc
