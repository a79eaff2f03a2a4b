#include "cpu/run/sequence.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace fusedrnn {
namespace {

void set_pointers(Sequence& s, const TokenIndices& in) {
  s.offset = in.offset.data(), s.length = in.length.data(), s.order = in.order.data();
}

void set_padded_offsets(const Sequence& s, TokenIndices& in) {
  in.offset.resize(s.batch ? s.steps : 0);  // an empty batch may have any number of steps
  for (size_t t = 0; t < in.offset.size(); t++) in.offset[t] = t * s.batch;
}

void order_rows(const Sequence& s, TokenIndices& in) {
  in.order.resize(s.batch);
  std::iota(in.order.begin(), in.order.end(), 0);
}

// f(step, row) for every token that exists, in storage order.
template <class F>
void each_token(const Sequence& s, const TokenIndices& in, F f) {
  for (size_t t = 0; t < in.offset.size(); t++)
    for (int64_t b = 0; b < s.batch; b++)
      if (int64_t(t) < in.length[b]) f(t, b);
}

}  // namespace

void index_padded(Sequence& s, TokenIndices& in) {
  set_padded_offsets(s, in);
  in.length.assign(s.batch, s.steps);
  order_rows(s, in);
  set_pointers(s, in);
}

void index_padded(Sequence& s, TokenIndices& in, std::vector<int64_t> lengths) {
  set_padded_offsets(s, in);
  in.length = std::move(lengths);
  order_rows(s, in);
  std::stable_sort(in.order.begin(), in.order.end(),
                   [&](int64_t i, int64_t j) { return in.length[i] > in.length[j]; });
  set_pointers(s, in);
}

void index_packed(Sequence& s, TokenIndices& in, const std::vector<int64_t>& batch_sizes) {
  in.offset.resize(s.batch ? s.steps : 0);
  for (size_t t = 1; t < in.offset.size(); t++)
    in.offset[t] = in.offset[t - 1] + batch_sizes[t - 1];
  in.length.assign(s.batch, 0);
  for (int64_t t = s.steps - 1, b = 0; t >= 0; t--)
    for (; b < batch_sizes[t]; b++) in.length[b] = t + 1;
  order_rows(s, in);  // packed rows are sorted
  set_pointers(s, in);
}

void order_by_weights(Sequence& s, TokenIndices& in, int64_t ensemble) {
  if (ensemble == 1) return;
  std::vector<int64_t> next(ensemble), ordered(s.batch);
  for (int64_t i = 0; i < ensemble; i++) next[i] = i * (s.batch / ensemble);
  for (int64_t row : in.order) ordered[next[row % ensemble]++] = row;
  in.order = std::move(ordered);
  set_pointers(s, in);
}

Sequence MemberTokens::of(Sequence s) const {
  s.valid = step.size(), s.valid_step = step.data(), s.valid_row = row.data();
  return s;
}

OneHot MemberTokens::of(OneHot x) const {
  x.distinct = value.size(), x.value = value.data();
  x.begin = begin.data(), x.token = token.data();
  return x;
}

std::vector<MemberTokens> tokens_of_members(const Sequence& s, const TokenIndices& in,
                                            const OneHot& x, int64_t members) {
  std::vector<MemberTokens> all(members);
  std::vector<int64_t> member(x.value ? s.tokens : 0);  // of each token
  each_token(s, in, [&](int64_t t, int64_t b) {
    MemberTokens& own = all[b % members];
    own.step.push_back(t), own.row.push_back(b);
    if (x.value) member[s.token(t, b)] = b % members;
  });
  for (int64_t i = 0; i < x.distinct; i++)
    for (int64_t k = x.begin[i]; k < x.begin[i + 1]; k++) {
      MemberTokens& own = all[member[x.token[k]]];
      if (own.value.empty() || own.value.back() != x.value[i])
        own.value.push_back(x.value[i]), own.begin.push_back(own.token.size());
      own.token.push_back(x.token[k]);
    }
  for (MemberTokens& own : all)
    if (x.value) own.begin.push_back(own.token.size());
  return all;
}

OneHot sort_by_value(const Sequence& s, TokenIndices& in, const int64_t* values,
                     int64_t input_size) {
  std::vector<int64_t> place(input_size + 1);  // first how many tokens have a value
  each_token(s, in, [&](int64_t t, int64_t b) {
    const int64_t value = values[s.token(t, b)];
    if (value < 0 || value >= input_size)
      throw std::out_of_range("fusedrnn: index " + std::to_string(value) +
                              " is out of range for input_size " + std::to_string(input_size) +
                              ": integers stand for one-hot vectors, features need input.float()");
    place[value]++;
  });
  in.begin.push_back(0);
  for (int64_t v = 0; v < input_size; v++) {
    if (!place[v]) continue;
    in.begin.push_back(in.begin.back() + place[v]);
    place[v] = in.value.size(), in.value.push_back(v);
  }
  in.which.resize(s.tokens), in.token.resize(in.begin.back());
  std::vector<int64_t> next(in.begin);
  each_token(s, in, [&](int64_t t, int64_t b) {
    const int64_t i = s.token(t, b);
    in.which[i] = place[values[i]];
    in.token[next[in.which[i]]++] = i;
  });
  return {int64_t(in.value.size()), in.value.data(), in.which.data(), in.begin.data(),
          in.token.data()};
}

}  // namespace fusedrnn
