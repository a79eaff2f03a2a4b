// The kernels of one instruction set: FUSEDRNN_ISA names it, and the build compiles this file once
// for each with that set's compiler flags.
//
// Every function has internal linkage (see simd.h). The table at the end is all that leaves.
#include "cpu/backward.h"
#include "cpu/direct.h"
#include "cpu/forward.h"
#include "cpu/weight_grad.h"

#define FUSEDRNN_CONCAT_(a, b) a##b
#define FUSEDRNN_CONCAT(a, b) FUSEDRNN_CONCAT_(a, b)
#define FUSEDRNN_STRING_(a) #a
#define FUSEDRNN_STRING(a) FUSEDRNN_STRING_(a)

namespace {

// Calls f with a value of the problem's storage type, and with its cell.
template <class F>
FUSEDRNN_INLINE auto with_dtype(DType dtype, F f) {
  (void)dtype;
  // dispatch.cpp asks variants with bfloat16 for nothing else, but one with tiles for float32 too.
#if defined(__AMX_BF16__)
  if (dtype == DType::kFloat32) return f(float{});
#endif
#if defined(__AVX512BF16__)
  return f(BFloat16{});
#else
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    default:
      return f(Float16{});
  }
#endif
}
template <class F>
FUSEDRNN_INLINE auto with_cell(Cell cell, F f) {
  switch (cell) {
#define CELL(mode, type) \
  case Cell::k##type:    \
    return f(type{});
#include "cells/cells.inc"
#undef CELL
    default:
      __builtin_unreachable();
  }
}
template <class F>
FUSEDRNN_INLINE auto with_plain(const Problem& p, F f) {
  return with_cell(
      p.cell, [&](auto cell) { return with_dtype(p.dtype, [&](auto s) { return f(cell, s); }); });
}
template <class F>
FUSEDRNN_INLINE auto with_both(const Problem& p, F f) {
  if (!p.layer_norm) return with_plain(p, f);
  return with_dtype(p.dtype, [&](auto s) {
    return p.cell == Cell::kGru ? f(Normed<Gru>{}, s) : f(Normed<Lstm>{}, s);
  });
}

CpuCosts costs_of(DType dtype) {
  return with_dtype(dtype, [](auto s) {
    using X = Operand<decltype(s)>;
    return CpuCosts{kTiled<X> ? 8 : 1, kPlanes<X> * int64_t(sizeof(Element<X>)),
                    kLoadsQuickly<decltype(s)>};
  });
}
PackedOffsets forward_offsets_of(const Common& a, int64_t layer) {
  return with_dtype(a.problem.dtype,
                    [&](auto s) { return forward_offsets<Operand<decltype(s)>>(a, layer); });
}
PackedOffsets backward_offsets_of(const Problem& p, int64_t layer) {
  return with_dtype(p.dtype,
                    [&](auto s) { return backward_offsets<Operand<decltype(s)>>(p, layer); });
}
void pack_forward_of(const Forward& a, int64_t which, void* to, int64_t part, int64_t parts) {
  with_dtype(a.problem.dtype,
             [&](auto s) { pack_forward<decltype(s)>(a, which, to, part, parts); });
}
void pack_backward_of(const Backward& a, int64_t which, void* to, int64_t part, int64_t parts) {
  with_dtype(a.problem.dtype,
             [&](auto s) { pack_backward<decltype(s)>(a, which, to, part, parts); });
}
RowsScratch rows_scratch_of(const Problem& p, int64_t rows) {
  return with_dtype(p.dtype, [&](auto s) {
    Scratch common[2]{}, own[2]{};
    ForwardBuffers<decltype(s)>(p, rows, common[0], own[0]);
    BackwardBuffers<decltype(s)>(p, rows, common[1], own[1]);
    own[0].take<ForwardRow<decltype(s)>>(rows);
    return RowsScratch{max(common[0].used, common[1].used), max(own[0].used, own[1].used)};
  });
}
void forward_of(const Forward& a, const Rows& rows, Member& me) {
  const TileSetup tiles;
  with_both(a.problem,
            [&](auto cell, auto s) { forward_rows<decltype(cell), decltype(s)>(a, rows, me); });
}
void backward_of(const Backward& a, const Rows& rows, Member& me) {
  const TileSetup tiles;
  with_both(a.problem,
            [&](auto cell, auto s) { backward_rows<decltype(cell), decltype(s)>(a, rows, me); });
}
RowsScratch direct_scratch_of(const Problem& p, int64_t rows) {
  return with_dtype(p.dtype, [&](auto s) {
    using C = Compute<decltype(s)>;
    Scratch common{}, own{};
    common.take<C>(rows * traits(p.cell).gates * Panels<C>::padded(p.hidden_size));
    own.take<C>(rows * max(p.input_size, p.num_directions * p.out_size()));
    return RowsScratch{common.used, own.used};
  });
}
void direct_begin_of(const Forward& a, const DirectStep& step) {
  with_dtype(a.problem.dtype, [&](auto s) {
    using S = decltype(s);
    using C = Compute<S>;
    read_states<S>(a, step.layer, step.dir, 0, a.seq.batch, static_cast<C*>(step.h_prev),
                   a.problem.hidden_size, static_cast<C*>(step.c));
  });
}
void direct_recurrent_of(const Forward& a, const DirectStep& step, int64_t part, int64_t parts) {
  with_plain(a.problem, [&](auto cell, auto s) {
    direct_recurrent<decltype(cell), decltype(s)>(a, step, part, parts);
  });
}
void direct_step_of(const Forward& a, const DirectStep& step, int64_t part, int64_t parts,
                    void* scratch) {
  with_plain(a.problem, [&](auto cell, auto s) {
    direct_step<decltype(cell), decltype(s)>(a, step, part, parts, scratch);
  });
}
void direct_end_of(const Forward& a, const DirectStep& step) {
  with_dtype(a.problem.dtype, [&](auto s) {
    using S = decltype(s);
    using C = Compute<S>;
    write_states<S>(a, step.layer, step.dir, 0, a.seq.batch, static_cast<const C*>(step.h_prev),
                    a.problem.hidden_size, static_cast<const C*>(step.c));
  });
}
int64_t weight_tasks_of(const Problem& p, int64_t threads) {
  return with_dtype(p.dtype, [&](auto s) {
    return weight_tasks<Operand<decltype(s)>>(p, threads) * p.num_directions;
  });
}
int64_t weight_scratch_of(const Problem& p, int64_t layer, int64_t tokens) {
  return with_dtype(p.dtype,
                    [&](auto s) { return weight_scratch<Operand<decltype(s)>>(p, layer, tokens); });
}
void weight_grad_of(const Backward& a, int64_t task, int64_t threads, void* scratch) {
  const TileSetup tiles;
  with_dtype(a.problem.dtype, [&](auto s) { weight_grad<decltype(s)>(a, task, threads, scratch); });
}

}  // namespace

namespace fusedrnn {
extern const Kernels FUSEDRNN_CONCAT(kernels_, FUSEDRNN_ISA);
const Kernels FUSEDRNN_CONCAT(kernels_, FUSEDRNN_ISA) = {
    FUSEDRNN_STRING(FUSEDRNN_ISA),
    kVectorBytes,
    costs_of,
    forward_offsets_of,
    backward_offsets_of,
    pack_forward_of,
    pack_backward_of,
    rows_scratch_of,
    forward_of,
    backward_of,
    direct_scratch_of,
    direct_begin_of,
    direct_recurrent_of,
    direct_step_of,
    direct_end_of,
    weight_tasks_of,
    weight_scratch_of,
    weight_grad_of,
};
}  // namespace fusedrnn
