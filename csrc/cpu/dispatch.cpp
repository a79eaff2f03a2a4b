// Chooses the variant of the kernels for the processor that runs, once.
//
// The question is asked here and not in kernels.cpp: that is compiled with instructions that the
// processor may lack.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/stack.h"

namespace fusedrnn {

// The build says which variants are in the binary.
#if FUSEDRNN_HAVE_avx512bf16
extern const Kernels kernels_avx512bf16;
#endif
#if FUSEDRNN_HAVE_avx512
extern const Kernels kernels_avx512;
#endif
#if FUSEDRNN_HAVE_avx2
extern const Kernels kernels_avx2;
#endif
#if FUSEDRNN_HAVE_neon
extern const Kernels kernels_neon;
#endif
#if FUSEDRNN_HAVE_baseline
extern const Kernels kernels_baseline;
#endif

const Variant* variants(int* count) {
#define HAS(feature) bool(__builtin_cpu_supports(feature))
#if FUSEDRNN_HAVE_avx512
  const bool avx512 = HAS("avx512f") && HAS("avx512bw") && HAS("avx512cd") && HAS("avx512dq") &&
                      HAS("avx512vl") && HAS("fma") && HAS("bmi2");
#endif
  static const Variant all[] = {
#if FUSEDRNN_HAVE_avx512bf16
      {&kernels_avx512bf16, avx512 && HAS("avx512bf16")},
#endif
#if FUSEDRNN_HAVE_avx512
      {&kernels_avx512, avx512},
#endif
#if FUSEDRNN_HAVE_avx2
      {&kernels_avx2, HAS("avx2") && HAS("fma") && HAS("bmi2")},
#endif
#if FUSEDRNN_HAVE_neon
      {&kernels_neon, true},
#endif
#if FUSEDRNN_HAVE_baseline
      {&kernels_baseline, true},
#endif
  };
#undef HAS
  *count = int(sizeof all / sizeof *all);
  return all;
}

namespace {
const Kernels& choose() {
  const char* wanted = std::getenv("FUSEDRNN_CPU");
  std::string names;
  int count;
  const Variant* all = variants(&count);
  for (int i = 0; i < count; i++) {
    if (!all[i].supported) continue;
    const char* name = all[i].kernels->name;
    if (!wanted || !*wanted || std::strcmp(wanted, name) == 0) return *all[i].kernels;
    names += std::string(names.empty() ? "" : ", ") + name;
  }
  throw std::runtime_error(std::string("FUSEDRNN_CPU is ") + wanted +
                           ", which this build or this processor lacks; choose from: " + names);
}
}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const Kernels& kernels(DType dtype) {
#if FUSEDRNN_HAVE_avx512bf16
  if (&kernels() == &kernels_avx512bf16 && dtype != DType::kBFloat16) return kernels_avx512;
#else
  (void)dtype;
#endif
  return kernels();
}

}  // namespace fusedrnn
