// Outer products summed over tokens: dst [M, N] = sum of a[token, m] * b[token, n], of one a with
// several b.
//
// Tokens are taken in blocks. The a of a block is packed once, each b a block of columns at a time.
// Of many tokens, each kLong make a sum of their own, which keeps chains of additions short. Tokens
// are always added in the same order, so results do not depend on how columns of a are divided into
// tasks. Sums that are to be rounded to a storage type are complete before they are.
#pragma once
#include "cpu/product/gemm.h"

namespace {

// Sizes of blocks. The packed blocks stay in L2 beside the sums. Short blocks of tokens limit the
// rounding error of float32; the products of bfloat16 are fast, and long blocks read and write
// their sums less often.
template <class X>
struct Outer {
  static constexpr int64_t kSplit = kPlanes<X> > 1 ? 2 : 1;  // planes take three times the bytes
  static constexpr int64_t kTokens = kTiled<X> ? 512 : 128;
  static constexpr int64_t kLong = 8192;  // tokens: a multiple of kTokens
  static constexpr int64_t kColumns =
      kTiled<X> ? 256 / kSplit : 512 / Panels<X>::kColumns * Panels<X>::kColumns;
  static constexpr int64_t kMostRows = kTiled<X> ? 512 / kSplit : 64 * kRows;  // M

  // Operands of a block of tokens, and of a row of a for tiles.
  static constexpr int64_t kDepth = operands<X>(kTokens), kRow = kDepth + kRowPad<X>;
  // The space of a packed block of a, in operands; whole cache lines.
  static constexpr int64_t left(int64_t M) {
    return whole_lines(kTiled<X> ? (M + kSpareRows<X>)*kRow : kDepth * M);
  }
  // The same of the sums of kLong tokens, for b of `columns` columns together.
  static constexpr int64_t long_sums(int64_t M, int64_t columns, int64_t tokens) {
    constexpr int64_t kSize = sizeof(Compute<X>) / sizeof(X);
    return tokens > kLong ? whole_lines(M * columns * kSize) : 0;
  }
  // `widest`: the columns of the widest b. `rounded`: whether results are of a storage type.
  static constexpr int64_t scratch_bytes(int64_t widest, int64_t columns, int64_t tokens,
                                         bool rounded) {
    const int64_t right = kDepth * Panels<X>::padded(min(widest, kColumns));
    return (long_sums(kMostRows, columns, tokens) + left(kMostRows) + right) * sizeof(X) +
           (rounded ? kMostRows * columns * sizeof(Compute<X>) : 0);
  }

 private:
  static constexpr int64_t whole_lines(int64_t count) {
    constexpr int64_t kLine = kCacheLine / sizeof(X);
    return (count + kLine - 1) / kLine * kLine;
  }
};

// A row of a right factor: values, times the two masks that are not null.
template <class S>
struct TokenRow {
  using C = Compute<S>;
  const S* values;  // null: zeros
  const uint8_t* dropped;
  const C* factors;
  C scale;  // of `dropped`

  FUSEDRNN_INLINE Vec<C> load_from(int64_t n, int64_t lanes) const {
    Vec<C> v = values ? load(values + n, lanes) : Vec<C>{};
    for (int i = 0; dropped && i < Lanes<C>::kWidth && i < lanes; i++)
      v[i] *= dropped[n + i] * scale;
    return factors ? v * load(factors + n, lanes) : v;
  }
  FUSEDRNN_INLINE void prefetch(int64_t n, int64_t count) const {
    const char* const first = reinterpret_cast<const char*>(values + n);
    for (int64_t i = 0; values && i < count * int64_t(sizeof(S)); i += kCacheLine)
      __builtin_prefetch(first + i);
  }
};

// Packs the left factor of some tokens, M values each: token(k) points to those of the k-th. The
// result is a block of rows after the other, [k][rows of the block], as `multiply` takes them.
template <class X, class Token>
void pack_left(X* dst, int64_t M, int64_t tokens, Token token) {
  using C = Compute<X>;
  constexpr int w = Lanes<X>::kWidth;
  const int64_t K = operands<X>(tokens);
  for (int64_t k = 0; k < K; k++) {
    // The tokens of one operand. Zeros replace a missing second one.
    const int64_t first = k * kDepth<X>, second = min(first + 1, tokens - 1);
    const bool pair = second > first;
    const auto *a1 = token(first), *a2 = token(second);
    X row[Outer<X>::kMostRows + w];
    for (int64_t m = 0; m < M; m += w)
      store(row + m,
            operand<X>(load(a1 + m, M - m), pair ? load(a2 + m, M - m) : Vec<C>{}).plane[0]);
    const RowBlocks blocks(M);
    for (int64_t m = 0, i = 0; i < blocks.count; i++) {
      const int64_t rows = blocks.rows + (i < blocks.higher);
      X* const block = dst + m * K + k * rows;
      if (rows == kRows) {  // a size the compiler knows
        std::memcpy(block, row + m, kRows * sizeof(X));
      } else {
        for (int64_t r = 0; r < rows; r++) block[r] = row[m + r];
      }
      m += rows;
    }
  }
}

// Packs it for tiles: M rows of `ld` operands. If `far`, a group of tokens is prefetched while the
// one before it is packed.
template <class X, class Token>
void pack_left_tiles(X* dst, int64_t ld, int64_t M, int64_t tokens, Token token, bool far) {
  using C = Compute<X>;
  constexpr int w = Lanes<X>::kWidth, kGroup = w * kDepth<X>;
  const int64_t groups = operands<X>(tokens) / kPlanes<X> / w;
  decltype(token(0)) pointers[2][kGroup];
  auto point = [&](int64_t group) {
    for (int i = 0; i < kGroup; i++) {
      const int64_t which = group * kGroup + i;
      pointers[group % 2][i] = which < tokens ? token(which) : nullptr;
    }
  };
  point(0);
  for (int64_t group = 0; group < groups; group++) {
    point(group + 1);
    const auto *const now = pointers[group % 2], *const next = pointers[(group + 1) % 2];
    for (int64_t m = 0; m < M; m += w) {
      if (far && m * sizeof(*next[0]) % kCacheLine == 0)
        for (int i = 0; i < kGroup; i++) __builtin_prefetch(next[i] + m);
      auto values = [&](int i) { return now[i] ? load(now[i] + m, M - m) : Vec<C>{}; };
      Vec<X> block[kPlanes<X>][w];
      transpose_block<X>(
          block,
          [&](int i) {
            return operand<X>(values(i * kDepth<X>), values(i * kDepth<X> + kDepth<X> - 1));
          },
          FirstIndices<w>{});
      for (int p = 0; p < kPlanes<X>; p++)
        for (int64_t i = 0; i < w && m + i < M; i++)
          store(dst + (m + i) * ld + p * (ld / kPlanes<X>)+group * w, block[p][i]);
    }
  }
}

// Packs the right factor: `cols` columns from n0 on of rows[k], the k-th token's. Later rows are
// prefetched if `far`.
template <class X, class Row>
void pack_right(X* dst, int64_t n0, int64_t cols, int64_t tokens, const Row* rows, bool far) {
  using P = Panels<X>;
  using C = Compute<X>;
  constexpr int64_t kAhead = 16;
  const int64_t K = operands<X>(tokens);
  for (int64_t k = 0; k < K / kPlanes<X>; k++) {
    const int64_t first = k * kDepth<X>, second = first + kDepth<X> - 1;
    const Row row1 = rows[min(first, tokens - 1)], row2 = rows[min(second, tokens - 1)];
    for (int64_t i = first; far && i <= second && i + kAhead < tokens; i++)
      rows[i + kAhead].prefetch(n0, cols);
    for (int64_t n = 0; n < cols; n += P::kWidth) {
      const int64_t panel = n / P::kColumns * P::kColumns,
                    width = min(P::kColumns, P::padded(cols - panel)), lanes = cols - n;
      const Operands<X> both =
          operand<X>(first < tokens ? row1.load_from(n0 + n, lanes) : Vec<C>{},
                     second < tokens ? row2.load_from(n0 + n, lanes) : Vec<C>{});
      for (int p = 0; p < kPlanes<X>; p++)
        store(dst + panel * K + P::row(k, p) * width + n - panel, both.plane[p]);
    }
  }
}

// dst [M, cols] = the product of the packed factors of `count` tokens + addend; rows of N values.
// `chain` tokens are summed at a time without tiles.
template <class X>
FUSEDRNN_INLINE void multiply_block(int64_t M, int64_t cols, int64_t count, const X* left,
                                    const X* right, Compute<X>* dst, int64_t N,
                                    const Compute<X>* addend, int64_t chain) {
  using P = Panels<X>;
  const int64_t K = operands<X>(count);
  if constexpr (kPlanes<X> > 1) {
    tile_product<true>(M, cols, K, left, Outer<X>::kRow, right, dst, N, {addend, N}, {});
  } else if constexpr (kTiled<X>) {
    gemm(M, cols, count, left, Outer<X>::kRow, right, dst, N, {addend, N}, chain);
  } else {
    auto packed = [&](int64_t m, int64_t rows, int64_t k) {
      return Left<X>{left + m * K + k * rows, 1, rows, K};
    };
    for (int64_t n = 0; n < cols; n += P::kColumns) {
      const int64_t width = min(P::kColumns, cols - n);
      with_panel<X>(width, [&](auto vectors) __attribute__((always_inline)) {
        multiply_panel<X, vectors.value>(M, K, chain, packed, right + n * K, dst + n, N, width,
                                         {addend ? addend + n : nullptr, N});
      });
    }
  }
}

// dst [M, N] of a few tokens without packing, whose number is that of the indices. Rows of dst are
// written one after the other, as fast as memory takes them.
template <class D, class LeftRow, class Row, int... I>
void outer_products_of_few(int64_t M, int64_t N, LeftRow left_row, Row row, D* dst, Indices<I...>) {
  using C = Compute<D>;
  constexpr int w = Lanes<C>::kWidth;
  const decltype(left_row(0)) a[] = {left_row(I)...};
  const decltype(row(0)) b[] = {row(I)...};
  for (int64_t m = 0; m < M; m++, dst += N) {
    const Vec<C> factor[] = {broadcast<C>(to_compute(a[I][m]))...};
    auto step = [&](int64_t n, int64_t lanes) __attribute__((always_inline)) {
      Vec<C> sum{};
      ((sum += factor[I] * b[I].load_from(n, lanes)), ...);
      store(dst + n, sum, lanes);
    };
    int64_t n = 0;
    for (; n + w <= N; n += w) step(n, w);
    if (n < N) step(n, N - n);
  }
}

// Adds up `tokens` products: left_row(k) points to the M values of a of the k-th token.
// each_right(f) calls f(N, row, dst) for every b, where row(k) returns the TokenRow of the k-th
// token's N values. Results are of type S if `rounded`, else of the compute type. `scratch` has
// Outer::scratch_bytes.
template <class S, class LeftRow, class EachRight>
void outer_products(int64_t tokens, int64_t M, LeftRow left_row, Operand<S>* scratch, bool rounded,
                    EachRight each_right) {
  using X = Operand<S>;
  using C = Compute<S>;
  using O = Outer<X>;
  auto few = [&](auto count) {
    each_right([&](int64_t N, auto row, void* dst) {
      if (rounded)
        outer_products_of_few(M, N, left_row, row, static_cast<S*>(dst), count);
      else
        outer_products_of_few(M, N, left_row, row, static_cast<C*>(dst), count);
    });
  };
  if (tokens == 1) return few(FirstIndices<1>{});
  if (tokens == 2) return few(FirstIndices<2>{});
  int64_t columns = 0, widest = 0;
  each_right([&](int64_t N, auto, void*) { columns += N, widest = max(widest, N); });
  // Sums of kLong tokens, which are added to dst when they are complete.
  C* const long_sums = reinterpret_cast<C*>(scratch);
  X* const left = scratch + O::long_sums(M, columns, tokens);
  X* const right = left + O::left(M);
  C* const unrounded =
      reinterpret_cast<C*>(right + O::kDepth * Panels<X>::padded(min(widest, O::kColumns)));
  // Whether b lies beyond L2, and a with it, which is seldom narrower.
  constexpr int64_t kFarBytes = 4 << 20;
  const bool far = tokens * columns * int64_t(sizeof(C)) > kFarBytes;
  // A chain rounds about as often as the one that it is added to.
  const int64_t chain = max(8, min(kShortSum, tokens / 8));
  for (int64_t k0 = 0; k0 < tokens; k0 += O::kTokens) {
    const int64_t count = min(O::kTokens, tokens - k0);
    auto token = [&](int64_t k) { return left_row(k0 + k); };
    if constexpr (kTiled<X>)
      pack_left_tiles(left, O::kRow, M, count, token, far);
    else
      pack_left(left, M, count, token);
    const bool begins = k0 % O::kLong == 0,
               ends = (k0 + O::kTokens) % O::kLong == 0 || k0 + count == tokens;
    int64_t done = 0;  // sums of the b before
    each_right([&](int64_t N, auto row, void* result) {
      C* const dst = rounded ? unrounded + done : static_cast<C*>(result);
      C* const sums = k0 < O::kLong ? dst : long_sums + done;
      done += M * N;
      decltype(row(k0)) rows[O::kTokens];
      for (int64_t k = 0; k < count; k++) rows[k] = row(k0 + k);
      for (int64_t n0 = 0; n0 < N; n0 += O::kColumns) {
        const int64_t cols = min(O::kColumns, N - n0);
        pack_right(right, n0, cols, count, rows, far);
        multiply_block(M, cols, count, left, right, sums + n0, N, begins ? nullptr : sums + n0,
                       chain);
      }
      for (int64_t i = 0; sums != dst && ends && i < M * N; i++) dst[i] += sums[i];
      if (rounded && k0 + count == tokens) convert_row(static_cast<S*>(result), dst, M * N);
    });
  }
  if (tokens > 0) return;
  each_right([&](int64_t N, auto, void* dst) {
    std::memset(dst, 0, M * N * (rounded ? sizeof(S) : sizeof(C)));
  });
}

}  // namespace
