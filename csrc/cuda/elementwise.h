// Small kernels between the products and the recurrences. Each enqueues on `stream`, a CUDA stream,
// and returns a cudaError_t, 0 for success. Storage and compute type: see stack.h.
#pragma once
#include <cstdint>

#include "cuda/stack.h"

namespace fusedrnn {

const char* error_text(int error);

// count values from one type to the other; `from` null: zeros.
int to_compute_type(DType, const void* from, void* to, int64_t count, void* stream);
int to_storage_type(DType, const void* from, void* to, int64_t count, void* stream);
// The same of from times mask, of the compute type.
int to_storage_type(DType, const void* from, const void* mask, void* to, int64_t count,
                    void* stream);

// int64 values of the host, by way of the kernel's parameters: nothing waits, and a CUDA graph may
// capture it.
int copy_to_device(const int64_t* host, int64_t* device, int64_t count, void* stream);
// lengths[b] = min(max(given[b], 0), steps): what lies on the device cannot be checked without
// waiting for it.
int clamp_lengths(const int64_t* given, int64_t* lengths, int64_t batch, int64_t steps,
                  void* stream);

// The rows by falling length, those of a length in their order. Rows b with the same b % members
// change places with each other only.
int order_by_length(const int64_t* lengths, int64_t* order, int64_t batch, int64_t members,
                    void* stream);

// out = in times the dropout mask, zeros where a row has no step; storage type [tokens, width].
struct LayerInput {
  DType dtype;
  Tokens tokens;
  const void* in;
  const uint8_t* mask;  // [tokens, width], null: none
  double scale;
  int64_t width;
  void* out;
};
int layer_input(const LayerInput&, void* stream);

// Integers that stand for one-hot vectors of `width`.
struct Integers {
  DType dtype;
  Tokens tokens;
  const int64_t* values;  // [tokens]
  int64_t width;
  int64_t members;  // weights that differ; token i has those of i % members
};

// out = for each token its row of w, which is its vector's product with w; zeros where a row has no
// step. w of the storage type [members, width, columns], out of the compute type [tokens, columns].
// A value without a vector gives NaN, for the host cannot look at it without waiting.
int gather_rows(const Integers&, const void* w, int64_t columns, void* out, void* stream);

// out = where each token's row lies in w, -1 if nowhere. [tokens]
int rows_of_members(const Integers&, int64_t* out, void* stream);

// The gradient of w: out = for each value the sum of its tokens' rows. Integers outside [0, width)
// are left out.
struct RowSums {
  DType dtype;
  int64_t tokens, width, columns;
  const int64_t* values;  // [tokens]
  const void* rows;       // storage type [tokens, stride], zeros where a row has no step
  int64_t stride;
  void* workspace;  // of sum_rows_workspace() bytes
  void* out;        // compute type [width, columns]
};
int64_t sum_rows_workspace(const RowSums&);
int sum_rows(const RowSums&, void* stream);

// The parts that stand for a float32 matrix in a product of bfloat16. With x = high + low, each
// rounded to bfloat16, a b is high high + high low + low high, but for 2^-17 of it: the parts of a
// left operand are {high, high, low}, those of a right one {high, low, high}. Of what is not finite
// the first part alone is not zero.
struct SplitFloat32 {
  int64_t rows, columns;            // at most 2^32 - 1 elements
  int64_t stride;                   // of rows of `in`
  int64_t parts_stride, next_part;  // of rows of `parts`; from one part to the next
  bool left;
  const float* in;
  void* parts;  // bfloat16
};
int split_float32(const SplitFloat32&, void* stream);

// out = d times what forward saved, zeros where a row has no step; d and out of the compute type,
// saved of the storage type, `width` elements of each token. other_d, other_saved: a second product
// that is added, in derivatives; null: none.
struct SavedProduct {
  DType dtype;
  Tokens tokens;
  const void *d, *saved, *other_d, *other_saved;
  int64_t d_stride, saved_stride, width;
  void* out;
};
int times_saved(const SavedProduct&, void* stream);

// out = (a + b) times the dropout mask, which is its gradient, plus c. Compute type, `count`
// elements; out may be a.
struct InputGradient {
  DType dtype;
  const void *a, *b, *c;  // b, c null: zeros
  const uint8_t* mask;    // null: none
  double scale;
  int64_t count;
  void* out;
};
int input_gradient(const InputGradient&, void* stream);

// out = for each token what was multiplied with W_hh there: h of the step before in its direction,
// h0 at a row's first step, zeros where a sequence begins anew, all of them times h_mask. Zeros
// where a row has no step. Storage type [tokens, out], rows `stride` elements apart.
int previous_states(const Layer&, const void* y, void* out, int64_t stride, void* stream);

}  // namespace fusedrnn
