// moecc::VQExperts for ONNX Runtime: one kernel for float32 and one for float16, and what registers them.
#include <exception>
#include <new>
#include <string>

#include "abi.h"
#include "inputs.h"
#include "isa.h"
#include "layer.h"

namespace moecc {
namespace {

struct Op : OrtCustomOp {
  bool half;
};

struct Kernel {
  ort::Api api;
  bool half;
  const Kernels* kernels;
  Gating gating;
  float eps;
};

// Nothing that C++ throws may reach ONNX Runtime, which is C at this border.
template <class F>
OrtStatus* guarded(const ort::Api& api, F&& f) noexcept {
  const auto error = [&](ort::Code code, const char* what) -> OrtStatus* {
    try {
      return api.error(code, (std::string("moecc::VQExperts: ") + what).c_str());
    } catch (...) {
      return api.error(code, "moecc::VQExperts: out of memory");
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
    // as many batches as tasks: a thread takes the next one when it is done, and a slow core delays nothing
    api_.check(ort::KernelContext_ParallelFor, context_, task, count, count, data);
  }

 private:
  const ort::Api& api_;
  const OrtKernelContext* context_;
};

float float_attribute(const ort::Api& api, const OrtKernelInfo* info, const char* name) {
  float value = 0;
  if (OrtStatus* failed = api.status(ort::KernelInfoGetAttribute_float, info, name, &value)) {
    api.release(ort::ReleaseStatus, failed);
    throw Invalid(std::string("attribute ") + name + " is missing or no float");
  }
  return value;
}

std::string string_attribute(const ort::Api& api, const OrtKernelInfo* info, const char* name) {
  size_t size = 0;  // with the terminating zero
  OrtStatus* failed = api.status(ort::KernelInfoGetAttribute_string, info, name, static_cast<char*>(nullptr), &size);
  std::string value(size, '\0');
  if (!failed) failed = api.status(ort::KernelInfoGetAttribute_string, info, name, &value[0], &size);
  if (failed) {
    api.release(ort::ReleaseStatus, failed);
    throw Invalid(std::string("attribute ") + name + " is missing or no string");
  }
  return value.c_str();
}

OrtStatus* create(const OrtCustomOp* op, OrtApiTable table, const OrtKernelInfo* info, void** kernel) {
  const ort::Api api(table);
  return guarded(api, [&] {
    const std::string act = string_attribute(api, info, "act"), gate = string_attribute(api, info, "gate");
    const float alpha = float_attribute(api, info, "alpha"), limit = float_attribute(api, info, "limit");
    const float eps = float_attribute(api, info, "eps");
    *kernel = new Kernel{api, static_cast<const Op*>(op)->half, &choose_kernels(), gating(act, gate, alpha, limit), eps};
  });
}

OrtStatus* compute(void* state, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  return guarded(kernel.api, [&] {
    const Layer layer = read(kernel.api, context, kernel.half, kernel.gating, kernel.eps);
    const int64_t shape[2] = {layer.tokens, layer.hidden};
    OrtValue* value = nullptr;
    void* y = nullptr;
    kernel.api.check(ort::KernelContext_GetOutput, context, size_t{0}, &shape[0], size_t{2}, &value);
    kernel.api.check(ort::GetTensorMutableData, value, &y);
    run(layer, *kernel.kernels, Pool(kernel.api, context), y);
  });
}

Op make(bool half) {
  Op op{};
  op.half = half;
  op.version = ort::OLDEST;
  op.GetName = [](const OrtCustomOp*) { return "VQExperts"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU's
  op.GetInputType = [](const OrtCustomOp* op, size_t i) { return input_type(i, static_cast<const Op*>(op)->half); };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return INPUTS; };
  op.GetOutputType = [](const OrtCustomOp* op, size_t) { return input_type(0, static_cast<const Op*>(op)->half); };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{1}; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) -> int { return required(i) ? ort::REQUIRED : ort::OPTIONAL; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return ort::REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 0x7fffffff; };
  return op;
}

// The domain belongs to the process: sessions refer to it until the library is unloaded.
OrtCustomOpDomain* domain(const ort::Api& api) {
  static const Op float_op = make(false), half_op = make(true);
  static OrtCustomOpDomain* const made = [&] {
    OrtCustomOpDomain* d = nullptr;
    api.check(ort::CreateCustomOpDomain, "moecc", &d);
    for (const Op* op : {&float_op, &half_op}) api.check(ort::CustomOpDomain_Add, d, static_cast<const OrtCustomOp*>(op));
    return d;
  }();
  return made;
}

}  // namespace
}  // namespace moecc

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  using namespace moecc;
  if (OrtApiTable table = base->GetApi(ort::OLDEST)) {
    const ort::Api api(table);
    return guarded(api, [&] { api.check(ort::AddCustomOpDomain, options, domain(api)); });
  }
  const ort::Api api(base->GetApi(1));
  return guarded(api, [&] {
    throw Invalid(std::string("needs ONNX Runtime 1.18 or newer, this is ") + base->GetVersionString());
  });
}
