// Outer products summed over tokens: dst [M, N] = sum of a[token, m] * b[token, n], of one a with
// several b.
//
// Tokens are taken in blocks. The a of a block is packed once, each b a block of columns at a time.
// Tokens are always added in the same order, so results do not depend on how columns of a are
// divided into tasks.
#pragma once
#include "cpu/product/gemm.h"

namespace {

// Sizes of blocks. The packed blocks stay in L2 beside the sums. Short blocks of tokens limit the
// rounding error of float32; the products of bfloat16 are fast, and long blocks read and write
// their sums less often.
template <class X>
struct Outer {
  static constexpr int64_t kSplit = kPlanes<X> > 1 ? 2 : 1;  // planes take three times the bytes
  static constexpr int64_t kTokens = kTiled<X> ? 512 : kLongestSum;
  static constexpr int64_t kColumns = kTiled<X> ? 256 / kSplit : 512;
  static constexpr int64_t kMostRows = kTiled<X> ? 512 / kSplit : 64 * kRows;  // M

  // Operands of a block of tokens, and of a row of a for tiles.
  static constexpr int64_t kDepth = operands<X>(kTokens), kRow = kDepth + kRowPad<X>;
  // Operands of a packed block of a, up to whole cache lines.
  static constexpr int64_t left(int64_t M) {
    constexpr int64_t kLine = kCacheLine / sizeof(X);
    return ((kTiled<X> ? (M + kSpareRows<X>)*kRow : kDepth * M) + kLine - 1) / kLine * kLine;
  }
  static constexpr int64_t scratch_bytes(int64_t widest) {
    const int64_t columns = Panels<X>::padded(min(widest, kColumns));
    return (kDepth * columns + left(kMostRows)) * sizeof(X);
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
    each_block(M, [&](int64_t m, int64_t rows) {
      X* const block = dst + m * K + k * rows;
      if (rows == kRows) {  // a size the compiler knows
        std::memcpy(block, row + m, kRows * sizeof(X));
      } else {
        for (int64_t r = 0; r < rows; r++) block[r] = row[m + r];
      }
    });
  }
}

// Packs it for tiles: M rows of `ld` operands.
template <class X, class Token>
void pack_left_tiles(X* dst, int64_t ld, int64_t M, int64_t tokens, Token token) {
  using C = Compute<X>;
  constexpr int w = Lanes<X>::kWidth;
  for (int64_t k = 0; k < operands<X>(tokens) / kPlanes<X>; k += w) {
    decltype(token(0)) values_of[w * kDepth<X>];
    for (int i = 0; i < w * kDepth<X>; i++) {
      const int64_t which = k * kDepth<X> + i;
      values_of[i] = which < tokens ? token(which) : nullptr;
    }
    for (int64_t m = 0; m < M; m += w) {
      auto values = [&](int i) { return values_of[i] ? load(values_of[i] + m, M - m) : Vec<C>{}; };
      Vec<X> block[kPlanes<X>][w];
      transpose_block<X>(
          block,
          [&](int i) {
            return operand<X>(values(i * kDepth<X>), values(i * kDepth<X> + kDepth<X> - 1));
          },
          FirstIndices<w>{});
      for (int p = 0; p < kPlanes<X>; p++)
        for (int64_t i = 0; i < w && m + i < M; i++)
          store(dst + (m + i) * ld + p * (ld / kPlanes<X>)+k, block[p][i]);
    }
  }
}

// Packs the right factor: `cols` columns; row(k) returns a function that loads them from the k-th
// token.
template <class X, class Row>
void pack_right(X* dst, int64_t cols, int64_t tokens, Row row) {
  using P = Panels<X>;
  using C = Compute<X>;
  const int64_t K = operands<X>(tokens);
  for (int64_t k = 0; k < K / kPlanes<X>; k++) {
    const int64_t first = k * kDepth<X>, second = first + kDepth<X> - 1;
    const auto row1 = row(min(first, tokens - 1)), row2 = row(min(second, tokens - 1));
    for (int64_t n = 0; n < cols; n += P::kWidth) {
      const int64_t panel = n / P::kColumns * P::kColumns,
                    width = min(P::kColumns, P::padded(cols - panel)), lanes = cols - n;
      const Operands<X> both = operand<X>(first < tokens ? row1(n, lanes) : Vec<C>{},
                                          second < tokens ? row2(n, lanes) : Vec<C>{});
      for (int p = 0; p < kPlanes<X>; p++)
        store(dst + panel * K + P::row(k, p) * width + n - panel, both.plane[p]);
    }
  }
}

// Adds up `tokens` products: left_row(k) points to the M values of a of the k-th token.
// each_right(f) calls f(N, row, dst) for every b, where row(k) returns a function (n, lanes) that
// loads from the N values of the k-th token. `scratch` has Outer::scratch_bytes.
template <class X, class LeftRow, class EachRight>
void outer_products(int64_t tokens, int64_t M, LeftRow left_row, X* scratch, EachRight each_right) {
  using C = Compute<X>;
  using P = Panels<X>;
  using O = Outer<X>;
  X *const left = scratch, *const right = scratch + O::left(M);
  for (int64_t k0 = 0; k0 < tokens; k0 += O::kTokens) {
    const int64_t count = min(O::kTokens, tokens - k0), K = operands<X>(count);
    auto token = [&](int64_t k) { return left_row(k0 + k); };
    if constexpr (kTiled<X>)
      pack_left_tiles(left, O::kRow, M, count, token);
    else
      pack_left(left, M, count, token);
    each_right([&](int64_t N, auto row, C* dst) {
      for (int64_t n0 = 0; n0 < N; n0 += O::kColumns) {
        const int64_t cols = min(O::kColumns, N - n0);
        pack_right(right, cols, count, [&](int64_t k) {
          return [values = row(k0 + k), n0](int64_t n, int64_t lanes) {
            return values(n0 + n, lanes);
          };
        });
        C* const sums = dst + n0;
        const C* const addend = k0 > 0 ? sums : nullptr;
        if constexpr (kTiled<X>) {
          gemm(M, cols, count, left, O::kRow, right, sums, N, {addend, N});
        } else {
          for (int64_t n = 0; n < cols; n += P::kColumns) {
            const int64_t width = min(P::kColumns, cols - n);
            each_block(M, [&](int64_t m, int64_t rows) {
              const int64_t first = m * N + n;
              multiply_for<X>(rows, width)(K, left + m * K, 1, rows, right + n * K, sums + first, N,
                                           width, {addend ? addend + first : nullptr, N},
                                           left + (m + rows) * K);
            });
          }
        }
      }
    });
  }
  if (tokens > 0) return;
  each_right([&](int64_t N, auto, C* dst) {
    for (int64_t i = 0; i < M * N; i++) dst[i] = 0;
  });
}

}  // namespace
