// How the weight gradients of a layer are divided into tasks: tiles of columns of dgates, with all
// that these are multiplied with, of the projection's left factor, and of the bias sums.
#pragma once
#include "cpu/pass/token_sums.h"
#include "cpu/product/outer.h"
#include "plan/problem.h"

namespace {

using namespace fusedrnn;

// Consecutive slots whose gradients are those of W_ih, W_hh or both, as rows of the gates from
// x_gate and h_gate on; -1: not of that one.
struct Segment {
  int slot, count, x_gate, h_gate;
};
struct Segments {
  int count = 0;
  Segment segment[4] = {};

  explicit constexpr Segments(const CellGateRanges& ranges) {
    int slots = 0;
    auto reach = [&](const GateRangeList& list) {
      for (const GateRange& range : list)
        slots = range.slot + range.count > slots ? range.slot + range.count : slots;
    };
    reach(ranges.x), reach(ranges.h);
    for (int slot = 0; slot < slots; slot++) {
      const int x = gate_of(ranges.x, slot), h = gate_of(ranges.h, slot);
      Segment& last = segment[count ? count - 1 : 0];
      auto follows = [&](int gate, int first) {
        return gate == (first < 0 ? -1 : first + last.count);
      };
      if (count && follows(x, last.x_gate) && follows(h, last.h_gate))
        last.count++;
      else
        segment[count++] = {slot, 1, x, h};
    }
  }
};

// What is divided into tiles: the columns of each segment (0 .. 3), the bias sums, the gradient of
// h before W_hr.
enum Part { kBias = 4, kProjection, kParts };

// Columns of a slot in bias tasks with layer normalisation, in which no task has two slots.
FUSEDRNN_INLINE int64_t padded_slot(const Problem& p) {
  return (p.hidden_size + kBiasTile - 1) / kBiasTile * kBiasTile;
}
FUSEDRNN_INLINE int64_t part_columns(const Problem& p, const Segments& segments, int part) {
  switch (part) {
    case kBias:
      if (p.layer_norm) return p.normed_columns() / p.hidden_size * padded_slot(p);
      return p.bias ? p.slot_columns() : 0;
    case kProjection:
      return p.proj_size;
    default:
      return part < segments.count ? segments.segment[part].count * p.hidden_size : 0;
  }
}
// Columns of a task: as many as share one packed right factor, but at least one task of each part
// for each thread.
template <class X>
FUSEDRNN_INLINE int64_t tile_columns(int64_t columns, int part, int64_t threads) {
  if (part == kBias) return kBiasTile;
  constexpr int64_t kUnit = kTiled<X> ? 32 : kRows;
  const int64_t want = max(48, (columns + threads - 1) / threads);
  return min(Outer<X>::kMostRows, (want + kUnit - 1) / kUnit * kUnit);
}

// A tile of a part, and how many tasks precede it; past the last one: kParts.
struct Tile {
  int part;
  int64_t begin, columns, before;
};
template <class X>
Tile tile_of(const Problem& p, const Segments& segments, int64_t task, int64_t threads) {
  int64_t before = 0;
  for (int part = 0; part < kParts; part++) {
    const int64_t all = part_columns(p, segments, part), size = tile_columns<X>(all, part, threads),
                  tiles = (all + size - 1) / size;
    if (task < before + tiles) {
      const int64_t begin = (task - before) * size;
      return {part, begin, min(size, all - begin), task};
    }
    before += tiles;
  }
  return {kParts, 0, 0, before};
}

// The number of tasks of one direction.
template <class X>
int64_t weight_tasks(const Problem& p, int64_t threads) {
  return tile_of<X>(p, Segments(gate_ranges(p.cell, p.layer_norm)), INT64_MAX, threads).before;
}

template <class S>
int64_t weight_scratch(const Problem& p, int64_t layer, int64_t tokens) {
  const int64_t x = p.product_input(layer), h = p.out_size();
  return Outer<Operand<S>>::scratch_bytes(max(max(x, h), p.hidden_size), max(x + h, p.hidden_size),
                                          tokens, !std::is_same_v<S, Compute<S>>);
}

}  // namespace
