// What the parts of a persistent step cost, each alone: shared memory, products, exchanges, fences.
//
// A library of its own (micro.py builds it and calls micro_run), no part of the package. Each
// kernel checks what it computes or receives: `wrong` counts what it should not have found. Under
// the emulator the same kernels show that they end and are right; its cycles mean nothing.
#include <cstdlib>
#include <cstring>

#include "cuda/primitives.h"

#define FUSEDRNN_API extern "C" __attribute__((visibility("default")))

namespace fusedrnn {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;  // of a block, as the persistent kernels have
constexpr int kLooks = 1 << 20;                        // at a word that does not come: an error

struct Micro {
  int size;     // bytes or stores, as the kernel says
  int repeats;  // that are timed together
  int cluster;
  long long* cycles;  // [blocks], of all repeats
  int* wrong;         // [blocks]
  int* flags;         // [blocks] zeros
  Words* data;        // zeros, kDataBytes
};
constexpr size_t kDataBytes = size_t(16) << 20;

#if defined(__CUDACC__)
__device__ inline long long cycles() { return clock64(); }
__device__ inline void found_wrong(int* p) { atomicAdd(p, 1); }
// 16 bytes of {data, step, data, step}, each pair of which arrives whole: as NCCL's LL protocol.
__device__ inline void post(Words* to, const Words& w) { store_words(to, w); }
__device__ inline Words look(const Words* p) {
  Words w;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3])
               : "l"(p)
               : "memory");
  return w;
}
#else
inline long long cycles() {
  static long long now = 0;
  return ++now;
}
inline void found_wrong(int* p) { ++*p; }
inline void post(Words* to, const Words& w) {
  store_words(to, w);
  simt::progress(to, int(w.word[1]));
}
inline Words look(const Words* p) {
  simt::poll(simt::Where::current());
  return *p;
}
#endif

// The block's time, from its first to its last thread.
struct Timer {
  const Micro& p;
  long long start;

  __device__ explicit Timer(const Micro& p) : p(p), start(0) {
    __syncthreads();
    start = cycles();
  }
  __device__ void stop() const {
    __syncthreads();
    if (threadIdx.x == 0) p.cycles[blockIdx.x] = cycles() - start;
  }
};

__device__ inline Words words_of(uint32_t x) { return {{x, x, x, x}}; }

__device__ inline bool all_are(const Words& w, uint32_t x) {
  return w.word[0] == x && w.word[1] == x && w.word[2] == x && w.word[3] == x;
}

// Whether a flag comes to `step`. Who has waited in vain once waits no more.
__device__ inline bool comes_to(const int* flag, int step) {
  for (int n = 0; n < kLooks; n++)
    if (load_acquire(flag) >= step) return true;
  return false;
}

// ---- within a block ----

// A dependent chain of multiply-adds, for the clock rate.
__global__ void rate(const __grid_constant__ Micro p) {
  const Timer timer(p);
  float x = float(p.size);
  for (int i = 0; i < p.repeats; i++) x = x * 0.5f + 1;
  timer.stop();
  if (!(x >= 0 && x < 4)) found_wrong(p.wrong + blockIdx.x);
}

enum class Read { kNone, kUniform, kOwn };  // 16 bytes: the same of all lanes, or each its own
enum class Math { kNone, kFfma, kHmma };    // 8 multiply-adds of each lane, or one product of bf16

// Each warp reads and multiplies `repeats` times. All of shared memory is ones.
template <Read kRead, Math kMath>
__global__ void __launch_bounds__(kThreads) reading(const __grid_constant__ Micro p) {
  constexpr int kWords = 1024;  // of a warp's turns
  FUSEDRNN_DYNAMIC_SHARED(Words, shared);
  const uint32_t one = kMath == Math::kHmma ? 0x3f803f80u : float_to_bits(1);
  for (int i = threadIdx.x; i < kWords; i += kThreads) shared[i] = words_of(one);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int mine = kRead == Read::kOwn ? lane : 0;
  float sums[8] = {};
  __syncthreads();
  uint32_t all = shared[lane].word[0];  // one, which the compiler must not know
  const uint32_t a[4] = {all, all, all, all};
  const Timer timer(p);
#pragma unroll 8
  for (int i = 0; i < p.repeats; i++) {
    Words w = words_of(all);
    if constexpr (kRead != Read::kNone) w = shared[((i * 8 + warp) * 32 + mine) % kWords];
    if constexpr (kMath == Math::kNone) {
      all &= w.word[0] & w.word[1] & w.word[2] & w.word[3];
    } else if constexpr (kMath == Math::kFfma) {
      const float x = bits_to_float(all);
#pragma unroll
      for (int k = 0; k < 8; k++) sums[k] = sums[k] * x + bits_to_float(w.word[k % 4]);
    } else {
      float (&d)[4] = *reinterpret_cast<float (*)[4]>(sums + i % 2 * 4);
      const uint32_t b[2] = {w.word[0] & w.word[2], w.word[1] & w.word[3]};
      mma(BFloat16{}, d, a, b);
    }
  }
  timer.stop();
  float sum = 0;
  for (int k = 0; k < 8; k++) sum += sums[k];
  const float expected = kMath == Math::kNone   ? 0
                         : kMath == Math::kFfma ? 8.f * float(p.repeats)
                                                : 4.f * 16 * float(p.repeats);
  if (sum != expected || all != one) found_wrong(p.wrong + blockIdx.x);
}

// The inner loop of the FFMA engine: two tiles of weights times 8 rows of x.
__global__ void __launch_bounds__(kThreads) ffma_tiles(const __grid_constant__ Micro p) {
  constexpr int kWords = 2048;
  FUSEDRNN_DYNAMIC_SHARED(Words, shared);
  for (int i = threadIdx.x; i < kWords; i += kThreads) shared[i] = words_of(float_to_bits(1));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sums[2][8] = {};
  const Timer timer(p);
#pragma unroll 4
  for (int i = 0; i < p.repeats; i++) {
    const Words* const from = shared + (i * kWarps + warp) * 64 % kWords;
    const Words tile[2] = {from[lane], from[32 + lane]};
#pragma unroll
    for (int n = 0; n < 8; n++) {
      const Words x = shared[(i + 128 * n) % kWords];
#pragma unroll
      for (int t = 0; t < 2; t++)
#pragma unroll
        for (int k = 0; k < 4; k++)
          sums[t][n] += bits_to_float(tile[t].word[k]) * bits_to_float(x.word[k]);
    }
  }
  timer.stop();
  for (int n = 0; n < 8; n++)
    if (sums[0][n] != 4.f * float(p.repeats) || sums[1][n] != sums[0][n])
      found_wrong(p.wrong + blockIdx.x);
}

// As a block that raises its flag: `size` stores of 16 bytes, a barrier, a release.
__global__ void fence(const __grid_constant__ Micro p) {
  Words* const mine = p.data + int64_t(blockIdx.x) * 64;
  const Timer timer(p);
  for (int step = 1; step <= p.repeats; step++) {
    if (int(threadIdx.x) < p.size) store_words(mine + threadIdx.x, words_of(uint32_t(step)));
    __syncthreads();
    if (threadIdx.x == 0) store_release(p.flags + blockIdx.x, step);
  }
  timer.stop();
  if (p.flags[blockIdx.x] != p.repeats && threadIdx.x == 0) found_wrong(p.wrong + blockIdx.x);
}

// ---- between the blocks of a cluster ----

__global__ void barrier(const __grid_constant__ Micro p) {
#if FUSEDRNN_HAS_CLUSTERS
  const Timer timer(p);
  for (int i = 0; i < p.repeats; i++) {
    cluster_arrive();
    cluster_wait();
  }
  timer.stop();
#endif
}

// Every block sends each block of its cluster a part of the `size` bytes that this gets in a step,
// and waits for its own: a step of a forward recurrence without the rest of it.
__global__ void exchange(const __grid_constant__ Micro p) {
#if FUSEDRNN_HAS_CLUSTERS
  FUSEDRNN_DYNAMIC_SHARED(Words, inbox);  // two steps
  FUSEDRNN_STATIC_SHARED(Mbarrier, arrivals, 2);
  const int rank = int(blockIdx.x) % p.cluster, words = p.size / 16, part = words / p.cluster;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) mbarrier_init(arrivals + i, 1);
    mbarrier_init_fence();
    for (int i = 0; i < 2; i++) mbarrier_arrive(arrivals + i, p.size);
  }
  cluster_arrive();
  cluster_wait();
  const Timer timer(p);
  for (int step = 1; step <= p.repeats; step++) {
    Words* const to = inbox + step % 2 * words;
    Mbarrier* const m = arrivals + step % 2;
    for (int i = threadIdx.x; i < words; i += kThreads)
      store_async(to + rank * part + i % part, words_of(uint32_t(step)), m, i / part);
    mbarrier_wait(m, (step - 1) / 2 % 2);
    if (threadIdx.x == 0) mbarrier_arrive(m, p.size);
    for (int i = threadIdx.x; i < words; i += kThreads)
      if (!all_are(to[i], uint32_t(step))) found_wrong(p.wrong + blockIdx.x);
    __syncthreads();  // the reads are over before this block's next stores: see team.h
  }
  timer.stop();
  cluster_arrive();  // no block ends before the stores to it have come
  cluster_wait();
#endif
}

// ---- between blocks anywhere: each publishes `size` bytes in a step, and reads everyone's ----

__global__ void flags(const __grid_constant__ Micro p) {
  const int blocks = int(gridDim.x), words = p.size / 16;
  const Timer timer(p);
  bool lost = false;
  for (int step = 1; step <= p.repeats; step++) {
    Words* const all = p.data + int64_t(step % 2) * blocks * words;
    for (int i = threadIdx.x; i < words; i += kThreads)
      store_words(all + int64_t(blockIdx.x) * words + i, words_of(uint32_t(step)));
    __syncthreads();
    if (threadIdx.x == 0) store_release(p.flags + blockIdx.x, step);
    for (int i = threadIdx.x; i < blocks; i += kThreads)
      lost = lost || !comes_to(p.flags + i, step);
    __syncthreads();
#pragma unroll 8
    for (int i = threadIdx.x; i < blocks * words; i += kThreads)
      if (lost || !all_are(all[i], uint32_t(step))) found_wrong(p.wrong + blockIdx.x);
    __syncthreads();
  }
  timer.stop();
}

// The same with the step beside each 4 bytes of data: twice the words, and nothing else to wait
// for.
__global__ void data_words(const __grid_constant__ Micro p) {
  constexpr int kAtOnce = 8;  // loads of a thread that are on their way together
  const int blocks = int(gridDim.x), words = p.size / 8;
  const Timer timer(p);
  bool lost = false;
  for (int step = 1; step <= p.repeats; step++) {
    Words* const all = p.data + int64_t(step % 2) * blocks * words;
    const uint32_t now = uint32_t(step);
    for (int i = threadIdx.x; i < words; i += kThreads)
      post(all + int64_t(blockIdx.x) * words + i, {{~now, now, ~now, now}});
    for (int first = threadIdx.x; first < blocks * words; first += kAtOnce * kThreads) {
      Words found[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; k++)
        if (first + k * kThreads < blocks * words) found[k] = look(all + first + k * kThreads);
#pragma unroll
      for (int k = 0; k < kAtOnce; k++) {
        if (first + k * kThreads >= blocks * words) break;
        Words& w = found[k];
        for (int n = 0; !lost && (w.word[1] != now || w.word[3] != now); n++) {
          w = look(all + first + k * kThreads);
          lost = n == kLooks;
        }
        if (lost || w.word[0] != ~now || w.word[2] != ~now) found_wrong(p.wrong + blockIdx.x);
      }
    }
    __syncthreads();
  }
  timer.stop();
}

// ---- the host ----

struct Entry {
  const char* name;
  void (*kernel)(Micro);
  int shared_bytes, shared_per_size;  // dynamic shared memory: the first + size * the second
  bool cooperative;
};
const Entry kEntries[] = {
    {"rate", rate, 0, 0, false},
    {"uniform", reading<Read::kUniform, Math::kNone>, 16384, 0, false},
    {"own", reading<Read::kOwn, Math::kNone>, 16384, 0, false},
    {"ffma", reading<Read::kNone, Math::kFfma>, 16384, 0, false},
    {"uniform+ffma", reading<Read::kUniform, Math::kFfma>, 16384, 0, false},
    {"hmma", reading<Read::kNone, Math::kHmma>, 16384, 0, false},
    {"uniform+hmma", reading<Read::kUniform, Math::kHmma>, 16384, 0, false},
    {"ffma_tiles", ffma_tiles, 32768, 0, false},
    {"fence", fence, 0, 0, false},
    {"barrier", barrier, 0, 1, false},
    {"cooperative_barrier", barrier, 0, 1, true},
    {"exchange", exchange, 0, 2, false},
    {"flags", flags, 0, 0, true},
    {"data_words", data_words, 0, 0, true},
};

#if defined(__CUDACC__)
// Zeros on the device.
struct Memory {
  void* data = nullptr;
  int error;
  explicit Memory(size_t bytes) : error(cudaMalloc(&data, bytes)) {
    if (!error) error = cudaMemset(data, 0, bytes);
  }
  ~Memory() { cudaFree(data); }
  int read(void* to, size_t bytes) const {
    return cudaMemcpy(to, data, bytes, cudaMemcpyDeviceToHost);
  }
};
// Waits for what `f` enqueues, and measures it.
template <class F>
int timed(F f, double* microseconds) {
  cudaEvent_t events[2];
  float milliseconds = 0;
  int error = cudaEventCreate(&events[0]);
  if (error) return error;
  if ((error = cudaEventCreate(&events[1]))) return error;
  cudaEventRecord(events[0]);
  error = f();
  cudaEventRecord(events[1]);
  if (!error) error = cudaDeviceSynchronize();
  if (!error) error = cudaEventElapsedTime(&milliseconds, events[0], events[1]);
  *microseconds = 1e3 * milliseconds;
  cudaEventDestroy(events[0]), cudaEventDestroy(events[1]);
  return error;
}
#else
struct Memory {
  void* data = nullptr;
  int error;
  explicit Memory(size_t bytes) : error(posix_memalign(&data, 256, bytes)) {
    memset(data, 0, bytes);
  }
  ~Memory() { free(data); }
  int read(void* to, size_t bytes) const {
    memcpy(to, data, bytes);
    return 0;
  }
};
template <class F>
int timed(F f, double* microseconds) {
  *microseconds = 1;
  return f();
}
#endif

}  // namespace

// Runs a kernel; `cycles` and `wrong` have a place for each block. Returns a cudaError_t, -1 for a
// name that is none.
FUSEDRNN_API int micro_run(const char* name, int blocks, int cluster, int size, int repeats,
                           long long* cycles, int* wrong, double* microseconds) {
  for (const Entry& e : kEntries) {
    if (strcmp(e.name, name)) continue;
    const size_t each = size_t(blocks);
    const Memory times(each * sizeof *cycles), errors(each * sizeof *wrong),
        flags(each * sizeof(int)), data(kDataBytes);
    for (const Memory* m : {&times, &errors, &flags, &data})
      if (m->error) return m->error;
    const Micro p{size,
                  repeats,
                  cluster,
                  static_cast<long long*>(times.data),
                  static_cast<int*>(errors.data),
                  static_cast<int*>(flags.data),
                  static_cast<Words*>(data.data)};
    Grid grid{dim3(unsigned(blocks)), dim3(kThreads)};
    grid.cluster = cluster, grid.cooperative = e.cooperative;
    grid.shared_bytes = size_t(e.shared_bytes) + size_t(size) * size_t(e.shared_per_size);
    int error = timed([&] { return launch(e.kernel, grid, nullptr, p); }, microseconds);
    if (!error) error = times.read(cycles, each * sizeof *cycles);
    if (!error) error = errors.read(wrong, each * sizeof *wrong);
    return error;
  }
  return -1;
}

// How many clusters of `size` blocks with so much dynamic shared memory run at once; 0: none.
FUSEDRNN_API int micro_clusters(int size, int shared_bytes) {
  return at_once(barrier, size, dim3(kThreads), size_t(shared_bytes));
}

FUSEDRNN_API const char* micro_error(int error) {
  return error < 0 ? "there is no such kernel" : error_name(error);
}

}  // namespace fusedrnn
