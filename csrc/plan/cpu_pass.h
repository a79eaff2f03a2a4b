// What the plan knows of the CPU kernels, and what it decides for them. Free of the standard
// library, for kernels include it.
#pragma once
#include <cstdint>

namespace fusedrnn {

// How one set of kernels computes a dtype.
struct CpuCosts {
  bool computes;             // whether it does
  bool tiled;                // products on tiles
  int64_t least_rows;        // that fill what they multiply at a time
  int64_t planes;            // values of the multiplied type that make up one weight
  int64_t weight_bytes;      // that a weight takes when it is packed
  bool loads_quickly;        // weights as they are stored, as pairs or after one instruction
  bool words;                // weights in fewer bytes widened in the product
  int64_t deepest_integers;  // sums of 8-bit weights times integers, on tiles if `tiled`; 0: none
};

// How a forward pass multiplies weights that are stored in fewer bytes, and all others.
enum class ProductKind {
  kPanels,    // packed anew by each call, in the type that products take
  kWords,     // in place, widened to float32 (cpu/product/words.h)
  kIntegers,  // in place, 8-bit weights by rows of whole numbers (cpu/product/integers.h)
  kPairs,     // packed anew as pairs of bfloat16, to which rows are rounded as well
};

// Of a pass through layers and steps.
struct CpuPass {
  bool unpacked_hh;     // forward reads W_hh unpacked
  bool alternates;      // consecutive steps read weights in opposite directions
  bool prefetches;      // unpacked forward: the next units' weights during a unit's products
  bool streams;         // unpacked weights of one batch row: a row at a time
  bool overlaps_cells;  // in forward cells are computed during the next product
  bool long_sums;       // of products: torch's own are short where rows are few
  ProductKind product;  // in forward
};

}  // namespace fusedrnn
