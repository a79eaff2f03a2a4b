// The rows of a task, the steps that they take, and the chunks of steps whose tokens a product
// takes together.
#pragma once
#include "cpu/call.h"
#include "cpu/product/operand.h"

namespace {

using namespace fusedrnn;

// Tokens whose input products are computed together: enough rows to amortise reading W_ih, few
// enough that their gates are still in L2 when their steps come.
template <class X>
constexpr int64_t kChunkTokens = kPlanes<X> > 2 ? 128 : 64;

// The rows at places [first, end) of Sequence::order. Step i of a direction is time i or, in the
// reverse direction, counted from the end of the longest row.
struct TaskRows {
  const Sequence& seq;
  int64_t first, count, longest;

  TaskRows(const Sequence& sequence, int64_t begin, int64_t end)
      : seq(sequence),
        first(begin),
        count(end - begin),
        longest(sequence.length[sequence.order[begin]]) {}

  FUSEDRNN_INLINE int64_t row(int64_t r) const { return seq.order[first + r]; }
  FUSEDRNN_INLINE int64_t time(int64_t dir, int64_t step) const {
    return dir == 0 ? step : longest - 1 - step;
  }
  // How many of the rows, which are in order of descending length, have a token at time t.
  FUSEDRNN_INLINE int64_t active(int64_t t) const {
    int64_t n = count;
    while (n > 0 && seq.length[row(n - 1)] <= t) n--;
    return n;
  }
  template <class X>
  FUSEDRNN_INLINE int64_t chunk_steps() const {
    return max(1, kChunkTokens<X> / count);
  }
};

}  // namespace
