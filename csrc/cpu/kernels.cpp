// The kernels of one instruction set: FUSEDRNN_ISA names it, and the build compiles this file once
// for each with that set's compiler flags.
//
// Every function has internal linkage (vector/indices.h says why), and the table at the end is all
// that others see.
#include "cpu/pass/backward.h"
#include "cpu/pass/backward_tangent.h"
#include "cpu/pass/forward.h"
#include "cpu/pass/forward_tangent.h"
#include "cpu/pass/forward_unpacked.h"
#include "cpu/pass/weight_grad.h"

#define FUSEDRNN_CONCAT_(a, b) a##b
#define FUSEDRNN_CONCAT(a, b) FUSEDRNN_CONCAT_(a, b)
#define FUSEDRNN_STRING_(a) #a
#define FUSEDRNN_STRING(a) FUSEDRNN_STRING_(a)

namespace {

using Float64 = double;
using Float32 = float;

// Kernels with products of bfloat16 compute nothing else, those on tiles also float32: the rest
// would be as without.
constexpr bool computes(DType dtype) {
  (void)dtype;
#if defined(__AMX_BF16__)
  return dtype == DType::kBFloat16 || dtype == DType::kFloat32;
#elif defined(__AVX512BF16__)
  return dtype == DType::kBFloat16;
#else
  return true;
#endif
}

// Calls f with a value of the problem's storage type, and with its cell.
template <class F>
FUSEDRNN_INLINE auto with_dtype(DType dtype, F f) {
  (void)dtype;
#if defined(__AMX_BF16__)
  if (dtype == DType::kFloat32) return f(float{});
#endif
#if defined(__AVX512BF16__)
  return f(BFloat16{});
#else
  switch (dtype) {
#define DTYPE(name, torch_name, scalar_type, bytes, compute_bytes) \
  case DType::k##name:                                             \
    return f(name{});
#include "plan/dtypes.inc"
#undef DTYPE
    default:
      __builtin_unreachable();
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

// The same for forward, whose storage type also says how weights in fewer bytes are multiplied.
// Kernels multiply words where they compute float32 without planes.
template <class F>
FUSEDRNN_INLINE auto with_forward(const Problem& p, const CpuPass& pass, F f) {
#if defined(FUSEDRNN_INTEGER_PRODUCTS)
  if (pass.product == ProductKind::kIntegers) return f(IntegerFloat{});
#endif
#if defined(__AVX512BF16__)
  if (pass.product == ProductKind::kPairs) return f(PairFloat{});
#else
  if (pass.product == ProductKind::kWords) return f(WordFloat{});
#endif
  return with_dtype(p.dtype, f);
}

CpuCosts costs_of(DType dtype) {
  CpuCosts none{};
#if defined(FUSEDRNN_INTEGER_PRODUCTS)
  if (dtype == DType::kFloat32) none.deepest_integers = kDeepestIntegers;
#endif
#if !defined(__AVX512BF16__)
  none.words = dtype == DType::kFloat32;
#endif
  if (!computes(dtype)) return none;
  return with_dtype(dtype, [&](auto s) {
    using X = Operand<decltype(s)>;
    return CpuCosts{true,
                    kTiled<X>,
                    kTiled<X> ? 8 : 1,
                    kPlanes<X>,
                    kPlanes<X> * int64_t(sizeof(Element<X>)),
                    kLoadsQuickly<decltype(s)> || (kDepth<X> == 2 && kPlanes<X> == 1),
                    none.words,
                    none.deepest_integers};
  });
}
PackedOffsets forward_offsets_of(const Common& a, int64_t layer) {
  return with_forward(a.problem, a.pass,
                      [&](auto s) { return forward_offsets<decltype(s)>(a, layer); });
}
PackedOffsets backward_offsets_of(const Problem& p, int64_t layer) {
  return with_dtype(p.dtype,
                    [&](auto s) { return backward_offsets<Operand<decltype(s)>>(p, layer); });
}
void pack_forward_of(const Forward& a, int64_t which, void* packed, int64_t part, int64_t parts) {
  with_forward(a.problem, a.pass,
               [&](auto s) { ForwardPacking<decltype(s)>(a, which, packed, part, parts).run(); });
}
void pack_backward_of(const Backward& a, int64_t which, void* packed, int64_t part, int64_t parts) {
  with_dtype(a.problem.dtype,
             [&](auto s) { pack_backward<decltype(s)>(a, which, packed, part, parts); });
}
RowsScratch rows_scratch_of(const Problem& p, const CpuPass& pass, int64_t rows) {
  return with_forward(p, pass, [&](auto s) {
    Scratch common[2]{}, own[2]{};
    ForwardBuffers<decltype(s)>(p, rows, common[0], own[0]);
    if constexpr (!kForwardOnly<decltype(s)>)
      BackwardBuffers<decltype(s)>(p, rows, common[1], own[1]);
    return RowsScratch{max(common[0].used, common[1].used), max(own[0].used, own[1].used)};
  });
}
void forward_of(const Forward& a, const Rows& rows, Member& me) {
  const TileSetup tiles;
  auto run = [&](auto cell, auto s) {
    ForwardPass<decltype(cell), decltype(s)>(a, rows, me).run();
  };
  if (a.problem.layer_norm) return with_both(a.problem, run);
  with_cell(a.problem.cell,
            [&](auto cell) { with_forward(a.problem, a.pass, [&](auto s) { run(cell, s); }); });
}
void backward_of(const Backward& a, const Rows& rows, Member& me) {
  const TileSetup tiles;
  with_both(a.problem, [&](auto cell, auto s) {
    BackwardPass<decltype(cell), decltype(s)>(a, rows, me).run();
  });
}
RowsScratch unpacked_scratch_of(const Problem& p, int64_t rows) {
  return with_dtype(p.dtype, [&](auto s) {
    using C = Compute<decltype(s)>;
    Scratch common{}, own{};
    common.take<C>(rows * 2 * traits(p.cell).gates * Panels<C>::padded(p.hidden_size));
    own.take<C>(rows * max(p.input_size, p.num_directions * p.out_size()));
    return RowsScratch{common.used, own.used};
  });
}
void unpacked_begin_of(const Forward& a, const UnpackedStep& step) {
  with_dtype(a.problem.dtype, [&](auto s) {
    using S = decltype(s);
    using C = Compute<S>;
    read_states<S>(a, step.layer, step.dir, 0, step.all_rows, static_cast<C*>(step.h_prev),
                   a.problem.hidden_size, static_cast<C*>(step.c));
  });
}
void unpacked_recurrent_of(const Forward& a, const UnpackedStep& step, int64_t part,
                           int64_t parts) {
  with_plain(a.problem, [&](auto cell, auto s) {
    UnpackedPass<decltype(cell), decltype(s)>(a, step).recurrent_products(part, parts);
  });
}
void unpacked_step_of(const Forward& a, const UnpackedStep& step, int64_t part, int64_t parts,
                      void* scratch) {
  with_plain(a.problem, [&](auto cell, auto s) {
    UnpackedPass<decltype(cell), decltype(s)>(a, step).run(part, parts, scratch);
  });
}
void unpacked_end_of(const Forward& a, const UnpackedStep& step) {
  with_dtype(a.problem.dtype, [&](auto s) {
    using S = decltype(s);
    using C = Compute<S>;
    write_states<S>(a, step.layer, step.dir, 0, step.all_rows, static_cast<const C*>(step.h_prev),
                    a.problem.hidden_size, static_cast<const C*>(step.c));
  });
}
int64_t tangent_scratch_of(const Problem& p, int64_t rows) {
  return with_dtype(p.dtype, [&](auto s) {
    Scratch forward{}, backward{};
    TangentBuffers<decltype(s)>(p, rows, forward);
    BackwardTangentBuffers<decltype(s)>(p, rows, backward);
    return max(forward.used, backward.used);
  });
}
void forward_tangent_of(const ForwardTangent& a, const Rows& rows, Member& me) {
  const TileSetup tiles;
  with_both(a.primal.problem, [&](auto cell, auto s) {
    ForwardTangentPass<decltype(cell), decltype(s)>(a, rows, me).run();
  });
}
void backward_tangent_of(const BackwardTangent& a, const Rows& rows) {
  const TileSetup tiles;
  with_both(a.primal.problem, [&](auto cell, auto s) {
    BackwardTangentPass<decltype(cell), decltype(s)>(a, rows).run();
  });
}
int64_t weight_tasks_of(const Problem& p, int64_t threads) {
  return with_dtype(p.dtype, [&](auto s) {
    return weight_tasks<Operand<decltype(s)>>(p, threads) * p.num_directions;
  });
}
int64_t weight_scratch_of(const Problem& p, int64_t layer, int64_t tokens) {
  return with_dtype(p.dtype, [&](auto s) { return weight_scratch<decltype(s)>(p, layer, tokens); });
}
void weight_grad_of(const Backward& a, int64_t task, int64_t threads, void* scratch) {
  const TileSetup tiles;
  with_dtype(a.problem.dtype,
             [&](auto s) { WeightGradTask<decltype(s)>(a, task, threads, scratch).run(); });
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
    unpacked_scratch_of,
    unpacked_begin_of,
    unpacked_recurrent_of,
    unpacked_step_of,
    unpacked_end_of,
    tangent_scratch_of,
    forward_tangent_of,
    backward_tangent_of,
    weight_tasks_of,
    weight_scratch_of,
    weight_grad_of,
};
}  // namespace fusedrnn
