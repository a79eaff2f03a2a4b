// Small kernels that show what the emulator does, and what it catches: tests/test_emulator.py.
#pragma once
#include <cstdint>

namespace fusedrnn {

struct Program {
  const char* name;
  int64_t blocks, threads, cluster, shared_bytes;
  bool cooperative, bug;  // bug: with the fault that the program is there to show
  const void *a, *b;
  void* out;
};

int program(const Program&, void* stream);

}  // namespace fusedrnn
