// Chooses the variant of the kernels for the processor that runs, once.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/stack.h"

namespace fusedrnn {

// The build says which variants are in the binary.

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

const Kernels* const* compiled_kernels() {
  static const Kernels* const all[] = {
#if FUSEDRNN_HAVE_avx512
      &kernels_avx512,
#endif
#if FUSEDRNN_HAVE_avx2
      &kernels_avx2,
#endif
#if FUSEDRNN_HAVE_neon
      &kernels_neon,
#endif
#if FUSEDRNN_HAVE_baseline
      &kernels_baseline,
#endif
      nullptr,
  };
  return all;
}

namespace {
const Kernels& choose() {
  const char* wanted = std::getenv("FUSEDRNN_CPU");
  std::string names;
  for (auto k = compiled_kernels(); *k; k++) {
    if (!(*k)->supported()) continue;
    if (!wanted || !*wanted || std::strcmp(wanted, (*k)->name) == 0) return **k;
    names += std::string(names.empty() ? "" : ", ") + (*k)->name;
  }
  throw std::runtime_error(std::string("FUSEDRNN_CPU=") + (wanted ? wanted : "") +
                           " is not an instruction set that this build and this processor have: " + names);
}
}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fusedrnn
