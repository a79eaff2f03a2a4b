// The CPU twins of csrc/cuda/primitives.h.
#pragma once
#include <bit>

#include "emulator/simt.h"

namespace fusedrnn {

// ---- storage types ----

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

}  // namespace fusedrnn
