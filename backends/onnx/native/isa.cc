#include "isa.h"

#include <cstdlib>
#include <string>
#include <vector>

#include "reader.h"

namespace moecc {
namespace {

std::vector<const Kernels*> available() {  // the best one last
  std::vector<const Kernels*> all{&SCALAR_KERNELS};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all.push_back(&AVX2_KERNELS);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vnni"))
    all.push_back(&AVX512_KERNELS);
#elif defined(__aarch64__)
  all.push_back(&NEON_KERNELS);
#endif
  return all;
}

}  // namespace

const Kernels& choose_kernels() {
  const std::vector<const Kernels*> all = available();
  const char* wanted = std::getenv("MOECC_ISA");
  if (!wanted || !*wanted) return *all.back();
  std::string names;
  for (const Kernels* k : all) {
    if (std::string(wanted) == k->name) return *k;
    names += (names.empty() ? "" : ", ") + std::string(k->name);
  }
  throw Invalid("MOECC_ISA is " + quoted(wanted) + ", this CPU has " + names);
}

}  // namespace moecc
