// Runs one launch that a test has written to a file, and writes back the arrays as they are then.
//
// A program of its own: whatever the kernel does, and whatever a sanitizer says of it, ends this
// process and not the test's. Every array has an allocation of just its size.
//
// The file: name of the launch, its structure, seed, arrays, and which pointers of the structure
// point where; each string and array after its size in bytes, each number as int64.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/elementwise.h"
#include "cuda/persistent/persistent.h"
#include "cuda/stepwise/cell_step.h"
#include "emulator/programs.h"
#include "emulator/simt.h"

namespace {

struct Entry {
  const char* name;
  size_t size;
  int (*launch)(const void* params);
};

// The launches that tests can name: a function of a structure and a stream.
#define LAUNCH(function, type) \
  {#function, sizeof(type),    \
   [](const void* params) { return function(*static_cast<const type*>(params), nullptr); }}
using namespace fusedrnn;

// Flags and workspace are made here, of just the size that was announced, and full of kMissing.
template <class P, class F>
int planned(P p, F launch) {
  std::vector<int> flags(size_t(p.flag_count()), -1);
  std::vector<char> workspace(size_t(p.workspace_bytes()), char(0xff));
  p.flags = flags.data(), p.workspace = workspace.data();
  return launch(p, nullptr);
}
int planned_forward(const PersistentForward& p, void*) { return planned(p, persistent_forward); }
int planned_backward(const PersistentBackward& p, void*) { return planned(p, persistent_backward); }

// The workspace too is made here, and full of NaN.
int planned_sum_rows(RowSums p, void*) {
  std::vector<char> workspace(size_t(sum_rows_workspace(p)), char(0xff));
  p.workspace = workspace.data();
  return sum_rows(p, nullptr);
}

const Entry kEntries[] = {
    LAUNCH(cell_forward, CellForward),          LAUNCH(cell_backward, CellBackward),
    LAUNCH(projection_forward, CellForward),    LAUNCH(projection_backward, CellBackward),
    LAUNCH(planned_forward, PersistentForward), LAUNCH(planned_backward, PersistentBackward),
    LAUNCH(planned_sum_rows, RowSums),          LAUNCH(program, Program),
};

[[noreturn]] void stop(const char* what) {
  fprintf(stderr, "replay: %s\n", what);
  exit(2);
}

struct File {
  FILE* file;

  void read(void* to, size_t bytes) {
    if (bytes && fread(to, 1, bytes, file) != bytes) stop("the file is too short");
  }
  int64_t number() {
    int64_t n;
    read(&n, sizeof n);
    return n;
  }
  std::string string() {
    std::string s(size_t(number()), '\0');
    read(s.data(), s.size());
    return s;
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) stop("usage: replay FILE");
  File in{fopen(argv[1], "rb")};
  if (!in.file) stop("cannot read the file");
  const std::string name = in.string();
  std::string params = in.string();
  simt::set_seed(in.number());
  std::vector<std::pair<char*, size_t>> arrays(size_t(in.number()));
  for (auto& [data, bytes] : arrays) {
    bytes = size_t(in.number());
    void* p;
    if (posix_memalign(&p, 256, bytes)) stop("out of memory");
    data = static_cast<char*>(p);
    in.read(data, bytes);
  }
  for (int64_t n = in.number(); n > 0; n--) {
    const int64_t at = in.number(), array = in.number(), offset = in.number();
    const char* p = arrays.at(size_t(array)).first + offset;
    memcpy(&params.at(size_t(at)), &p, sizeof p);
  }
  fclose(in.file);

  const Entry* entry = nullptr;
  for (const Entry& e : kEntries)
    if (e.name == name) entry = &e;
  if (!entry) stop("no such launch");
  if (entry->size != params.size()) stop("the structure has another size here");
  const int64_t error = entry->launch(params.data());

  FILE* out = fopen(argv[1], "wb");
  const int64_t way = simt::longest_way();
  fwrite(&error, 1, sizeof error, out);
  fwrite(&way, 1, sizeof way, out);
  for (auto& [data, bytes] : arrays) fwrite(data, 1, bytes, out);
  fclose(out);
  for (auto& [data, bytes] : arrays) free(data);
}
