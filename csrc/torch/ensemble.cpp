#include "torch/ensemble.h"

#include "torch/call.h"

namespace fusedrnn {
namespace {

// The rows, weights and results of each of an ensemble's weights: row b has weights b % count.
class Ensemble {
 public:
  explicit Ensemble(const Inputs& in)
      : in_(in), count_(in.weights[0].size(0)), tokens_(in.batch_sizes ? 0 : 1) {
    FUSEDRNN_EXPECT(count_ > 0, "fusedrnn: expected weights of an ensemble, got none");
    for (const Tensor& w : in.weights)
      FUSEDRNN_EXPECT(w.dim() > 1 && w.size(0) == count_, "fusedrnn: expected ", count_,
                      " of each weight, got one of shape ", show(w));
    if (!in.batch_sizes) return;
    sizes_ = torch::stable::clone(
        as_int64(*in.batch_sizes, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
    int64_t* const sizes = static_cast<int64_t*>(sizes_->mutable_data_ptr());
    for (int64_t t = 0; t < sizes_->numel(); t++) {
      check_rows(sizes[t]);
      sizes[t] /= count_;
    }
  }

  int64_t count() const { return count_; }
  int64_t tokens() const { return tokens_; }  // the dimension of rows or tokens of x

  // Every count-th row of a dimension, from m on; a view.
  Tensor rows(const Tensor& t, int64_t dim, int64_t m) const {
    FUSEDRNN_EXPECT(dim < t.dim(), "fusedrnn: expected more than ", dim, " dimensions, got shape ",
                    show(t));
    check_rows(t.size(dim));
    std::vector<int64_t> sizes{t.sizes().begin(), t.sizes().end()};
    sizes[dim] /= count_;
    sizes.insert(sizes.begin() + dim + 1, count_);
    return torch::stable::select(torch::stable::reshape(t, sizes), dim + 1, m);
  }
  OptionalTensor rows(const OptionalTensor& t, int64_t dim, int64_t m) const {
    return t ? OptionalTensor(rows(*t, dim, m)) : std::nullopt;
  }

  Inputs inputs(int64_t m) const {
    Inputs own{rows(in_.x, tokens_, m), rows(in_.hx, 1, m), rows(in_.cx, 1, m)};
    for (const Tensor& w : in_.weights) own.weights.push_back(torch::stable::select(w, 0, m));
    own.batch_sizes = sizes_;
    own.lengths = rows(in_.lengths, 0, m), own.resets = rows(in_.resets, tokens_, m);
    const RegulariserTensors& r = in_.regularisers;
    own.regularisers = r;
    own.regularisers.mask = rows(r.mask, 1, m), own.regularisers.h_mask = rows(r.h_mask, 1, m);
    own.regularisers.zone_h = rows(r.zone_h, 1, m), own.regularisers.zone_c = rows(r.zone_c, 1, m);
    return own;
  }

  // The result whose rows are those of `parts`; a tensor of one dimension is empty, or none.
  Tensor joined(const std::vector<Tensor>& parts, int64_t dim) const {
    if (!parts[0].defined() || parts[0].dim() == 1) return parts[0];
    Tensor all = larger(parts[0], dim);
    for (int64_t m = 0; m < count_; m++) {
      Tensor own = rows(all, dim, m);
      torch::stable::copy_(own, parts[m]);
    }
    return all;
  }
  // The reserves, one after the other.
  Tensor joined_reserve(const std::vector<Tensor>& parts) const {
    if (!parts[0].defined()) return parts[0];
    Tensor all = larger(parts[0], 0);
    for (int64_t m = 0; m < count_; m++) {
      Tensor own = reserve(all, m);
      torch::stable::copy_(own, parts[m]);
    }
    return all;
  }
  Tensor reserve(const Tensor& all, int64_t m) const {
    check_rows(all.size(0));
    Tensor whole = all;
    const int64_t rows = all.size(0) / count_;
    return torch::stable::narrow(whole, 0, m * rows, rows);
  }

 private:
  void check_rows(int64_t rows) const {
    FUSEDRNN_EXPECT(rows % count_ == 0, "fusedrnn: expected weights of an ensemble that divides ",
                    rows, " rows, got ", count_);
  }
  Tensor larger(const Tensor& part, int64_t dim) const {
    std::vector<int64_t> sizes{part.sizes().begin(), part.sizes().end()};
    sizes[dim] *= count_;
    return torch::stable::new_empty(part, sizes);
  }

  const Inputs& in_;
  const int64_t count_, tokens_;
  OptionalTensor sizes_;
};

template <size_t i, class Outputs>
std::vector<Tensor> each(const std::vector<Outputs>& all) {
  std::vector<Tensor> found;
  for (const Outputs& one : all) found.push_back(std::get<i>(one));
  return found;
}

}  // namespace

ForwardOutputs forward_each(const Inputs& in, const Config& config, Save save,
                            ForwardFunction& run) {
  const Ensemble ensemble(in);
  std::vector<ForwardOutputs> all;
  for (int64_t m = 0; m < ensemble.count(); m++)
    all.push_back(run(ensemble.inputs(m), config, save));
  const int64_t tokens = ensemble.tokens();
  return {ensemble.joined(each<0>(all), tokens),     ensemble.joined(each<1>(all), 1),
          ensemble.joined(each<2>(all), 1),          ensemble.joined_reserve(each<3>(all)),
          ensemble.joined(each<4>(all), tokens + 1), ensemble.joined(each<5>(all), tokens + 1)};
}

BackwardOutputs backward_each(const Inputs& in, const Config& config, const OutputGradients& grad,
                              const SavedForBackward& saved, const Wanted& wanted,
                              BackwardFunction& run) {
  const Ensemble ensemble(in);
  const int64_t count = ensemble.count(), tokens = ensemble.tokens();
  FUSEDRNN_EXPECT(wanted.members % count == 0, "fusedrnn: expected members of each of ", count,
                  " weights, got ", wanted.members);
  std::vector<BackwardOutputs> all;
  for (int64_t m = 0; m < count; m++) {
    auto states = [&](const OptionalTensor& t) {
      if (!t || t->dim() == 1) return t;
      return OptionalTensor(torch::stable::contiguous(ensemble.rows(*t, tokens + 1, m)));
    };
    const OutputGradients own{ensemble.rows(grad.y, tokens, m), ensemble.rows(grad.hn, 1, m),
                              ensemble.rows(grad.cn, 1, m), ensemble.rows(grad.hs, tokens + 1, m),
                              ensemble.rows(grad.cs, tokens + 1, m)};
    const SavedForBackward kept{torch::stable::contiguous(ensemble.rows(saved.y, tokens, m)),
                                ensemble.reserve(saved.reserve, m), states(saved.hs),
                                states(saved.cs)};
    all.push_back(
        run(ensemble.inputs(m), config, own, kept, {wanted.needs, wanted.members / count}));
  }
  std::vector<Tensor> weights;
  for (size_t i = 0; i < in.weights.size(); i++) {
    std::vector<Tensor> parts;
    for (const BackwardOutputs& one : all) {
      const Tensor& part = std::get<3>(one)[i];
      parts.push_back(wanted.members || !wanted.needs[3 + i] ? part
                                                             : torch::stable::unsqueeze(part, 0));
    }
    weights.push_back(ensemble.joined(parts, 0));
  }
  return {ensemble.joined(each<0>(all), tokens), ensemble.joined(each<1>(all), 1),
          ensemble.joined(each<2>(all), 1), weights};
}

}  // namespace fusedrnn
