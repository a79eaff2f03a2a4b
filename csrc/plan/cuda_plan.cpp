#include "plan/cuda_plan.h"

#include <algorithm>
#include <cstdlib>

namespace fusedrnn {
namespace {

// Multiply-adds a cycle and processor, of a library's product of few rows: a part of the peak.
double product_macs(const Problem& p, bool tf32) {
  return p.dtype == DType::kFloat64 ? 16 : p.dtype == DType::kFloat32 ? (tf32 ? 200 : 64) : 400;
}

// Cycles to multiply a tile of weights, one of `at_once` rows of tiles, with the rows that the
// engine takes: the longer of computing and of reading x, and weights that are not kept.
double tile_cycles(const CudaModel& m, Engine e, int at_once, bool kept) {
  const bool ffma = e == Engine::kFfma || e == Engine::kFfmaNarrow;
  const double compute = e == Engine::kFfma         ? m.ffma_tile
                         : e == Engine::kFfmaNarrow ? m.ffma_narrow_tile
                         : e == Engine::kTf32       ? m.tf32_tile
                                                    : m.half_tile;
  // FFMA reads x row by row, the same 16 bytes for all lanes; tensor cores 4 bytes a lane, twice.
  const double x = ffma ? tile_of(e).columns * m.uniform_read : 2 * 128 / m.shared_bytes;
  return std::max(compute, x / at_once + (kept ? 0 : kTileBytes / m.shared_bytes));
}

// Cycles to multiply all tiles of a block with the rows that the engine takes at a time.
double product_cycles(const CudaModel& m, Engine e, const ProductShape& s) {
  const int kept_rows = kPersistentWarps / s.split * kTilesAtOnce, kept_depth = s.kept * s.split;
  double cycles = 0;
  for (int row = 0; row < s.row_tiles; row += kTilesAtOnce) {
    const int at_once = std::min(kTilesAtOnce, s.row_tiles - row);
    const int kept = row < kept_rows ? kept_depth : 0;
    cycles += at_once * (kept * tile_cycles(m, e, at_once, true) +
                         (s.depth_tiles - kept) * tile_cycles(m, e, at_once, false));
  }
  return cycles;
}

// The product of a layer's input and its weights, for all steps at once, outside the recurrence.
double input_cycles(const Problem& p, const CudaRequest& r, const DeviceSpec& device,
                    const CudaModel& m) {
  const double macs = double(r.steps * r.batch) * double(p.gate_rows()) * double(p.hidden_size);
  return double(p.num_directions) *
         (m.launch + macs / (product_macs(p, r.tf32) * device.processors));
}

constexpr const char* kEngineNames[] = {"ffma", "ffma_narrow", "tf32", "half"};

struct Forced {
  int backend = -1, engine = -1;  // any
  int units = 0, rows = 0, layers = 0;

  bool take(const std::string& word) {
    const size_t equals = word.find('=');
    if (equals == std::string::npos)
      return named(word, kCudaBackendNames, int(CudaBackend::kCount), &backend);
    const std::string name = word.substr(0, equals), value = word.substr(equals + 1);
    if (name == "engine") return named(value, kEngineNames, int(Engine::kCount), &engine);
    int* to = name == "units"    ? &units
              : name == "rows"   ? &rows
              : name == "layers" ? &layers
                                 : nullptr;
    char* rest;
    const long number = std::strtol(value.c_str(), &rest, 10);
    if (!to || *rest || number <= 0 || number > 1 << 20) return false;
    *to = int(number);
    return true;
  }
  static bool named(const std::string& name, const char* const* names, int count, int* to) {
    for (int i = 0; i < count; i++)
      if (name == names[i]) return *to = i, true;
    return false;
  }
};

// What is said of one direction: parts are separated by ';', words of a part by ','.
bool parse(const std::string& all, bool backward, Forced* f, std::string* reason) {
  bool ours = true;
  for (size_t begin = 0; begin < all.size();) {
    const size_t end = std::min(all.find_first_of(",;", begin), all.size());
    std::string word = all.substr(begin, end - begin);
    for (bool way : {false, true}) {
      const std::string prefix = way ? "backward:" : "forward:";
      if (word.compare(0, prefix.size(), prefix)) continue;
      word.erase(0, prefix.size());
      ours = way == backward;
    }
    Forced other;
    if (!(ours ? f : &other)->take(word)) {
      *reason = "FUSEDRNN_PLAN has '" + word +
                "'; it takes one of stepwise, grid and cluster, and units=N, rows=N, layers=N,"
                " engine=ffma, ffma_narrow, tf32 or half, for one direction after forward: or"
                " backward: up to a ;";
      return false;
    }
    ours = ours || (end < all.size() && all[end] == ';');
    begin = end + 1;
  }
  return true;
}

struct Candidate {
  const Problem& p;
  const CudaRequest& r;
  const DeviceSpec& device;
  const CudaModel& m;
  CudaPlan plan;

  int directions() const { return int(p.num_directions); }
  bool cluster() const { return plan.backend == CudaBackend::kCluster; }
  bool alone() const { return plan.shape.team == 1; }
  // Whether all teams of a launch have to run at once, because some wait for others.
  bool together() const { return plan.layers > 1 || !(cluster() || alone()); }

  // Fills in what follows from backend, engine, layers, units and rows. False: it does not fit.
  bool complete(int units, int rows) {
    const bool chained = plan.layers > 1;
    const auto make = r.backward ? backward_shape : forward_shape;
    if (units * rows > kPersistentThreads) return false;
    plan.shape = make(p.cell, plan.engine, cluster(), int(p.hidden_size), units, rows, chained);
    PersistentShape& s = plan.shape;
    if (s.shared_bytes > device.shared_bytes) return false;
    // Two blocks on a processor would each take twice as long, and their clusters wait for them:
    // half of what one may ask for, and what the system adds, keeps them apart.
    if (cluster()) s.shared_bytes = std::max(s.shared_bytes, round_up(device.shared_bytes / 2, 16));
    // Blocks of a cluster store to each other by st.async, which a cluster of one does not have.
    if (cluster() && (alone() || s.team > kLargestCluster)) return false;
    const int teams = cluster() ? device.clusters[s.team] : device.processors / s.team;
    const int64_t slices = r.members * ((r.batch / r.members + s.rows - 1) / s.rows);
    if (slices > INT32_MAX) return false;
    const int stages = plan.layers * directions();
    plan.slices = int(slices);
    // Teams that need not run together follow each other as there is room.
    plan.at_once = together() ? std::min(plan.slices, teams / stages) : plan.slices;
    if (teams == 0 || plan.at_once == 0) return false;
    plan.microseconds = estimate(teams, stages) / m.cycles_per_microsecond;
    return true;
  }

  double estimate(int teams, int stages) const {
    const PersistentShape& s = plan.shape;
    const EngineTile tile = tile_of(plan.engine);
    const double tiles = double(s.recurrent.row_tiles) * s.recurrent.depth_tiles;
    const double rows_at_once = s.x_rows / tile.columns;
    const double product = rows_at_once * product_cycles(m, plan.engine, s.recurrent);
    const double other = rows_at_once * product_cycles(m, plan.engine, s.input);  // of a chain
    const double sums =
        2.0 * s.recurrent.split * s.x_rows * s.recurrent.partial_row * 4 / m.shared_bytes;
    const double moved = r.backward ? 2.0 * s.team * s.units * s.rows * 4
                                    : double(s.team) * s.units * s.rows * tile.operand_bytes;
    const double transfer = alone() ? 0 : moved / m.exchange_bytes;
    const double latency = alone()      ? 0
                           : cluster()  ? m.cluster_exchange
                           : r.backward ? m.grid_exchange
                                        : m.value_exchange;
    double step = product + sums + m.cell + transfer;
    double window = 0;  // while the exchange is on its way
    if (plan.layers > 1 && !r.backward) window = other + sums + m.cell;
    if (plan.layers > 1 && r.backward) step += other + sums + transfer;
    step += std::max(latency, window);
    const double depth = (plan.layers - 1) * (r.backward ? 2.0 : 1.0);
    const int runs =
        together() ? plan.launches() : int((int64_t(plan.slices) * stages + teams - 1) / teams);
    const int groups = divide_up(int(p.num_layers), plan.layers);
    const double weights = (plan.layers > 1 ? 2 : 1) * tiles * m.tile_load;
    const double steps = double(r.steps) + depth;
    return groups * (input_cycles(p, r, device, m) + runs * (m.launch + weights + steps * step));
  }
};

double stepwise_cycles(const Problem& p, const CudaRequest& r, const DeviceSpec& d,
                       const CudaModel& m) {
  const double macs = double(r.batch) * double(p.gate_rows()) * double(p.out_size());
  const double product = macs / (product_macs(p, r.tf32) * d.processors);
  const double layer =
      double(p.num_directions) * double(r.steps) * std::max(m.stepwise_step, product);
  return double(p.num_layers) * (input_cycles(p, r, d, m) + layer);
}

}  // namespace

Exchange exchange_of(const CudaPlan& plan) {
  return plan.backend == CudaBackend::kStepwise  ? Exchange::kStepwise
         : plan.backend == CudaBackend::kCluster ? Exchange::kCluster
         : plan.shape.team == 1                  ? Exchange::kBlock
                                                 : Exchange::kGrid;
}

Family family_of(const Problem& p, const CudaRequest& r, const CudaPlan& plan) {
  const bool stepwise = plan.backend == CudaBackend::kStepwise;
  const Arithmetic arithmetic = p.dtype == DType::kFloat64           ? Arithmetic::kFloat64
                                : p.dtype == DType::kBFloat16        ? Arithmetic::kBFloat16
                                : p.dtype == DType::kFloat16         ? Arithmetic::kFloat16
                                : stepwise                           ? Arithmetic::kFfma
                                : plan.engine == Engine::kTf32       ? Arithmetic::kTf32
                                : plan.engine == Engine::kFfmaNarrow ? Arithmetic::kFfmaNarrow
                                                                     : Arithmetic::kFfma;
  const bool chained = !stepwise && plan.layers > 1;
  return {exchange_of(plan), arithmetic, p.cell, r.backward, chained, r.tangent};
}

namespace {

// Calls `visit` with every plan that can run.
template <class F>
bool each_plan(const Problem& p, const CudaRequest& request, const DeviceSpec& device,
               const char* forced_text, const CudaModel& m, std::string* reason, F visit) {
  const bool tensor_cores = device.capability >= 80;  // of TF32 and of our 16-bit products
  CudaRequest r = request;
  r.tf32 = r.tf32 && tensor_cores;
  Forced forced;
  if (!parse(forced_text ? forced_text : "", r.backward, &forced, reason)) return false;
  auto wanted = [&](CudaBackend b) { return forced.backend < 0 || forced.backend == int(b); };
  auto struck = [&](const CudaPlan& plan) {
    return device.struck[size_t(index_of(family_of(p, r, plan)))];
  };
  if (wanted(CudaBackend::kStepwise) && !forced.units && !forced.rows && forced.layers <= 1 &&
      forced.engine < 0) {
    CudaPlan plan{};
    plan.backend = CudaBackend::kStepwise, plan.layers = 1;
    plan.microseconds = stepwise_cycles(p, r, device, m) / m.cycles_per_microsecond;
    if (!struck(plan)) visit(plan);
  }
  bool persistent = p.dtype != DType::kFloat64 && !p.proj_size && !p.layer_norm &&
                    p.hidden_size <= 1 << 16 && r.steps < INT32_MAX && r.batch > 0 && r.steps > 0 &&
                    !r.tangent;
  const bool half = bytes(p.dtype) == 2;
  if (half && !tensor_cores) persistent = false;
  for (CudaBackend backend : {CudaBackend::kCluster, CudaBackend::kGrid}) {
    if (!persistent || !wanted(backend)) continue;
    const bool cluster = backend == CudaBackend::kCluster;
    if (device.capability < (cluster ? 90 : 75)) continue;
    const int unit = half ? 8 : 4;  // units are exchanged 16 bytes at a time
    const int H = int(p.hidden_size), most = cluster ? kLargestCluster : device.processors;
    int last_units = 0;
    for (int team = 1; team <= most; team += cluster || team < 16 ? 1 : 4) {
      const int units = forced.units ? forced.units : round_up(divide_up(H, team), unit);
      if (units == last_units || units % unit) continue;
      last_units = units;
      for (Engine engine : {Engine::kFfma, Engine::kFfmaNarrow, Engine::kTf32, Engine::kHalf}) {
        const bool narrow = engine == Engine::kFfmaNarrow;
        // float32 may run without TF32 where that is permitted, if it is asked to.
        const bool chosen = half     ? engine == Engine::kHalf
                            : r.tf32 ? engine == Engine::kTf32
                                     : engine == Engine::kFfma || narrow;
        const bool can = half ? engine == Engine::kHalf
                              : engine != Engine::kHalf && (r.tf32 || engine != Engine::kTf32);
        if (forced.engine < 0 ? !chosen : !can || forced.engine != int(engine)) continue;
        for (int rows : {2, 4, 8, 16, 24, 32, 48, 64, 96, 128}) {
          if (forced.rows) rows = forced.rows;
          const int columns = tile_of(engine).columns;
          // Tensor cores are fast enough for rows of zeros, which FFMA has another engine for.
          const bool padded = (engine == Engine::kTf32 || half) && columns % rows == 0;
          if ((rows % columns && !padded) || (narrow && rows > 2)) continue;
          // A chain is all layers, or as many as there is room for.
          for (int layers = int(std::min<int64_t>(p.num_layers, kMaxStages)); layers >= 1;
               layers--) {
            if (p.num_directions > 1 && layers > 1) continue;
            if (forced.layers && layers != forced.layers) continue;
            Candidate c{p, r, device, m, {}};
            c.plan.backend = backend, c.plan.engine = engine, c.plan.layers = layers;
            if (c.complete(units, rows) && !struck(c.plan)) visit(c.plan);
          }
          if (forced.rows) break;
        }
      }
    }
  }
  return true;
}

}  // namespace

bool plan_cuda(const Problem& p, const CudaRequest& r, const DeviceSpec& device,
               const char* forced_text, CudaPlan* best, std::string* reason) {
  bool found = false;
  auto better = [&](const CudaPlan& plan) {
    if (!found || plan.microseconds < best->microseconds) *best = plan, found = true;
  };
  if (!each_plan(p, r, device, forced_text, CudaModel{}, reason, better)) return false;
  if (!found)
    *reason =
        forced_text && *forced_text
            ? std::string("FUSEDRNN_PLAN=") + forced_text + " cannot run this shape on this device"
            : "all kernels for this call were refused or found wrong on this device";
  return found;
}

bool forces(const char* forced, bool backward) {
  Forced f;
  std::string reason;
  if (!forced || !parse(forced, backward, &f, &reason)) return forced;
  return f.backend >= 0 || f.engine >= 0 || f.units || f.rows || f.layers;
}

bool plans_cuda(const Problem& p, const CudaRequest& r, const DeviceSpec& device,
                const char* forced_text, const CudaModel& m, std::vector<CudaPlan>* plans,
                std::string* reason) {
  auto add = [&](const CudaPlan& plan) { plans->push_back(plan); };
  if (!each_plan(p, r, device, forced_text, m, reason, add)) return false;
  std::stable_sort(plans->begin(), plans->end(), [](const CudaPlan& a, const CudaPlan& b) {
    return a.microseconds < b.microseconds;
  });
  return true;
}

std::string forcing(const CudaPlan& plan) {
  const std::string backend = kCudaBackendNames[int(plan.backend)];
  if (plan.backend == CudaBackend::kStepwise) return backend;
  return backend + ",units=" + std::to_string(plan.shape.units) +
         ",rows=" + std::to_string(plan.shape.rows) + ",layers=" + std::to_string(plan.layers) +
         ",engine=" + kEngineNames[int(plan.engine)];
}

std::string describe(const CudaPlan& plan) {
  std::string text = kCudaBackendNames[int(plan.backend)];
  if (plan.backend == CudaBackend::kStepwise) return text;
  constexpr const char* kEngines[] = {"FFMA", "FFMA, 2 rows", "TF32 tensor cores",
                                      "16-bit tensor cores"};
  const PersistentShape& s = plan.shape;
  auto number = [](int n) { return std::to_string(n); };
  text += ": " + number(plan.slices) + " x " + number(s.rows) + " rows, teams of " +
          (s.team == 1 ? "one block" : number(s.team) + " blocks") + " of " + number(s.units) +
          " units, " + number(plan.layers) + (plan.layers == 1 ? " layer" : " layers") +
          " a launch, " + kEngines[int(plan.engine)] + ", " + number(s.shared_bytes >> 10) +
          " KiB of shared memory";
  if (plan.launches() > 1) text += ", " + number(plan.launches()) + " launches";
  return text;
}

}  // namespace fusedrnn
