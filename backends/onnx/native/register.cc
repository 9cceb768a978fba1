// The library's entry, which registers every op in the domain "moecc".
#include "custom_op.h"

namespace moecc {
namespace {

// The domain belongs to the process: sessions refer to it until the library is unloaded.
OrtCustomOpDomain* domain(const ort::Api& api) {
  static const std::vector<Op> ops = [] {
    std::vector<Op> all = experts_ops();
    for (auto more : {attention_ops, mask_ops})
      for (Op& op : more()) all.push_back(std::move(op));
    return all;
  }();
  static OrtCustomOpDomain* const made = [&] {
    OrtCustomOpDomain* d = nullptr;
    api.check(ort::CreateCustomOpDomain, "moecc", &d);
    for (const Op& op : ops) api.check(ort::CustomOpDomain_Add, d, static_cast<const OrtCustomOp*>(&op));
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
    return guarded(api, "ops", [&] { api.check(ort::AddCustomOpDomain, options, domain(api)); });
  }
  const ort::Api api(base->GetApi(1));
  return guarded(api, "ops", [&] {
    throw Invalid(std::string("this library needs ONNX Runtime 1.18 or newer, this is ") + base->GetVersionString());
  });
}
