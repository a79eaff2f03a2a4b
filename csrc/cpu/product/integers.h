// Products of 8-bit weights (words.h) in place, by factors that are rounded to whole numbers: as
// digits of 8 bits (digits.h) or as numbers of 16 (shorts.h).
//
// With s the largest value of a row over a limit, the row's values are s times whole numbers,
// rounded. Sums of these times weights are whole numbers, and exact. So only this rounding, by at
// most s / 2, tells the product from that of float32, and results do not depend on how rows are
// divided. Weights are stored plus 128: the sums start from -128 times the sum of the row.
//
// An infinity is the largest number of a row whose others are 0; a row with a NaN is NaN.
#pragma once
#include "cpu/product/gemm.h"
#include "cpu/product/words.h"

#if defined(__AVX512VNNI__) || (defined(__AVX2__) && !defined(__AVX512F__))
#define FUSEDRNN_INTEGER_PRODUCTS
#endif

#if defined(FUSEDRNN_INTEGER_PRODUCTS)
namespace {

// A storage type: float32, in calls that multiply integers.
struct IntegerFloat {
  float value;
};
template <>
struct Lanes<IntegerFloat> : Lanes<float> {};
template <>
constexpr bool kInPlace<IntegerFloat> = true;

// A vector of rows of W, and where their column begins in C and D.
struct IntegerColumn {
  const char* words;
  Vec<float> scale;
  int64_t column, lanes;
};

}  // namespace

#if defined(__AVX512VNNI__)
#include "cpu/product/digits.h"
#else
#include "cpu/product/shorts.h"
#endif
#endif
