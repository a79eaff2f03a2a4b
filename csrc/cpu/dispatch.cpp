// Chooses the variant of the kernels for the processor that runs, once.
//
// The question is asked here and not in kernels.cpp: that is compiled with instructions that the
// processor may lack.
#if FUSEDRNN_HAVE_amx
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/stack.h"

namespace fusedrnn {

// The build says which variants are in the binary.
#if FUSEDRNN_HAVE_amx
extern const Kernels kernels_amx;
#endif
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

namespace {
#if FUSEDRNN_HAVE_amx
// Whether the processor has tiles for bfloat16 and Linux lets this process use them, for which it
// has to be asked (Documentation/arch/x86/xstate.rst).
bool may_use_tiles() {
  constexpr unsigned kBFloat16 = 1 << 22, kTiles = 1 << 24;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  unsigned a, b, c, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (kBFloat16 | kTiles)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif
}  // namespace

const Variant* variants(int* count) {
#define HAS(feature) bool(__builtin_cpu_supports(feature))
#if FUSEDRNN_HAVE_avx512
  const bool avx512 = HAS("avx512f") && HAS("avx512bw") && HAS("avx512cd") && HAS("avx512dq") &&
                      HAS("avx512vl") && HAS("fma") && HAS("bmi2");
#endif
  static const Variant all[] = {
#if FUSEDRNN_HAVE_amx
      {&kernels_amx, avx512 && HAS("avx512bf16") && may_use_tiles()},
#endif
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
  const Kernels& chosen = kernels();
#if FUSEDRNN_HAVE_avx512bf16
  const bool one_dtype = &chosen == &kernels_avx512bf16 || &chosen == &kernels_amx;
  if (one_dtype && dtype != DType::kBFloat16) return kernels_avx512;
#else
  (void)dtype;
#endif
  return chosen;
}

}  // namespace fusedrnn
