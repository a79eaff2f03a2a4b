// The layout of a row of gates in forward, and how the units of a layer are grouped.
//
// Units go in blocks of one vector. A row of gates holds, block after block, one vector for each
// slot, so that all gates of a block are contiguous when its cells are computed. The recurrent
// product goes by groups of blocks that fill the registers, each with a packed matrix of its own.
#pragma once
#include "cpu/call.h"
#include "cpu/product/panels.h"

namespace {

// Blocks of a group: few that fill its panels, where their gates are contiguous.
template <class C>
constexpr int group_blocks(int gates, int slots) {
  constexpr int kVectors = Panels<C>::kVectors;
  return slots > gates ? 1 : gates == 1 || (kVectors == 3 && gates % 3) ? kVectors : 1;
}

template <class Cell, class C>
struct UnitGroups {
  static constexpr int kWidth = Panels<C>::kWidth,
                       kBlocks = group_blocks<C>(Cell::kGates, Cell::kSlots);

  static FUSEDRNN_INLINE int64_t blocks(int64_t H) { return (H + kWidth - 1) / kWidth; }
  static FUSEDRNN_INLINE int64_t gate_columns(int64_t H) {
    return blocks(H) * Cell::kSlots * kWidth;
  }
  // f(first block, number of blocks) for the groups of one member of a team, in descending order if
  // asked for.
  template <class F>
  static FUSEDRNN_INLINE void each(int64_t H, const fusedrnn::Member& me, bool descending, F f) {
    const int64_t groups = (blocks(H) + kBlocks - 1) / kBlocks;
    const int64_t begin = groups * me.index / me.count, end = groups * (me.index + 1) / me.count;
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = (descending ? begin + end - 1 - i : i) * kBlocks;
      f(b, min(kBlocks, blocks(H) - b));
    }
  }
};

// f(slot, first unit, units, column in a row of gates) for part `part` of `parts` of the vectors.
template <class C, class F>
FUSEDRNN_INLINE void each_gate_vector(int64_t H, int slots, int64_t part, int64_t parts, F f) {
  constexpr int w = Panels<C>::kWidth;
  for (int64_t unit = part * w; unit < H; unit += parts * w)
    for (int slot = 0; slot < slots; slot++)
      f(slot, unit, min(w, H - unit), unit * slots + slot * w);
}

}  // namespace
