// Errors for Python: one sentence that says what was given and what was expected. STD_TORCH_CHECK
// would put a function, a file and a line of ours before it.
#pragma once
#include <sstream>
#include <stdexcept>

namespace fusedrnn {

template <class... Parts>
[[noreturn, gnu::cold]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace fusedrnn

#define FUSEDRNN_EXPECT(condition, ...) \
  if (!(condition)) [[unlikely]]        \
  ::fusedrnn::fail(__VA_ARGS__)

// Of a function of torch's C interface, which says elsewhere what went wrong.
#define FUSEDRNN_EXPECT_TORCH(call, what) \
  FUSEDRNN_EXPECT((call) == 0, "fusedrnn: torch failed to ", what)
