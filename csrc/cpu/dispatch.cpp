// Asks the processor which kernels it runs. Not in kernels.cpp, which is compiled with instructions
// that the processor may lack.
#include "cpu/dispatch.h"

#if FUSEDRNN_HAVE_amx
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

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
// Whether the processor has tiles for bfloat16 and bytes, and Linux would give them.
bool has_tiles() {
  constexpr unsigned kBFloat16 = 1 << 22, kTiles = 1 << 24, kInt8 = 1 << 25;
  constexpr int kGetSupported = 0x1021;  // ARCH_GET_XCOMP_SUPP
  unsigned a, b, c, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (kBFloat16 | kTiles | kInt8)) return false;
  uint64_t supported = 0;
  return syscall(SYS_arch_prctl, kGetSupported, &supported) == 0 && supported >> kTileData & 1;
}
#endif
bool may_use_tiles() {
#if FUSEDRNN_HAVE_amx
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  static const bool given = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return given;
#else
  return false;
#endif
}

// The size of one L3 cache, which some cores share; sysconf gives the sum over all of them.
int64_t l3_bytes() {
  constexpr int64_t kUnknown = 32 << 20;
  static const int64_t size = [] {
    int64_t kilobytes = 0;
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kilobytes;
    return kilobytes > 0 ? kilobytes << 10 : kUnknown;
  }();
  return size;
}

// Measured on Zen 4: a stream of rows comes from L3 at 84 to 90 GB/s, as it does from L2. AMD's
// other processors are taken to be alike.
bool has_quick_l3() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

struct Installed {
  const Kernels* kernels;
  bool supported;
};

// Best first.
const std::vector<Installed>& installed() {
#define HAS(feature) bool(__builtin_cpu_supports(feature))
#if FUSEDRNN_HAVE_avx512
  const bool avx512 = HAS("avx512f") && HAS("avx512bw") && HAS("avx512cd") && HAS("avx512dq") &&
                      HAS("avx512vl") && HAS("fma") && HAS("bmi2");
  // Every processor with the first of these has the second.
  const bool avx512bf16 = avx512 && HAS("avx512bf16") && HAS("avx512vnni");
#endif
  static const std::vector<Installed> all = {
#if FUSEDRNN_HAVE_amx
      {&kernels_amx, avx512bf16 && has_tiles()},
#endif
#if FUSEDRNN_HAVE_avx512bf16
      {&kernels_avx512bf16, avx512bf16},
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
  return all;
}

const char* named_variant() {
  const char* name = std::getenv("FUSEDRNN_CPU");
  return name && *name ? name : nullptr;
}

// What may run, from the best or the one that is named on.
struct Candidates {
  std::vector<const Kernels*> kernels;
  std::vector<CpuVariant> variants;

  void add(const Installed& one) {
    CpuVariant variant{};
    variant.name = one.kernels->name;
    for (int i = 0; i < int(DType::kCount); i++) variant.costs[i] = one.kernels->costs(DType(i));
    kernels.push_back(one.kernels), variants.push_back(variant);
  }
};

Candidates find_candidates() {
  const char* const named = named_variant();
  Candidates found;
  std::string names;
  for (const Installed& one : installed()) {
    if (!one.supported) continue;
    names += (names.empty() ? "" : ", ") + std::string(one.kernels->name);
    if (named && found.kernels.empty() && std::strcmp(named, one.kernels->name)) continue;
    found.add(one);
  }
  if (found.kernels.empty())
    throw std::runtime_error(std::string("FUSEDRNN_CPU is ") + named +
                             ", which this build or this processor lacks; choose from: " + names);
  return found;
}

const Candidates& candidates() {
  static const Candidates found = find_candidates();
  return found;
}

}  // namespace

const InstalledVariant* installed_variants(int* count) {
  static const std::vector<InstalledVariant> all = [] {
    std::vector<InstalledVariant> found;
    for (const Installed& one : installed()) found.push_back({one.kernels->name, one.supported});
    return found;
  }();
  *count = int(all.size());
  return all.data();
}

CpuMachine this_machine(int64_t threads) {
  const Candidates& c = candidates();
  static const bool named = named_variant();
  const char* const wanted = std::getenv("FUSEDRNN_THREADS");
  const bool all_threads = wanted && !std::strcmp(wanted, "all");
  CpuMachine m{c.variants.data(), int(c.variants.size()), named, true, threads, all_threads};
  m.l3_bytes = l3_bytes(), m.quick_l3 = has_quick_l3();
  return m;
}

CpuPlan plan_cpu_here(const Problem& p, const CpuRequest& r, CpuMachine* m) {
  const CpuPlan plan = plan_cpu(p, r, *m);
  const bool tiled = m->variants[plan.variant].costs[int(p.dtype)].tiled;
  if (!tiled || may_use_tiles()) return plan;
  m->tiles = false;
  return plan_cpu(p, r, *m);
}

const Kernels& kernels_of(const CpuPlan& plan) { return *candidates().kernels[plan.variant]; }

}  // namespace fusedrnn
