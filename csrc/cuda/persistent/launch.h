// From the run-time engine to the kernel, and its launch.
#pragma once
#include "cuda/dispatch.h"
#include "cuda/persistent/persistent.h"
#include "cuda/persistent/product.h"

namespace fusedrnn {

// Calls f with a value of the engine's type.
template <class F>
int with_engine(const Persistent& p, F f) {
  switch (p.engine) {
    case Engine::kFfma:
      return f(Ffma<Engine::kFfma>{});
    case Engine::kFfmaNarrow:
      return f(Ffma<Engine::kFfmaNarrow>{});
    case Engine::kTf32:
      return f(Tf32{});
    case Engine::kHalf:
      return p.dtype == DType::kFloat16 ? f(Half<Float16>{}) : f(Half<BFloat16>{});
    default:
      return kInvalidValue;
  }
}

inline bool fits(const Persistent& p) {
  const DType storage = p.engine == Engine::kHalf ? p.dtype : DType::kFloat32;
  const int vector = 16 / tile_of(p.engine).operand_bytes;  // of units, exchanged at once
  return p.dtype == storage && bytes(p.dtype) == tile_of(p.engine).operand_bytes && p.stages >= 1 &&
         p.stages <= kMaxStages && p.shape.units % vector == 0 &&
         p.shape.units * p.shape.rows <= kPersistentThreads && p.blocks() <= INT32_MAX &&
         (!p.cluster || (p.shape.team > 1 && p.shape.team <= kLargestCluster)) &&
         p.hidden_size <= p.shape.team * p.shape.units && p.steps < INT32_MAX;
}

template <class Cell>
CellLayout layout_of() {
  static_assert(Cell::kSlots <= kMostSlots);
  CellLayout l{Cell::kGates, Cell::kSlots, Cell::kSaved, Cell::kHasCell, Cell::kUsesHPrev, {}, {}};
  for (int k = 0; k < kMostSlots; k++) {
    l.x_gate[k] = gate_of(Cell::x_ranges(), k);
    l.h_gate[k] = gate_of(Cell::h_ranges(), k);
  }
  return l;
}

// `select` gives the kernel for an engine.
template <class P, class F>
int launch_persistent(P p, void* stream, F select) {
  static_assert(sizeof(P) <= 4096, "parameters of a kernel take up to 4 KiB");
  if (!fits(p)) return kInvalidValue;
  with_cell(p.cell, [&](auto cell) {
    p.layout = layout_of<decltype(cell)>();
    return 0;
  });
  Grid grid{dim3(unsigned(p.blocks())), dim3(kPersistentThreads)};
  grid.cluster = p.cluster ? p.shape.team : 1;
  grid.cooperative = p.waits_for_others();
  grid.shared_bytes = size_t(p.shape.shared_bytes);
  return with_engine(p, [&](auto engine) { return launch(select(engine), grid, stream, p); });
}

}  // namespace fusedrnn
