// The right factor of a product: a weight matrix of a layer and direction, by groups of units
// (gate_layout.h). Packed by the call, or stored in fewer bytes and multiplied in place.
#pragma once
#include "cpu/pass/gate_layout.h"
#include "cpu/product/gemm.h"
#include "cpu/product/integers.h"

namespace {

// The weights of a matrix as the caller stores them. `first`: the slot of its first gate.
struct FactorShape {
  const void* stored;
  const void* scales;
  GateRangeList ranges;
  int first, gates;
  int64_t rows, K;  // of a gate
  bool long_sums;   // CpuPass

  WordMatrix words() const {
    return {static_cast<const uint32_t*>(stored), static_cast<const float*>(scales), rows, K,
            gates};
  }
  int gate(int64_t place) const { return gate_of(ranges, first + int(place)); }
};

template <class S, bool = kInPlace<S>>
class Factor {
  using X = Operand<S>;
  using C = Compute<S>;

 public:
  Factor(const X* packed, const FactorShape& shape) : panels_(packed), shape_(shape) {}

  // C = A W^T + D of some blocks of units, whose first column is c; in a projection only N columns
  // exist.
  FUSEDRNN_INLINE void multiply(int64_t block, int64_t N, int64_t M, const X* a, int64_t lda, C* c,
                                int64_t ldc, Addend<C> d, OverlappedWork work = {},
                                int64_t tile_height = kTileRows) const {
    const int64_t panel = Panels<X>::kWidth * operands<X>(shape_.K);  // of one gate
    const int64_t bytes = shape_.gates * shape_.rows * operands<X>(shape_.K) * sizeof(X);
    gemm(M, N, shape_.K, a, lda, panels_ + block * shape_.gates * panel, c, ldc, d,
         longest_sum<X>(shape_.long_sums), work, TileShape::of(tile_height, bytes));
  }

 private:
  const X* const panels_;
  const FactorShape shape_;
};

template <class S>
class Factor<S, true> {
  using X = Operand<S>;
  static constexpr int w = Lanes<float>::kWidth;

 public:
  Factor(const X*, const FactorShape& shape) : shape_(shape) {}

  void multiply(int64_t block, int64_t N, int64_t M, const X* a, int64_t lda, float* c, int64_t ldc,
                Addend<float> d, OverlappedWork work = {}, int64_t = kTileRows) const {
    (void)work;
    const WordMatrix m = shape_.words();
    const int64_t vectors = (N + w - 1) / w;
    auto unit = [&](int64_t v) { return (block + v / m.gates) * w; };
#if defined(FUSEDRNN_INTEGER_PRODUCTS)
    if constexpr (std::is_same_v<S, IntegerFloat>) {
      constexpr int64_t kAtOnce = 4;
      for (int64_t v = 0; v < vectors; v += kAtOnce) {
        IntegerColumn columns[kAtOnce];
        const int64_t count = min(kAtOnce, vectors - v);
        for (int64_t i = 0; i < count; i++) {
          const int64_t first = unit(v + i);
          const int gate = shape_.gate((v + i) % m.gates);
          columns[i] = {reinterpret_cast<const char*>(m.vector(gate, first)), m.scale(gate, first),
                        (v + i) * w, m.rows - first};
        }
        integer_product(M, m.K, a, lda, columns, count, c, ldc, d, work);
      }
      return;
    }
#endif
    if constexpr (std::is_same_v<S, WordFloat>)
      for (int64_t v = 0; v < vectors; v++)
        word_product(m, shape_.gate(v % m.gates), unit(v), M, a, lda, c + v * w, ldc,
                     {d.data ? d.data + v * w : nullptr, d.ld});
  }

 private:
  const FactorShape shape_;
};

}  // namespace
