// Products over tokens: dst [M, N] = sum over tokens of a[token, m] * b[token, n], of one a with
// several b.
//
// Tokens go block by block. A block's a is packed once, then for each b a block of its columns at a
// time. The blocks of many tokens make a sum of their own before they join what came before, which
// keeps chains of additions short. Tokens are always added in the same order, so results do not
// depend on which rows of a are taken together.
#pragma once
#include "cpu/layer.h"

namespace {

// Sizes of blocks. What is packed has to stay in the second cache beside what is added to; short
// blocks of tokens keep float32's sums exact, and long ones spare sums of the short products of
// bfloat16 being read and written.
template <class X>
struct Outer {
  static constexpr int64_t kHalf = kPlanes<X> > 1 ? 2 : 1;  // three times the bytes
  static constexpr int64_t kTokens = kTiled<X> ? 512 : 128;
  static constexpr int64_t kLong = 8192;  // tokens whose blocks are added in one chain
  static constexpr int64_t kColumns = kTiled<X> ? 256 / kHalf : 512;
  static constexpr int64_t kMostRows = kTiled<X> ? 512 / kHalf : 64 * kRows;  // M

  // Operands of a row of a, and of all of a block's, as tiles take them.
  static constexpr int64_t kDepth = operands<X>(kTokens), kRow = kDepth + kRowPad<X>;
  static constexpr int64_t left(int64_t M) {
    return kTiled<X> ? (M + kSpareRows<X>)*kRow : kDepth * M;
  }
  // `all`: the columns of all b, `widest` those of the widest one.
  static constexpr int64_t scratch_bytes(int64_t widest, int64_t all, int64_t tokens) {
    const int64_t columns = Panels<X>::padded(min(widest, kColumns));
    const int64_t sums = tokens > kLong ? kMostRows * all * sizeof(Compute<X>) : 0;
    return (kDepth * columns + left(kMostRows)) * sizeof(X) + sums + 192;
  }
};

// Packs the left factor of some tokens, M values of each: token(k) points to those of the k-th. In
// blocks of rows for the registers, [k][rows of a block] each.
template <class X, class Token>
void pack_left(X* to, int64_t M, int64_t tokens, Token token) {
  using C = Compute<X>;
  constexpr int w = Lanes<X>::kWidth;
  const int64_t K = operands<X>(tokens);
  for (int64_t k = 0; k < K; k++) {
    // The tokens of one operand; without a second one zeros are in its place.
    const int64_t first = k * kDepth<X>, second = min(first + 1, tokens - 1);
    const bool pair = second > first;
    const auto *a1 = token(first), *a2 = token(second);
    X row[Outer<X>::kMostRows + w];
    for (int64_t m = 0; m < M; m += w)
      store(row + m,
            operand<X>(load(a1 + m, M - m), pair ? load(a2 + m, M - m) : Vec<C>{}).plane[0]);
    each_block(M, [&](int64_t m, int64_t rows) {
      X* at = to + m * K + k * rows;
      if (rows == kRows) {  // a size the compiler knows
        std::memcpy(at, row + m, kRows * sizeof(X));
      } else {
        for (int64_t r = 0; r < rows; r++) at[r] = row[m + r];
      }
    });
  }
}

// The same for tiles: M rows of `ld` operands.
template <class X, class Token>
void turn_left(X* to, int64_t ld, int64_t M, int64_t tokens, Token token) {
  using C = Compute<X>;
  constexpr int w = Lanes<X>::kWidth;
  for (int64_t k = 0; k < operands<X>(tokens) / kPlanes<X>; k += w) {
    decltype(token(0)) at[w * kDepth<X>];
    for (int i = 0; i < w * kDepth<X>; i++) {
      const int64_t which = k * kDepth<X> + i;
      at[i] = which < tokens ? token(which) : nullptr;
    }
    for (int64_t m = 0; m < M; m += w) {
      auto values = [&](int i) { return at[i] ? load(at[i] + m, M - m) : Vec<C>{}; };
      Vec<X> block[kPlanes<X>][w];
      turn_block<X>(
          block,
          [&](int i) {
            return operand<X>(values(i * kDepth<X>), values(i * kDepth<X> + kDepth<X> - 1));
          },
          FirstIndices<w>{});
      for (int p = 0; p < kPlanes<X>; p++)
        for (int64_t i = 0; i < w && m + i < M; i++)
          store(to + (m + i) * ld + p * (ld / kPlanes<X>)+k, block[p][i]);
    }
  }
}

// Packs the right factor: `cols` columns of what row(k) loads of the k-th token.
template <class X, class Row>
void pack_right(X* to, int64_t cols, int64_t tokens, Row row) {
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
        store(to + panel * K + P::row(k, p) * width + n - panel, both.plane[p]);
    }
  }
}

// M rows of a, whose tokens are `lda` values apart. each_right(f) calls f(N, row, dst) for every b:
// row(k) gives a function (n, lanes) that loads from the k-th valid token's N values.
template <class X, class A, class EachRight>
void outer_products(const Sequence& seq, int64_t M, const A* a, int64_t lda, Scratch scratch,
                    EachRight each_right) {
  using C = Compute<X>;
  using P = Panels<X>;
  using O = Outer<X>;
  // Of few tokens chains are short too: theirs and the one that they join round about as much.
  const int64_t chain = max(8, min(kLongestSum, seq.valid / 8));
  int64_t all = 0;  // columns
  each_right([&](int64_t N, auto, C*) { all += N; });
  C* const long_sums = scratch.take<C>(seq.valid > O::kLong ? M * all : 0);
  X* const left = scratch.take<X>(O::left(M));
  X* const right = scratch.take<X>(0);
  for (int64_t k0 = 0; k0 < seq.valid; k0 += O::kTokens) {
    const int64_t tokens = min(O::kTokens, seq.valid - k0), K = operands<X>(tokens);
    auto token = [&](int64_t k) {
      return a + seq.token(seq.valid_step[k0 + k], seq.valid_row[k0 + k]) * lda;
    };
    if constexpr (kTiled<X>)
      turn_left(left, O::kRow, M, tokens, token);
    else
      pack_left(left, M, tokens, token);
    const bool begins = k0 % O::kLong == 0,
               ends = (k0 + O::kTokens) % O::kLong == 0 || k0 + tokens == seq.valid;
    C* next = long_sums;
    each_right([&](int64_t N, auto row, C* dst) {
      C* const sums = k0 < O::kLong ? dst : next;
      next += M * N;
      for (int64_t n0 = 0; n0 < N; n0 += O::kColumns) {
        const int64_t cols = min(O::kColumns, N - n0);
        pack_right(right, cols, tokens, [&](int64_t k) {
          return [from = row(k0 + k), n0](int64_t n, int64_t lanes) { return from(n0 + n, lanes); };
        });
        C* const to = sums + n0;
        const C* const onto = begins ? nullptr : to;
        if constexpr (kPlanes<X> > 1) {
          tile_product(M, cols, K, left, O::kRow, right, to, N, {onto, N}, {}, true);
        } else if constexpr (kTiled<X>) {
          gemm(M, cols, tokens, left, O::kRow, right, to, N, {onto, N});
        } else {
          for (int64_t n = 0; n < cols; n += P::kColumns) {
            const int64_t width = min(P::kColumns, cols - n);
            each_block(M, [&](int64_t m, int64_t rows) {
              C* const at = to + m * N + n;
              Addend<C> add{onto ? at : nullptr, N};
              for (int64_t k = 0; k < K; k += chain, add.at = at)
                multiply_for<X>(rows, width)(min(chain, K - k), left + m * K + k * rows, 1, rows,
                                             right + n * K + k * P::padded(width), at, N, width,
                                             add, left + (m + rows) * K + k * rows);
            });
          }
        }
      }
      for (int64_t i = 0; sums != dst && ends && i < M * N; i++) dst[i] += sums[i];
    });
  }
  if (seq.valid > 0) return;
  each_right([&](int64_t N, auto, C* dst) {
    for (int64_t i = 0; i < M * N; i++) dst[i] = 0;
  });
}

}  // namespace
