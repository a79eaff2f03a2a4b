#include "plan/families.h"

namespace fusedrnn {

std::string name_of(const Family& f) {
  const bool stepwise = f.exchange == Exchange::kStepwise;
  const bool float32 = stepwise && f.arithmetic == Arithmetic::kFfma;
  std::string name = kExchangeNames[int(f.exchange)];
  name += std::string(" ") + traits(f.cell).mode + (f.backward ? " backward" : " forward");
  name += f.tangent ? " tangent, " : ", ";
  name += float32 ? "float32" : kArithmeticNames[int(f.arithmetic)];
  return f.chained ? name + ", several layers a launch" : name;
}

Families launched_like(int code) {
  Families found;
  for (int i = 0; i < kFamilies; i++) {
    const Family f = family_at(i);
    if (exists(f) && launch_code(f.exchange, f.chained) == code) found.set(size_t(i));
  }
  return found;
}

}  // namespace fusedrnn
