// The runtime of simt.h: fibers, the scheduler, barriers, shared memory, late stores, reports.
//
// Built with -DSIMT_ADDRESS (and AddressSanitizer) or -DSIMT_THREAD. With ThreadSanitizer this file
// alone is not instrumented: the switch from one fiber to another orders nothing, and what a
// barrier, a flag or a store orders is told to it here.
#include "emulator/simt.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(SIMT_ADDRESS)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(SIMT_THREAD)
extern "C" {
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_set_fiber_name(void*, const char*);
void* __tsan_get_current_fiber();
void __tsan_acquire(void*);
void __tsan_release(void*);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
#endif
#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_ASSEMBLY  // a switch in 20 instructions; ucontext makes two system calls
#else
#include <ucontext.h>
#endif

namespace {

using simt::Where;

// ---- the sanitizers ----

#if defined(SIMT_THREAD)
void acquire(void* sync) { __tsan_acquire(sync); }
void release(void* sync) { __tsan_release(sync); }
// The runtime's own data is shared by all fibers, and is no business of the kernel's.
struct Unseen {
  Unseen() { __tsan_ignore_thread_begin(); }
  ~Unseen() { __tsan_ignore_thread_end(); }
};
constexpr unsigned kNoOrder = 1;
#else
void acquire(void*) {}
void release(void*) {}
struct Unseen {
  Unseen() {}
};
#endif
#if defined(SIMT_ADDRESS)
void poison(const void* p, size_t n) { __asan_poison_memory_region(p, n); }
void unpoison(const void* p, size_t n) { __asan_unpoison_memory_region(p, n); }
// A late store is checked where it is asked for: its own report would name another line.
void touch(const void* p, size_t n) {
  if (void* bad = __asan_region_is_poisoned(const_cast<void*>(p), n))
    *static_cast<volatile const char*>(bad);
}
constexpr size_t kStack = 256 << 10;
#else
void poison(const void*, size_t) {}
void unpoison(const void*, size_t) {}
void touch(const void*, size_t) {}
constexpr size_t kStack = 64 << 10;
#endif
constexpr size_t kGap = 64;  // poisoned, around every shared array
constexpr size_t kPage = 4096;
constexpr size_t kMostGuards = 16 << 10;  // stacks with a page below that no one may touch
constexpr size_t kFibersAtOnce = 7000;    // ThreadSanitizer has room for 8128
constexpr int64_t kPollsInVain = 1 << 22;
constexpr int64_t kMostOfMbarrier = (1 << 20) - 1;  // arrivals, and bytes on their way

// ---- what there is ----

struct Fiber;

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t phase = 0;
  std::vector<Fiber*> waiting;
  Where first{};                         // of this phase to arrive
  int64_t distance = 0, met_at[2] = {};  // of this phase so far; of the last two when they ended
  char sync[2];  // what ThreadSanitizer orders by: phases take turns, as one may begin before all
                 // have left the last
};

struct Exchange : Barrier {
  char slots[2][32][64];  // what the lanes give, in turns likewise
};

struct Warp {
  std::map<unsigned, Exchange> barriers;  // by mask
};

struct Cluster;

struct Block {
  uint3 index;
  int left;  // threads that have not ended
  bool begun = false;
  Cluster* cluster;
  Barrier all;
  bool any[2] = {};  // what its threads say at `all`, in turns
  std::vector<Warp> warps;
  char* shared;
};

struct Cluster {
  Barrier all;
  std::vector<Block*> blocks;
};

// To another block's shared memory, or the own.
struct Store {
  Block* block;
  void *to, *barrier;
  size_t bytes;
  char value[16];
  Where at;
  void* agent;       // who ThreadSanitizer sees
  int64_t distance;  // how far away it lands
};

struct Mbarrier {
  int expected, pending;
  int64_t bytes = 0;
  bool fenced = false;                   // other blocks may know of it
  int64_t distance = 0, met_at[2] = {};  // as of a Barrier
  uint64_t phase = 0;
  std::vector<Fiber*> waiting;
  char sync[2];
};

struct Fiber : simt::Thread {
  Block* owner = nullptr;
  int linear = 0;
  bool done = false;
  const char* waits_in = nullptr;
  Where waits_at{};
  uint64_t cluster_phase = 0;
  bool cluster_arrived = false;
  int64_t distance = 0;
  std::vector<Mbarrier*> initialised;  // and not yet fenced
  char performed;  // what ThreadSanitizer knows to come before this thread's late stores
  char* stack = nullptr;
  void *fake_stack = nullptr, *sanitizer = nullptr;
#if defined(SIMT_ASSEMBLY)
  void* sp = nullptr;
#else
  ucontext_t context;
#endif
};

struct State {
  simt::Launch launch;
  const std::function<void()>* body;
  size_t main_stack_size = 0;
  std::vector<Fiber*> ready;
  size_t next_ready = 0;  // in turn; those before have had theirs. In random order always 0.
  std::map<const void*, size_t> static_offsets;  // the same in every block
  size_t shared_used = 0, shared_size = 0;
  std::map<void*, Mbarrier> mbarriers;
  std::vector<Store> in_flight;
  std::map<const void*, std::map<int, int64_t>> raised;  // of a flag: how far away each value was
  int64_t distance = 0;                                  // the longest of threads that have ended
  int64_t polls = 0;                                     // since anything happened
  std::string failure;
  char begin_sync, end_sync;
};

Fiber main_fiber;
State* state = nullptr;
bool random_order = false;
int64_t launches_to_failure = -1;
int64_t all_launches = 0;
int64_t way = 0;  // of the last launch
std::mt19937_64 generator;

Fiber* self() { return static_cast<Fiber*>(const_cast<simt::Thread*>(simt::current)); }
bool flip(unsigned sides) { return random_order && generator() % sides == 0; }

// ---- switching ----

#if defined(SIMT_ASSEMBLY)
extern "C" void simt_switch(void** save, void* to);
asm(R"(.text
.globl simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");
#endif

void arrived([[maybe_unused]] bool first_time) {
#if defined(SIMT_ADDRESS)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(first_time ? nullptr : self()->fake_stack, &bottom, &size);
  if (first_time && !main_fiber.stack)
    main_fiber.stack = static_cast<char*>(const_cast<void*>(bottom)), state->main_stack_size = size;
#endif
}

void switch_to(Fiber* to) {
  Fiber* from = self();
  if (to == from) return;
#if defined(SIMT_ADDRESS)
  __sanitizer_start_switch_fiber(from->done ? nullptr : &from->fake_stack, to->stack,
                                 to == &main_fiber ? state->main_stack_size : kStack);
#elif defined(SIMT_THREAD)
  __tsan_switch_to_fiber(to->sanitizer, kNoOrder);
#endif
  simt::current = to;
#if defined(SIMT_ASSEMBLY)
  simt_switch(&from->sp, to->sp);
#else
  swapcontext(&from->context, &to->context);
#endif
  arrived(false);
}

// ---- reports ----

std::string text(const char* format, ...) {
  char buffer[512];
  va_list args;
  va_start(args, format);
  vsnprintf(buffer, sizeof buffer, format, args);
  va_end(args);
  return buffer;
}
std::string name(const Fiber& f) {
  return text("block (%u,%u,%u) thread (%u,%u,%u)", f.block.x, f.block.y, f.block.z, f.thread.x,
              f.thread.y, f.thread.z);
}
std::string name(const Where& at) {
  const std::string file = at.file_name();
  return text("%s:%u", file.substr(file.rfind('/') + 1).c_str(), unsigned(at.line()));
}

// Ends the launch; the fibers are left as they are.
[[noreturn]] void fail(const std::string& what) {
  {
    const Unseen unseen;
    state->failure = name(*self()) + ": " + what;
  }
  switch_to(&main_fiber);
  abort();
}

// A thread that has used up its stack, or a wild pointer: on a stack of its own. The sanitizers
// have reports of their own for this.
[[maybe_unused]] void on_fault(int signal, siginfo_t* info, void*) {
  const char *at = static_cast<char*>(info->si_addr), *stack = self()->stack;
  if (stack && at >= stack && at < stack + kPage) {
    fprintf(stderr, "simt: %s: more than %zu KiB of stack\n", name(*self()).c_str(), kStack >> 10);
    _exit(1);
  }
  fprintf(stderr, "simt: %s: no memory at %p\n", name(*self()).c_str(), info->si_addr);
  ::signal(signal, SIG_DFL);
}

void watch_faults() {
#if !defined(SIMT_ADDRESS) && !defined(SIMT_THREAD)
  static char memory[64 << 10];
  stack_t stack{};
  stack.ss_sp = memory;
  stack.ss_size = sizeof memory;
  sigaltstack(&stack, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
#endif
}

// ---- the scheduler ----

void land(size_t which);

Fiber* next() {
  const Unseen unseen;
  State& s = *state;
  while (!s.in_flight.empty() && flip(8)) land(generator() % s.in_flight.size());
  // Stores come when no one can go on without, whoever can having looked at flags in vain.
  while (s.polls >= int64_t(s.ready.size() - s.next_ready)) {
    if (s.in_flight.empty()) break;
    land(random_order ? generator() % s.in_flight.size() : 0);
  }
  if (s.next_ready == s.ready.size()) return &main_fiber;  // all have ended, or none can go on
  if (random_order) {
    std::swap(s.ready[generator() % s.ready.size()], s.ready.back());
    Fiber* f = s.ready.back();
    s.ready.pop_back();
    return f;
  }
  Fiber* f = s.ready[s.next_ready++];
  if (s.next_ready > 4096 && s.next_ready > s.ready.size() / 2) {
    s.ready.erase(s.ready.begin(), s.ready.begin() + ptrdiff_t(s.next_ready));
    s.next_ready = 0;
  }
  return f;
}

void wake(std::vector<Fiber*>& waiting) {
  state->ready.insert(state->ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

void let_others_run() {
  {
    const Unseen unseen;
    state->ready.push_back(self());
  }
  switch_to(next());
}

// Sets all shared memory of a block, poisoned or not, to what is NaN in every floating-point type.
// Not by memset, which is checked.
#if defined(SIMT_ADDRESS)
__attribute__((no_sanitize_address))
#endif
void clear(const Block& b) {
  volatile uint64_t* p = reinterpret_cast<uint64_t*>(b.shared);
  for (size_t i = 0; i < state->shared_size / sizeof *p; i++) p[i] = ~uint64_t(0);
}

// Whether the block is one that never runs.
bool lost(const Block& b) {
  const simt::Launch& c = state->launch;
  return simt::faults.lose_block && c.cluster == 1 && b.index.x + 1 == c.blocks.x &&
         b.index.y + 1 == c.blocks.y;
}

void entry() {
  arrived(true);
  acquire(&state->begin_sync);
  Block& block = *self()->owner;
  // A store of a peer that came before the block was there is lost.
  if (!block.begun) {
    block.begun = true;
    clear(block);
  }
  if (!lost(block)) (*state->body)();
  Fiber& f = *self();
  // The shared memory of a block that has ended is no one's.
  if (--block.left == 0) {
    for (const Store& s : state->in_flight)
      if (s.block == &block)
        fail(text("the block ends with a store to it on its way, %s", name(s.at).c_str()));
    clear(block);
    poison(block.shared, state->shared_size);
  }
  f.done = true;
  state->distance = std::max(state->distance, f.distance);
  state->polls = 0;
  release(&state->end_sync);
  switch_to(next());
  abort();
}

// ---- barriers ----

// Returns the phase to wait for. `far`: among blocks.
uint64_t arrive(Barrier& b, bool orders, bool far = false) {
  const uint64_t phase = b.phase;
  if (orders) release(&b.sync[phase & 1]);
  const Unseen unseen;
  state->polls = 0;
  b.distance = std::max(b.distance, self()->distance + far);
  if (++b.arrived == b.expected) {
    b.met_at[phase & 1] = std::exchange(b.distance, 0);
    b.arrived = 0;
    b.phase++;
    wake(b.waiting);
  }
  return phase;
}

void wait(Barrier& b, uint64_t phase, const char* what, const Where& at, bool orders) {
  if (b.phase == phase) {
    Fiber* f = self();
    {
      const Unseen unseen;
      b.waiting.push_back(f);
      f->waits_in = what;
      f->waits_at = at;
    }
    switch_to(next());
  } else if (random_order) {
    let_others_run();  // the last to come is not always the first to go on
  }
  self()->distance = std::max(self()->distance, b.met_at[phase & 1]);
  if (orders) acquire(&b.sync[phase & 1]);
}

// Before it arrives: those who wait at the barrier are at the same line. Null: they need not be.
void same_line(Barrier& b, const char* what, const Where& at) {
  if (b.arrived == 0) {
    b.first = at;
  } else if (!what) {
    return;
  } else if (b.first.line() != at.line() || strcmp(b.first.file_name(), at.file_name())) {
    fail(text("divergent %s: here %s, others %s", what, name(at).c_str(), name(b.first).c_str()));
  }
}

Exchange& warp_barrier(unsigned mask, const Where& at) {
  Fiber& f = *self();
  const dim3 d = f.block_dim;
  const int lanes = std::min(32, int(d.x * d.y * d.z) - f.linear / 32 * 32);
  if (lanes < 32) mask &= (1u << lanes) - 1;
  if (!(mask >> (f.linear & 31) & 1))
    fail(text("lane %d is not in its mask %08x at %s", f.linear & 31, mask, name(at).c_str()));
  const Unseen unseen;
  Exchange& b = f.owner->warps[f.linear / 32].barriers[mask];
  b.expected = __builtin_popcount(mask);
  return b;
}

// An instruction that the lanes of a warp execute together (.aligned). Orders no memory.
void converge(const char* instruction, const Where& at) {
  Exchange& b = warp_barrier(~0u, at);
  same_line(b, instruction, at);
  wait(b, arrive(b, false), instruction, at, false);
}

// ---- shared memory ----

bool in_shared(const Block& b, const void* p) {
  const char* at = static_cast<const char*>(p);
  return at >= b.shared && at < b.shared + state->shared_size;
}

// Where block `other` has what this block has at `mine`.
char* map_shared(const Block& other, const void* mine, const Where& at) {
  const Block& own = *self()->owner;
  if (!in_shared(own, mine))
    fail(text("not in the block's shared memory: %p at %s", mine, name(at).c_str()));
  return other.shared + (static_cast<const char*>(mine) - own.shared);
}

// ---- late stores ----

Mbarrier& mbarrier_at(void* p, const Where& at) {
  const Unseen unseen;
  const auto it = state->mbarriers.find(p);
  if (it == state->mbarriers.end()) fail(text("mbarrier not initialised at %s", name(at).c_str()));
  return it->second;
}

// Arrivals and bytes have changed.
void advance(Mbarrier& m) {
  state->polls = 0;
  if (std::abs(m.bytes) > kMostOfMbarrier)
    fail(text("%lld bytes on their way to an mbarrier", static_cast<long long>(m.bytes)));
  if (m.pending || m.bytes) return;
  m.pending = m.expected;
  m.met_at[m.phase & 1] = std::exchange(m.distance, 0);
  m.phase++;
  wake(m.waiting);
}

// A store in flight comes to its end, whoever is running.
void land(size_t which) {
  State& s = *state;
  // Not on the stack: that is the running fiber's, whose earlier values there the agent would race.
  static Store c;
  c = s.in_flight[which];
  s.in_flight.erase(s.in_flight.begin() + ptrdiff_t(which));
  const auto it = s.mbarriers.find(c.barrier);
  Mbarrier& m = it->second;
#if defined(SIMT_THREAD)
  void* running = __tsan_get_current_fiber();
  __tsan_ignore_thread_end();  // next() has set it for the running fiber
  __tsan_switch_to_fiber(c.agent, kNoOrder);
  memcpy(c.to, c.value, c.bytes);
  release(&m.sync[m.phase & 1]);
  __tsan_switch_to_fiber(running, kNoOrder);
  __tsan_ignore_thread_begin();
  __tsan_destroy_fiber(c.agent);
#else
  memcpy(c.to, c.value, c.bytes);
#endif
  m.bytes -= int64_t(c.bytes);
  m.distance = std::max(m.distance, c.distance);
  advance(m);
}

#if defined(SIMT_THREAD)
// The end of a store releases that store alone, and nothing that its thread did before. What comes
// before its issue all the same is what was performed at the thread's last barrier.
void* new_agent() {
  void* running = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(main_fiber.sanitizer, kNoOrder);  // a fiber comes after its creator
  void* agent = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(agent, kNoOrder);
  acquire(&self()->performed);
  __tsan_switch_to_fiber(running, kNoOrder);
  return agent;
}
#else
void* new_agent() { return nullptr; }
#endif

// ---- a launch ----

void report_stuck(const std::vector<Fiber>& fibers) {
  std::map<std::string, std::vector<const Fiber*>> places;
  size_t ended = 0;
  for (const Fiber& f : fibers) {
    if (f.done) {
      ended++;
    } else {
      places[text("%s, %s", f.waits_in, name(f.waits_at).c_str())].push_back(&f);
    }
  }
  fprintf(stderr, "simt: deadlock: %zu of %zu threads have ended, the others wait for ever:\n",
          ended, fibers.size());
  for (const auto& [place, who] : places)
    fprintf(stderr, "simt:   %zu in %s, the first %s\n", who.size(), place.c_str(),
            name(*who[0]).c_str());
}

void prepare(Fiber& f) {
#if defined(SIMT_ASSEMBLY)
  // What simt_switch pops: six registers, the address to return to, and none to return to from
  // there.
  void** sp = reinterpret_cast<void**>(f.stack + kStack);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  f.sp = sp;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, entry, 0);
#endif
}

int check(const simt::Launch& c) {
  const size_t blocks = size_t(c.blocks.x) * c.blocks.y * c.blocks.z;
  const size_t threads = size_t(c.threads.x) * c.threads.y * c.threads.z;
  if (!blocks || !threads || threads > simt::kThreadsPerBlock || c.blocks.x > 0x7fffffffu ||
      c.blocks.y > 65535 || c.blocks.z > 65535)
    return simt::kInvalidConfiguration;
  if (c.cluster < 1 || c.cluster > simt::kLargestCluster || c.blocks.x % unsigned(c.cluster))
    return simt::kInvalidClusterSize;
  if (c.shared_bytes > simt::kSharedPerBlock) return simt::kInvalidValue;
  const size_t fit = std::min(simt::kThreadsPerProcessor / threads,
                              simt::kSharedPerProcessor / (c.shared_bytes + 1024));
  if (c.cooperative && blocks > simt::kProcessors * fit) return simt::kCooperativeLaunchTooLarge;
  return simt::kSuccess;
}

// Runs the clusters from..to side by side; false when they failed.
bool run_clusters(State& s, const std::vector<size_t>& clusters, size_t from, size_t to,
                  char* stacks) {
  const simt::Launch& c = s.launch;
  const size_t size = size_t(c.cluster), threads = size_t(c.threads.x) * c.threads.y * c.threads.z;
  std::vector<Cluster> cluster(to - from);
  std::vector<Block> block((to - from) * size);
  std::vector<Fiber> fiber(block.size() * threads);
  unpoison(stacks, kStack * fiber.size());
  for (size_t i = 0; i < block.size(); i++) {
    Block& b = block[i];
    const size_t linear = clusters[from + i / size] * size + i % size;
    b.index = {unsigned(linear % c.blocks.x), unsigned(linear / c.blocks.x % c.blocks.y),
               unsigned(linear / c.blocks.x / c.blocks.y)};
    b.left = b.all.expected = int(threads);
    b.cluster = &cluster[i / size];
    b.cluster->blocks.push_back(&b);
    b.cluster->all.expected = int(threads * size);
    b.warps.resize((threads + 31) / 32);
    b.shared = static_cast<char*>(aligned_alloc(1024, s.shared_size));
    clear(b);
    poison(b.shared + c.shared_bytes, s.shared_size - c.shared_bytes);
    for (const auto& [key, offset] : s.static_offsets)
      unpoison(b.shared + (offset & 0xffffffff), offset >> 32);
    for (size_t t = 0; t < threads; t++) {
      Fiber& f = fiber[i * threads + t];
      f.thread = {unsigned(t % c.threads.x), unsigned(t / c.threads.x % c.threads.y),
                  unsigned(t / c.threads.x / c.threads.y)};
      f.block = b.index;
      f.block_dim = c.threads;
      f.grid_dim = c.blocks;
      f.owner = &b;
      f.linear = int(t);
      f.stack = stacks + (i * threads + t) * kStack;
      prepare(f);
#if defined(SIMT_THREAD)
      f.sanitizer = __tsan_create_fiber(0);
      __tsan_set_fiber_name(f.sanitizer, name(f).c_str());
#endif
      s.ready.push_back(&f);
    }
  }
  simt::current = &main_fiber;
  switch_to(next());
  acquire(&s.end_sync);

  bool good = true;
  if (!s.failure.empty()) {
    fprintf(stderr, "simt: %s\n", s.failure.c_str());
    good = false;
  } else if (std::any_of(fiber.begin(), fiber.end(), [](const Fiber& f) { return !f.done; })) {
    report_stuck(fiber);
    good = false;
  }
#if defined(SIMT_THREAD)
  for (Fiber& f : fiber) {
    if (!f.done) {  // what it did comes before what is done with its remains
      __tsan_switch_to_fiber(f.sanitizer, kNoOrder);
      release(&s.end_sync);
      __tsan_switch_to_fiber(main_fiber.sanitizer, kNoOrder);
    }
    __tsan_destroy_fiber(f.sanitizer);
  }
  acquire(&s.end_sync);
#endif
  for (Block& b : block) {
    unpoison(b.shared, s.shared_size);
    free(b.shared);
  }
  s.mbarriers.clear();
  return good;
}

}  // namespace

namespace simt {

const Thread* current = &main_fiber;

void set_seed(int64_t seed) {
  random_order = seed >= 0;
  generator.seed(uint64_t(seed));
}

void fail_after(int64_t launches) { launches_to_failure = launches; }
int64_t launches() { return all_launches; }

Faults faults;
void play(const char* text) {
  faults = {};
  const std::string all = text;
  for (size_t begin = 0; begin < all.size();) {
    const size_t end = std::min(all.find(',', begin), all.size());
    const std::string word = all.substr(begin, end - begin);
    begin = end + 1;
    bool* const flag = word == "refuse-clusters"      ? &faults.refuse_clusters
                       : word == "refuse-cooperative" ? &faults.refuse_cooperative
                       : word == "refuse-all"         ? &faults.refuse_all
                       : word == "send-zeros"         ? &faults.send_zeros
                       : word == "swap-registers"     ? &faults.swap_registers
                       : word == "lose-block"         ? &faults.lose_block
                       : word == "capture"            ? &faults.capture
                                                      : nullptr;
    if (flag) {
      *flag = true;
    } else if (!word.compare(0, 6, "after=")) {
      faults.after = atoll(word.c_str() + 6);
    } else {
      fprintf(stderr, "simt: no fault '%s'\n", word.c_str());
      abort();
    }
  }
}

int run(const Launch& launch, const std::function<void()>& body) {
  all_launches++;
  if (launches_to_failure >= 0 && launches_to_failure-- == 0) return kLaunchFailure;
  if (const int error = check(launch)) return error;
  const int refusal = faults.refuse_clusters && launch.cluster > 1      ? kInvalidClusterSize
                      : faults.refuse_cooperative && launch.cooperative ? kCooperativeLaunchTooLarge
                      : faults.refuse_all                               ? kInvalidConfiguration
                                                                        : kSuccess;
  if (refusal && faults.after-- <= 0) return refusal;
  State s;
  s.launch = launch;
  s.body = &body;
  s.shared_used = launch.shared_bytes + kGap;
  s.shared_size = (launch.shared_bytes + 2 * kStaticShared + 1023) / 1024 * 1024;
  state = &s;
  main_fiber.stack = nullptr;
#if defined(SIMT_THREAD)
  main_fiber.sanitizer = __tsan_get_current_fiber();
#endif
  std::vector<size_t> clusters(size_t(launch.blocks.x) * launch.blocks.y * launch.blocks.z /
                               unsigned(launch.cluster));
  for (size_t i = 0; i < clusters.size(); i++) clusters[i] = i;
  if (random_order) std::shuffle(clusters.begin(), clusters.end(), generator);
  // Clusters that may not wait for each other run one after the other: one that does is reported.
  // ThreadSanitizer sees them side by side, for the end of one would be ordered before the next.
  const size_t threads =
      size_t(launch.threads.x) * launch.threads.y * launch.threads.z * unsigned(launch.cluster);
  size_t together = launch.cooperative ? clusters.size() : 1;
#if defined(SIMT_THREAD)
  if (together * threads > kFibersAtOnce) {
    fprintf(stderr, "simt: too many threads for ThreadSanitizer\n");
    return kCooperativeLaunchTooLarge;
  }
  together = std::max(together, kFibersAtOnce / threads);
#endif
  together = std::min(together, clusters.size());
  const size_t bytes = kStack * threads * together;
  void* stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) return kInvalidConfiguration;
  watch_faults();
  if (threads * together <= kMostGuards)
    for (size_t i = 0; i < threads * together; i++)
      mprotect(static_cast<char*>(stacks) + i * kStack, kPage, PROT_NONE);
  release(&s.begin_sync);
  bool good = true;
  for (size_t i = 0; good && i < clusters.size(); i += together)
    good = run_clusters(s, clusters, i, std::min(i + together, clusters.size()),
                        static_cast<char*>(stacks));
  unpoison(stacks, bytes);
  munmap(stacks, bytes);
  way = s.distance;
  state = nullptr;
  return good ? kSuccess : kLaunchFailure;
}

void sync_block(Where at) {
  Barrier& b = self()->owner->all;
  same_line(b, "__syncthreads", at);
  wait(b, arrive(b, true), "__syncthreads", at, true);
  release(&self()->performed);
}
bool sync_block_any(bool yes, Where at) {
  Block& own = *self()->owner;
  Barrier& b = own.all;
  same_line(b, "__syncthreads_or", at);
  bool& any = own.any[b.phase & 1];
  if (b.arrived == 0) any = false;
  any |= yes;
  wait(b, arrive(b, true), "__syncthreads_or", at, true);
  release(&self()->performed);
  return any;
}
void sync_warp(unsigned mask, Where at) {
  Barrier& b = warp_barrier(mask, at);
  same_line(b, nullptr, at);
  wait(b, arrive(b, true), "__syncwarp", at, true);
}

void arrive_cluster(Where at) {
  Fiber& f = *self();
  converge("barrier.cluster.arrive", at);
  if (f.cluster_arrived) fail(text("a second cluster arrive at %s", name(at).c_str()));
  f.cluster_arrived = true;
  f.cluster_phase = arrive(f.owner->cluster->all, true, true);
}
void wait_cluster(Where at) {
  Fiber& f = *self();
  converge("barrier.cluster.wait", at);
  if (!f.cluster_arrived) fail(text("cluster wait without arrive at %s", name(at).c_str()));
  f.cluster_arrived = false;
  wait(f.owner->cluster->all, f.cluster_phase, "the cluster barrier", at, true);
  release(&f.performed);
}

int lane() { return self()->linear & 31; }

namespace {
const char* exchange(Exchange& b, const char* aligned, const void* value, size_t bytes,
                     const Where& at) {
  same_line(b, aligned, at);
  char (&slots)[32][64] = b.slots[b.phase & 1];
  for (size_t i = 0; i < bytes; i++) slots[lane()][i] = static_cast<const volatile char*>(value)[i];
  wait(b, arrive(b, false), aligned ? aligned : "a shuffle", at, false);
  return slots[0];
}
}  // namespace
const char* exchange(unsigned mask, const void* value, size_t bytes, Where at) {
  return exchange(warp_barrier(mask, at), nullptr, value, bytes, at);
}
const char* exchange_aligned(const char* instruction, const void* value, size_t bytes, Where at) {
  Exchange& b = warp_barrier(~0u, at);
  if (b.expected < 32)
    fail(text("%s of %d lanes at %s", instruction, b.expected, name(at).c_str()));
  return exchange(b, instruction, value, bytes, at);
}

void* dynamic_shared() { return self()->owner->shared; }

void* static_shared(const void* key, size_t bytes) {
  const Unseen unseen;
  State& s = *state;
  Block& own = *self()->owner;
  auto it = s.static_offsets.find(key);
  if (it == s.static_offsets.end()) {
    const size_t at = (s.shared_used + 127) / 128 * 128;
    if (at + bytes + kGap > s.shared_size || bytes > kStaticShared)
      fail("more than 48 KiB of static shared memory");
    s.shared_used = at + bytes + kGap;
    it = s.static_offsets.emplace(key, at | bytes << 32).first;
  }
  // Other blocks of this launch may have been laid out before the array was known.
  for (Block* b : own.cluster->blocks)
    if (b->left) unpoison(b->shared + (it->second & 0xffffffff), bytes);
  return own.shared + (it->second & 0xffffffff);
}

void expect_global(const void* p, size_t bytes, Where at) {
  const Fiber& f = *self();
  const char* address = static_cast<const char*>(p);
  bool elsewhere = address >= f.stack && address < f.stack + kStack;
  for (const Block* b : f.owner->cluster->blocks) elsewhere |= in_shared(*b, p);
  if (elsewhere) fail(text("not in global memory: %p at %s", p, name(at).c_str()));
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    fail(text("not a multiple of %zu: %p at %s", bytes, p, name(at).c_str()));
}

void poll(Where at) {
  if (++state->polls > kPollsInVain && !faults.lose_block)
    fail(text("a flag that no one sets at %s", name(at).c_str()));
  let_others_run();
}
uint64_t nanoseconds() {
  static uint64_t now = 1;
  if (faults.lose_block) now += 600000000;
  return now;
}
void progress(const void* flag, int value) {
  state->polls = 0;
  const Unseen unseen;
  state->raised[flag].emplace(value, self()->distance + 1);
}
void reached(const void* flag, int value) {
  const Unseen unseen;
  const auto& raised = state->raised[flag];
  // The first value that was enough, whatever it is by now.
  const auto it = raised.lower_bound(value);
  if (it != raised.end()) self()->distance = std::max(self()->distance, it->second);
}
void stored_twice(const void* place, Where at) {
  fail(text("another value has come before: %p at %s", place, name(at).c_str()));
}
int64_t longest_way() { return way; }

void mbarrier_init(void* barrier, int arrivals, Where at) {
  if (!in_shared(*self()->owner, barrier) || reinterpret_cast<uintptr_t>(barrier) % 8)
    fail(text("no place for an mbarrier: %p at %s", barrier, name(at).c_str()));
  if (arrivals < 1 || arrivals > kMostOfMbarrier)
    fail(text("mbarrier of %d arrivals at %s", arrivals, name(at).c_str()));
  touch(barrier, 8);
  const Unseen unseen;
  Mbarrier m{};
  m.expected = m.pending = arrivals;
  const auto [it, added] = state->mbarriers.emplace(barrier, m);
  if (!added) fail(text("mbarrier initialised twice at %s", name(at).c_str()));
  self()->initialised.push_back(&it->second);
}
void mbarrier_init_fence() {
  const Unseen unseen;
  for (Mbarrier* m : self()->initialised) m->fenced = true;
  self()->initialised.clear();
}
void mbarrier_arrive(void* barrier, int64_t expect_bytes, Where at) {
  map_shared(*self()->owner, barrier, at);
  Mbarrier& m = mbarrier_at(barrier, at);
  if (m.pending == 0) fail(text("one arrival too many at %s", name(at).c_str()));
  if (expect_bytes < 0 || expect_bytes > kMostOfMbarrier)
    fail(text("an mbarrier cannot expect %lld bytes at %s", static_cast<long long>(expect_bytes),
              name(at).c_str()));
  release(&m.sync[m.phase & 1]);
  const Unseen unseen;
  m.bytes += expect_bytes;
  m.pending--;
  m.distance = std::max(m.distance, self()->distance);
  advance(m);
}
void mbarrier_wait(void* barrier, int parity, Where at) {
  map_shared(*self()->owner, barrier, at);
  Mbarrier& m = mbarrier_at(barrier, at);
  if (parity != 0 && parity != 1)
    fail(text("an mbarrier has no parity %d at %s", parity, name(at).c_str()));
  while (int(m.phase & 1) == parity) {
    Fiber* f = self();
    {
      const Unseen unseen;
      m.waiting.push_back(f);
      f->waits_in = "an mbarrier";
      f->waits_at = at;
    }
    switch_to(next());
  }
  self()->distance = std::max(self()->distance, m.met_at[parity & 1]);
  acquire(&m.sync[parity & 1]);
}
void store_async(void* mine, const void* value, size_t bytes, void* barrier, int rank, Where at) {
  const Block& own = *self()->owner;
  const int size = int(own.cluster->blocks.size());
  if (size < 2) fail(text("st.async in a cluster of one block at %s", name(at).c_str()));
  if (rank < 0 || rank >= size)
    fail(text("no block %d in a cluster of %d at %s", rank, size, name(at).c_str()));
  Block& other = *own.cluster->blocks[size_t(rank)];
  Store c{&other,  map_shared(other, mine, at), map_shared(other, barrier, at), bytes, {}, at,
          nullptr, self()->distance + 1};
  if (!other.begun || !other.left)
    fail(text("st.async to block %d, which has %s, at %s", rank,
              other.begun ? "ended" : "not begun", name(at).c_str()));
  if (reinterpret_cast<uintptr_t>(c.to) % bytes)
    fail(text("not a multiple of %zu: %p at %s", bytes, c.to, name(at).c_str()));
  if (!mbarrier_at(c.barrier, at).fenced && &other != &own)
    fail(text("no fence after the mbarrier's initialisation, for %s", name(at).c_str()));
  touch(c.to, c.bytes);
  if (!faults.send_zeros) memcpy(c.value, value, bytes);
  c.agent = new_agent();
  const Unseen unseen;
  state->in_flight.push_back(c);
}

}  // namespace simt
