// The threads that run a call, whoever they belong to.
#pragma once
#include <cstdint>

namespace fusedrnn {

struct ThreadPool {
  int64_t threads;
  // Calls share(i, context) for every i in [0, count), in parallel as far as there are threads.
  void (*run)(int64_t count, void (*share)(int64_t i, void* context), void* context);

  template <class F>
  void parallel_for(int64_t count, F& f) const {
    run(count, [](int64_t i, void* context) { (*static_cast<F*>(context))(i); }, &f);
  }
};

}  // namespace fusedrnn
