// Families of CUDA kernels: what a GPU is asked to prove, what it may refuse, and what is then no
// longer planned, are families.
#pragma once
#include <bitset>
#include <string>

#include "plan/problem.h"

namespace fusedrnn {

// How the blocks of a layer exchange h. Teams of one block exchange nothing and are launched
// without the guarantee that all blocks run at once.
enum class Exchange : int { kStepwise, kBlock, kGrid, kCluster, kCount };
enum class Arithmetic : int { kFloat64, kFfma, kFfmaNarrow, kTf32, kBFloat16, kFloat16, kCount };

struct Family {
  Exchange exchange;
  Arithmetic arithmetic;
  Cell cell;
  bool backward;
  bool chained;  // several layers in a launch
  bool tangent;  // the derivative of that pass in one direction
};

constexpr int kFamilies =
    int(Exchange::kCount) * int(Arithmetic::kCount) * int(Cell::kCount) * 2 * 2 * 2;

constexpr int index_of(const Family& f) {
  int index = int(f.exchange);
  index = index * int(Arithmetic::kCount) + int(f.arithmetic);
  index = index * int(Cell::kCount) + int(f.cell);
  return ((index * 2 + f.tangent) * 2 + f.backward) * 2 + f.chained;
}
constexpr Family family_at(int index) {
  const int at = index / 8, cells = int(Cell::kCount), kinds = int(Arithmetic::kCount);
  return {Exchange(at / cells / kinds),
          Arithmetic(at / cells % kinds),
          Cell(at % cells),
          index / 2 % 2 == 1,
          index % 2 == 1,
          index / 4 % 2 == 1};
}
// Whether there are such kernels. Stepwise products are ATen's, which has its own kinds of float32.
constexpr bool exists(const Family& f) {
  if (f.exchange != Exchange::kStepwise) return f.arithmetic != Arithmetic::kFloat64 && !f.tangent;
  return !f.chained && f.arithmetic != Arithmetic::kFfmaNarrow && f.arithmetic != Arithmetic::kTf32;
}

inline constexpr const char* kExchangeNames[] = {"stepwise", "block", "grid", "cluster"};
inline constexpr const char* kArithmeticNames[] = {"float64",           "FFMA",     "FFMA, 2 rows",
                                                   "TF32 tensor cores", "bfloat16", "float16"};

// In words.
std::string name_of(const Family&);

// How a family is launched, as a number that is not 0.
constexpr int launch_code(Exchange exchange, bool chained) {
  return 1 + 2 * int(exchange) + chained;
}

using Families = std::bitset<kFamilies>;
// All that are launched alike: a GPU that refuses one refuses these.
Families launched_like(int launch_code);

}  // namespace fusedrnn
