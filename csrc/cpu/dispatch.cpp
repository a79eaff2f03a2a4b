// Chooses the variant of the kernels for the processor that runs, once.
//
// The question is asked here and not in kernels.cpp: that is compiled with instructions that the
// processor may lack.
#if FUSEDRNN_HAVE_amx
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <cstdint>
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
// Linux gives a process tiles when it asks (Documentation/arch/x86/xstate.rst). What it then needs
// larger are alternate signal stacks, of whoever has them: so it asks when tiles are used at last.
constexpr int kTileData = 18;
// Whether the processor has tiles for bfloat16, and Linux would give them.
bool has_tiles() {
  constexpr unsigned kBFloat16 = 1 << 22, kTiles = 1 << 24;
  constexpr int kGetSupported = 0x1021;  // ARCH_GET_XCOMP_SUPP
  unsigned a, b, c, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (kBFloat16 | kTiles)) return false;
  uint64_t supported = 0;
  return syscall(SYS_arch_prctl, kGetSupported, &supported) == 0 && supported >> kTileData & 1;
}
bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  static const bool given = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return given;
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
      {&kernels_amx, avx512 && HAS("avx512bf16") && has_tiles()},
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

constexpr int64_t kTokensForTiles = 64;  // of no more float32 is better off without

const Kernels& kernels(const Problem& p, int64_t batch, int64_t tokens) {
  const Kernels& chosen = kernels();
  (void)p, (void)batch, (void)tokens;
#if FUSEDRNN_HAVE_amx
  if (&chosen == &kernels_amx) {
    // A float32 is three times the bfloat16 for tiles, and takes making: what is small is better
    // off without. Tests ask for tiles by name, to see them with everything that is packed, as it
    // is in backward of more than a few tokens.
    static const bool named = std::getenv("FUSEDRNN_CPU") && *std::getenv("FUSEDRNN_CPU");
    const bool pays = named || (batch >= 16 && tokens > kTokensForTiles && p.hidden_size >= 64 &&
                                p.gate_rows() >= 128);
    const bool tiles = p.dtype == DType::kBFloat16 ||
                       (p.dtype == DType::kFloat32 && pays && tokens > kFewTokensBack);
    if (tiles && may_use_tiles()) return kernels_amx;
    return p.dtype == DType::kBFloat16 ? kernels_avx512bf16 : kernels_avx512;
  }
#endif
#if FUSEDRNN_HAVE_avx512bf16
  if (&chosen == &kernels_avx512bf16 && p.dtype != DType::kBFloat16) return kernels_avx512;
#endif
  return chosen;
}

}  // namespace fusedrnn
