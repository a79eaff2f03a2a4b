// The CPU twins of what csrc/cuda/primitives.h wraps; what each does is written there.
//
// Each checks what the PTX ISA demands of its instruction: the size of the cluster, alignment,
// state space, lanes that execute it together, ranges. Memory is consistent here; what acquire and
// release order, and what only seems ordered, ThreadSanitizer tells apart.
#pragma once
#include <bit>
#include <type_traits>
#include <utility>

#include "emulator/simt.h"

#define FUSEDRNN_AT simt::Where at = simt::Where::current()
#define FUSEDRNN_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(simt::dynamic_shared())
#define FUSEDRNN_STATIC_SHARED(T, name, N) \
  static const char name##_key_ = 0;       \
  T(&name)[N] = *static_cast<T(*)[N]>(simt::static_shared(&name##_key_, sizeof(T) * (N)))

namespace fusedrnn {

// ---- storage types ----

using Float64 = double;
using Float32 = float;

struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  explicit BFloat16(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    bits = x != x ? 0x7fff : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
};

struct Float16 {
  uint16_t bits;
  Float16() = default;
  explicit Float16(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    x = std::fabs(x);
    if (x != x) {
      bits = 0x7fff;
    } else if (x >= 65520) {  // half way between the largest number and the next power of two
      bits = sign | 0x7c00;
    } else {
      // A multiple of the last place: 2^-24, or 2^(e-10) for a number with exponent e.
      int e = -14;
      if (x >= 0x1p-14f) std::frexp(x, &e), e--;
      const float units = std::nearbyint(std::ldexp(x, 10 - e));  // 1024 .. 2048 for normal numbers
      bits = sign | uint16_t(int(units) + (x >= 0x1p-14f ? (e + 14) << 10 : 0));
    }
  }
};

inline float to_compute(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_compute(Float16 x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(float(fraction), -24)
                                     : std::ldexp(float(1024 + fraction), exponent - 25);
  return x.bits & 0x8000 ? -size : size;
}

inline uint32_t float_to_bits(float x) { return std::bit_cast<uint32_t>(x); }
inline float bits_to_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float reciprocal(float x) { return x > 0x1p126f ? 0 : 1 / x; }

// ---- barriers of a cluster ----

inline void cluster_arrive(FUSEDRNN_AT) { simt::arrive_cluster(at); }
inline void cluster_wait(FUSEDRNN_AT) { simt::wait_cluster(at); }

// ---- flags: atomics of the compiler, which ThreadSanitizer knows; and other global memory ----

inline int load_acquire(const int* p, FUSEDRNN_AT) {
  simt::expect_global(p, sizeof *p, at);
  simt::poll(at);
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline void store_release(int* p, int value, FUSEDRNN_AT) {
  simt::expect_global(p, sizeof *p, at);
  __atomic_store_n(p, value, __ATOMIC_RELEASE);
  simt::progress(p, value);
}
inline uint64_t nanoseconds() { return simt::nanoseconds(); }

// ---- values that are their own flags: relaxed atomics, which order nothing ----

constexpr uint32_t kMissing = 0xffffffff;

namespace detail {
template <class T>
struct Scalars {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  static constexpr int kCount = int(sizeof(T) / sizeof(Bits));
  static_assert(sizeof(T) == 16 || sizeof(T) == 4 || sizeof(T) == 2);
  Bits bits[kCount];
};
}  // namespace detail

template <class T>
T load_value(const T* p, FUSEDRNN_AT) {
  simt::expect_global(p, sizeof *p, at);
  detail::Scalars<T> all;
  auto* from = reinterpret_cast<const typename detail::Scalars<T>::Bits*>(p);
  bool come = true;
  for (int i = 0; i < all.kCount; i++) {
    all.bits[i] = __atomic_load_n(from + i, __ATOMIC_RELAXED);
    come &= all.bits[i] != decltype(all.bits[i] + 0)(typename detail::Scalars<T>::Bits(kMissing));
  }
  if (come)
    simt::reached(p, 1);
  else
    simt::poll(at);
  return std::bit_cast<T>(all);
}
template <class T>
void store_value(T* p, T value, FUSEDRNN_AT) {
  simt::expect_global(p, sizeof *p, at);
  using Bits = typename detail::Scalars<T>::Bits;
  auto all = std::bit_cast<detail::Scalars<T>>(value);
  auto* to = reinterpret_cast<Bits*>(p);
  for (int i = 0; i < all.kCount; i++) {
    const Bits before = __atomic_load_n(to + i, __ATOMIC_RELAXED);
    Bits bits = all.bits[i] == Bits(kMissing) ? Bits(Bits(kMissing) >> 1) : all.bits[i];
    if (simt::faults.send_zeros) bits = 0;
    if (before != Bits(kMissing) && before != bits) simt::stored_twice(p, at);
    __atomic_store_n(to + i, bits, __ATOMIC_RELAXED);
  }
  simt::progress(p, 1);
}
inline void prefetch(const void* global, FUSEDRNN_AT) { simt::expect_global(global, 1, at); }
inline void store_to_host(int* p, int value, FUSEDRNN_AT) {
  simt::expect_global(p, sizeof *p, at);
  __atomic_store_n(p, value, __ATOMIC_RELAXED);
}
inline bool sync_any(bool yes, FUSEDRNN_AT) { return simt::sync_block_any(yes, at); }
inline void store_words(Words* global, const Words& w, FUSEDRNN_AT) {
  simt::expect_global(global, sizeof w, at);
  *global = simt::faults.send_zeros ? Words{} : w;
}

// ---- mbarriers, and stores that they count ----

using Mbarrier = uint64_t;

inline void mbarrier_init(Mbarrier* m, int arrivals, FUSEDRNN_AT) {
  simt::mbarrier_init(m, arrivals, at);
}
inline void mbarrier_init_fence() { simt::mbarrier_init_fence(); }
inline void mbarrier_arrive(Mbarrier* m, int bytes, FUSEDRNN_AT) {
  simt::mbarrier_arrive(m, bytes, at);
}
// Never gives up: a phase that does not end is reported.
inline void mbarrier_wait(Mbarrier* m, int parity, FUSEDRNN_AT) {
  simt::mbarrier_wait(m, parity, at);
}
inline void store_async(Words* mine, const Words& w, Mbarrier* m, int rank, FUSEDRNN_AT) {
  simt::store_async(mine, &w, sizeof w, m, rank, at);
}

// ---- matrix products of a warp ----

namespace detail {

struct Fragments {
  uint32_t a[4], b[2];
};

// One of the elements that share a register.
inline float value(BFloat16, uint32_t bits, int half) {
  BFloat16 x;
  x.bits = uint16_t(bits >> 16 * half);
  return to_compute(x);
}
inline float value(Float16, uint32_t bits, int half) {
  Float16 x;
  x.bits = uint16_t(bits >> 16 * half);
  return to_compute(x);
}
struct Tf32 {};
inline float value(Tf32, uint32_t bits, int) { return std::bit_cast<float>(bits & ~0x1fffu); }

// kPer elements share a register, so that 4 lanes hold 4 kPer columns of A, twice.
template <int kPer, class S>
void multiply(S type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              const simt::Where& at) {
  Fragments mine;
  std::memcpy(mine.a, a, sizeof a);
  if (simt::faults.swap_registers) std::swap(mine.a[1], mine.a[2]);
  std::memcpy(mine.b, b, sizeof b);
  const char* all = simt::exchange_aligned("mma", &mine, sizeof mine, at);
  auto of = [&](int lane) {
    Fragments f;
    std::memcpy(&f, all + 64 * lane, sizeof f);
    return f;
  };
  const int g = simt::lane() / 4, t = simt::lane() % 4;
  for (int i = 0; i < 4; i++) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (int k = 0; k < 8 * kPer; k++) {
      const int lane = k / kPer % 4, part = k / (4 * kPer);
      const float x = value(type, of(row % 8 * 4 + lane).a[row / 8 + 2 * part], k % kPer);
      const float y = value(type, of(column * 4 + lane).b[part], k % kPer);
      d[i] += x * y;
    }
  }
}

}  // namespace detail

template <class S>
void mma(S type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FUSEDRNN_AT) {
  detail::multiply<2>(type, d, a, b, at);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FUSEDRNN_AT) {
  detail::multiply<1>(detail::Tf32{}, d, a, b, at);
}
inline uint32_t to_tf32(float x) {
  return (std::bit_cast<uint32_t>(x) + (std::isfinite(x) ? 0x1000u : 0u)) & ~0x1fffu;
}

}  // namespace fusedrnn
