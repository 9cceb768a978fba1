// The common part of the library's ops: how ONNX Runtime asks about them, how errors reach it.
#pragma once
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "isa.h"
#include "layer.h"
#include "reader.h"

namespace moecc {

struct Op : OrtCustomOp {
  std::string name;
  std::vector<Input> inputs, outputs;
  bool half;  // float16, not float32
};

// Runs f and turns any exception into a status: ONNX Runtime is C at this border.
template <class F>
OrtStatus* guarded(const ort::Api& api, const std::string& name, F&& f) noexcept {
  const auto error = [&](ort::Code code, const char* what) -> OrtStatus* {
    try {
      return api.error(code, ("moecc::" + name + ": " + what).c_str());
    } catch (...) {
      return api.error(code, "moecc: out of memory");
    }
  };
  try {
    f();
    return nullptr;
  } catch (const ort::Failed& failed) {
    return failed.status;
  } catch (const Invalid& invalid) {
    return error(ort::INVALID_ARGUMENT, invalid.what());
  } catch (const std::bad_alloc&) {
    return error(ort::FAIL, "out of memory");
  } catch (const std::exception& other) {
    return error(ort::FAIL, other.what());
  } catch (...) {
    return error(ort::FAIL, "unknown error");
  }
}

class Pool final : public Parallel {  // the session's own threads
 public:
  Pool(const ort::Api& api, const OrtKernelContext* context) : api_(api), context_(context) {}
  void run(size_t count, Task task, void* data) const override {
    // As many batches as tasks: each thread takes the next one when it is done, so that a slow core
    // delays nothing.
    api_.check(ort::KernelContext_ParallelFor, context_, task, count, count, data);
  }

 private:
  const ort::Api& api_;
  const OrtKernelContext* context_;
};

// Calls f(parallel), with the session's threads unless the work is small.
template <class F>
void with_threads(const ort::Api& api, const OrtKernelContext* context, bool small, F&& f) {
  if (small)
    f(Serial());
  else
    f(Pool(api, context));
}

class Attributes {
 public:
  Attributes(const ort::Api& api, const OrtKernelInfo* info) : api_(api), info_(info) {}
  float number(const char* name) const {
    float value = 0;
    require(api_.status(ort::KernelInfoGetAttribute_float, info_, name, &value), name, "float");
    return value;
  }
  int64_t integer(const char* name) const {
    int64_t value = 0;
    require(api_.status(ort::KernelInfoGetAttribute_int64, info_, name, &value), name, "integer");
    return value;
  }
  std::string string(const char* name) const {
    size_t size = 0;  // with the terminating zero
    require(api_.status(ort::KernelInfoGetAttribute_string, info_, name, static_cast<char*>(nullptr), &size), name, "string");
    std::string value(size, '\0');
    require(api_.status(ort::KernelInfoGetAttribute_string, info_, name, &value[0], &size), name, "string");
    return value.c_str();
  }

 private:
  void require(OrtStatus* failed, const char* name, const char* kind) const {
    if (!failed) return;
    api_.release(ort::ReleaseStatus, failed);
    throw Invalid(std::string("attribute ") + name + " is missing or no " + kind);
  }

  const ort::Api& api_;
  const OrtKernelInfo* info_;
};

inline void* output(const ort::Api& api, OrtKernelContext* context, size_t i, const Shape& shape) {
  OrtValue* value = nullptr;
  void* data = nullptr;
  api.check(ort::KernelContext_GetOutput, context, i, shape.data(), shape.size(), &value);
  api.check(ort::GetTensorMutableData, value, &data);
  return data;
}

// Makes an op whose kernel is State: made of (op, attributes), then compute(api, context) per call.
template <class State>
Op make_op(std::string name, std::vector<Input> inputs, std::vector<Input> outputs, bool half) {
  struct Kernel {
    ort::Api api;
    const Op* op;
    State state;
  };
  Op op{};
  op.name = std::move(name);
  op.inputs = std::move(inputs);
  op.outputs = std::move(outputs);
  op.half = half;
  op.version = ort::OLDEST;
  op.GetName = [](const OrtCustomOp* op) { return static_cast<const Op*>(op)->name.c_str(); };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU's
  op.GetInputType = [](const OrtCustomOp* op, size_t i) { return static_cast<const Op*>(op)->inputs[i].type; };
  op.GetInputTypeCount = [](const OrtCustomOp* op) { return static_cast<const Op*>(op)->inputs.size(); };
  op.GetOutputType = [](const OrtCustomOp* op, size_t i) { return static_cast<const Op*>(op)->outputs[i].type; };
  op.GetOutputTypeCount = [](const OrtCustomOp* op) { return static_cast<const Op*>(op)->outputs.size(); };
  op.GetInputCharacteristic = [](const OrtCustomOp* op, size_t i) -> int {
    return static_cast<const Op*>(op)->inputs[i].required ? ort::REQUIRED : ort::OPTIONAL;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return ort::REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.CreateKernelV2 = [](const OrtCustomOp* op, OrtApiTable table, const OrtKernelInfo* info, void** kernel) {
    const Op& own = *static_cast<const Op*>(op);
    const ort::Api api(table);
    return guarded(api, own.name, [&] { *kernel = new Kernel{api, &own, State(own, Attributes(api, info))}; });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const Kernel& own = *static_cast<const Kernel*>(kernel);
    return guarded(own.api, own.op->name, [&] { own.state.compute(own.api, context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 0x7fffffff; };
  return op;
}

std::vector<Op> experts_ops(), attention_ops(), mask_ops();

}  // namespace moecc
