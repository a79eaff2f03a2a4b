// How a GPU computes float32 products over all steps: of the input, and of the gradients.
#pragma once
#include <cstdint>

namespace fusedrnn {

// torch's switches for float32 on CUDA: whether TF32 is permitted.
struct Float32Switches {
  bool recurrent;  // torch.backends.cudnn.rnn.fp32_precision, which also follows cudnn.allow_tf32
  bool products;   // torch.backends.cuda.matmul.fp32_precision, which ATen's products obey
};

// cuDNN obeys the first switch in all products of a layer, and so do these. ATen obeys the second,
// and cannot be asked for TF32 in one product.
enum class Float32Products : int {
  kAten,  // both switches say the same
  // TF32 is permitted to recurrent layers alone: a number is split into two of bfloat16, and tensor
  // cores multiply those. Six more bits are right than in TF32, in one and a half times its time.
  kSplit,
  kFloat64,  // TF32 is permitted to other products alone
};
constexpr Float32Products float32_products(const Float32Switches& permitted, int capability) {
  if (permitted.recurrent == permitted.products) return Float32Products::kAten;
  if (permitted.products) return Float32Products::kFloat64;
  return capability >= 80 ? Float32Products::kSplit : Float32Products::kAten;
}
constexpr const char* in_words(Float32Products products, const Float32Switches& permitted) {
  switch (products) {
    case Float32Products::kSplit:
      return "on tensor cores if large, each number as two of bfloat16, because TF32 is permitted "
             "to recurrent layers";
    case Float32Products::kFloat64:
      return "in float64, because TF32 is permitted to products but not to recurrent layers";
    default:
      return permitted.recurrent && permitted.products ? "in TF32 where the GPU has it"
                                                       : "in float32";
  }
}

// Products of fewer multiplications are not split: passes over both operands would take the time
// that is gained, by an estimate of 45 TFLOPS in float32 and 2 us for a pass.
constexpr int64_t kLeastSplit = int64_t(1) << 27;
// The elements that are split at a time, so that the copies take some 50 MB.
constexpr int64_t kSplitAtOnce = int64_t(1) << 23;

}  // namespace fusedrnn
