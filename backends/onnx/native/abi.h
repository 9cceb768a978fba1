// The part of ONNX Runtime's C interface that the ops need, by slot number.
//
// OrtApi is a table of function pointers that only ever grows at its end, and so is OrtCustomOp,
// which says its own version. So a library that knows the slots needs no header of ONNX Runtime and
// loads in every version from OLDEST on.
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {
struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;

typedef const void* const* OrtApiTable;

struct OrtApiBase {
  OrtApiTable (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, OrtApiTable, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, OrtApiTable, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};
}
static_assert(sizeof(void*) != 8 || sizeof(OrtCustomOp) == 208, "OrtCustomOp of version 18");

namespace moecc::ort {

constexpr uint32_t OLDEST = 18;  // ONNX Runtime 1.18

enum Type { FLOAT = 1, UINT8 = 2, INT8 = 3, INT64 = 7, BOOL = 9, FLOAT16 = 10 };
enum Code { FAIL = 1, INVALID_ARGUMENT = 2 };
enum Characteristic { REQUIRED = 0, OPTIONAL = 1 };

enum Slot {
  CreateStatus = 0,
  CreateCustomOpDomain = 26,
  CustomOpDomain_Add = 27,
  AddCustomOpDomain = 28,
  GetTensorMutableData = 51,
  GetTensorElementType = 60,
  GetDimensionsCount = 61,
  GetDimensions = 62,
  GetTensorTypeAndShape = 65,
  KernelInfoGetAttribute_float = 85,
  KernelInfoGetAttribute_int64 = 86,
  KernelInfoGetAttribute_string = 87,
  KernelContext_GetInputCount = 88,
  KernelContext_GetInput = 90,
  KernelContext_GetOutput = 91,
  ReleaseStatus = 93,
  ReleaseTensorTypeAndShapeInfo = 99,
  KernelContext_ParallelFor = 274,
};

// The status of a failed call on its way to ONNX Runtime, which then owns it.
struct Failed {
  OrtStatus* status;
};

class Api {
 public:
  explicit Api(OrtApiTable table) : table_(table) {}

  template <class... A>
  OrtStatus* status(Slot slot, A... arguments) const {
    return call<OrtStatus*>(slot, arguments...);
  }
  template <class... A>
  void check(Slot slot, A... arguments) const {
    if (OrtStatus* failed = status(slot, arguments...)) throw Failed{failed};
  }
  template <class... A>
  void release(Slot slot, A... arguments) const {
    call<void>(slot, arguments...);
  }
  OrtStatus* error(Code code, const char* message) const {
    return status(CreateStatus, static_cast<int>(code), message);
  }

 private:
  template <class R, class... A>
  R call(Slot slot, A... arguments) const {
    return reinterpret_cast<R (*)(A...)>(const_cast<void*>(table_[slot]))(arguments...);
  }
  OrtApiTable table_;
};

}  // namespace moecc::ort
