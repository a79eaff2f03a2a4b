// The index arrays of a Sequence, and of integer input.
#pragma once
#include <vector>

#include "cpu/call.h"

namespace fusedrnn {

// The memory that a Sequence and a OneHot point to.
struct TokenIndices {
  std::vector<int64_t> offset, length, order;
  std::vector<int64_t> value, which, begin, token;
};

// The tokens that exist of a member, whose rows are every members-th, in storage order: what its
// weight gradients are summed over.
struct MemberTokens {
  std::vector<int64_t> step, row;
  std::vector<int64_t> value, begin, token;  // of integer input: as those of TokenIndices

  // The sequence and integers with these tokens only.
  Sequence of(Sequence) const;
  OneHot of(OneHot) const;
};

// Each sets the Sequence's offset, length and order; steps, batch and tokens are set already.
void index_padded(Sequence&, TokenIndices&);
void index_padded(Sequence&, TokenIndices&, std::vector<int64_t> lengths);
void index_packed(Sequence&, TokenIndices&, const std::vector<int64_t>& batch_sizes);
// Puts the rows of each of an ensemble's weights, every ensemble-th, one after the other.
void order_by_weights(Sequence&, TokenIndices&, int64_t ensemble);

std::vector<MemberTokens> tokens_of_members(const Sequence&, const TokenIndices&, const OneHot&,
                                            int64_t members);

// Of integer input [tokens]: its distinct values, and the tokens that exist sorted by theirs. A
// value outside [0, input_size) is an exception, as for torch.nn.Embedding.
OneHot sort_by_value(const Sequence&, TokenIndices&, const int64_t* values, int64_t input_size);

}  // namespace fusedrnn
