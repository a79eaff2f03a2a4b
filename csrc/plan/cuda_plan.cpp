#include "plan/cuda_plan.h"

#include <cstdlib>
#include <cstring>

namespace fusedrnn {
namespace {

// What the estimate is made of, in cycles of a processor. Published figures for an H100 where there
// are some, rough counts elsewhere: they order the candidates, and are to be replaced by
// measurements.
constexpr double kCyclesPerMicrosecond = 1700;
constexpr double kClusterExchange = 1100;  // 0.65 us, a barrier's: counted stores may take less
constexpr double kGridExchange = 1900;     // 1.1 us, a barrier's
constexpr double kCell = 350;              // sums, cell, block barriers
constexpr double kSharedBytes = 128;       // a cycle, of a block's own shared memory
constexpr double kExchangeBytes = 32;      // a cycle, to and from other blocks
constexpr double kLaunch = 5 * kCyclesPerMicrosecond;
constexpr double kStepwiseStep = 10 * kCyclesPerMicrosecond;  // two launches and a product

// Multiply-adds a cycle and processor, of a library's product of few rows: a part of the peak.
double product_macs(const Problem& p, bool tf32) {
  return p.dtype == DType::kFloat64 ? 16 : p.dtype == DType::kFloat32 ? (tf32 ? 200 : 64) : 400;
}

// Cycles to multiply a tile of weights with `columns` rows: the longer of reading and computing.
double tile_cycles(Engine e) {
  return e == Engine::kFfma ? 8 : 5;  // 1024 multiply-adds at 128 a cycle; 512 bytes and x
}

// The product of a layer's input and its weights, for all steps at once, outside the recurrence.
double input_cycles(const Problem& p, const CudaRequest& r, const DeviceSpec& device) {
  const double macs = double(r.steps * r.batch) * double(p.gate_rows()) * double(p.hidden_size);
  return double(p.num_directions) *
         (kLaunch + macs / (product_macs(p, r.tf32) * device.processors));
}

struct Forced {
  int backend = -1;  // any
  int units = 0, rows = 0, layers = 0;
};

bool parse(const char* text, Forced* f, std::string* reason) {
  const std::string all = text ? text : "";
  for (size_t begin = 0; begin < all.size();) {
    const size_t end = std::min(all.find(',', begin), all.size());
    const std::string word = all.substr(begin, end - begin);
    begin = end + 1;
    const size_t equals = word.find('=');
    bool known = false;
    if (equals == std::string::npos) {
      for (int i = 0; i < int(CudaBackend::kCount); i++)
        if (word == kCudaBackendNames[i]) f->backend = i, known = true;
    } else {
      char* rest;
      const long value = std::strtol(word.c_str() + equals + 1, &rest, 10);
      const std::string name = word.substr(0, equals);
      int* to = name == "units"    ? &f->units
                : name == "rows"   ? &f->rows
                : name == "layers" ? &f->layers
                                   : nullptr;
      known = to && *rest == 0 && value > 0 && value <= 1 << 20;
      if (known) *to = int(value);
    }
    if (!known) {
      *reason = "FUSEDRNN_PLAN has '" + word +
                "'; it takes one of stepwise, grid and cluster, and units=N, rows=N, layers=N";
      return false;
    }
  }
  return true;
}

struct Candidate {
  const Problem& p;
  const CudaRequest& r;
  const DeviceSpec& device;
  CudaPlan plan;

  int directions() const { return int(p.num_directions); }
  bool cluster() const { return plan.backend == CudaBackend::kCluster; }
  bool alone() const { return plan.shape.team == 1; }
  // Whether all teams of a launch have to run at once, because some wait for others.
  bool together() const { return plan.layers > 1 || !(cluster() || alone()); }

  // Fills in what follows from backend, engine, layers, units and rows. False: it does not fit.
  bool complete(int units, int rows) {
    const EngineTile tile = tile_of(plan.engine);
    const bool chained = plan.layers > 1;
    const auto make = r.backward ? backward_shape : forward_shape;
    if (units * round_up(rows, tile.columns) > kPersistentThreads) return false;
    plan.shape = make(p.cell, plan.engine, cluster(), int(p.hidden_size), units, rows, chained);
    PersistentShape& s = plan.shape;
    if (s.shared_bytes > device.shared_bytes) return false;
    // Two blocks on a processor would each take twice as long, and their clusters wait for them:
    // half of what one may ask for, and what the system adds, keeps them apart.
    if (cluster()) s.shared_bytes = std::max(s.shared_bytes, round_up(device.shared_bytes / 2, 16));
    // Blocks of a cluster store to each other by st.async, which a cluster of one does not have.
    if (cluster() && (alone() || s.team > kLargestCluster)) return false;
    const int teams = cluster() ? device.clusters[s.team] : device.processors / s.team;
    const int64_t slices = (r.batch + s.rows - 1) / s.rows;
    if (slices > INT32_MAX) return false;
    const int stages = plan.layers * directions();
    plan.slices = int(slices);
    // Teams that need not run together follow each other as there is room.
    plan.at_once = together() ? std::min(plan.slices, teams / stages) : plan.slices;
    if (teams == 0 || plan.at_once == 0) return false;
    plan.microseconds = estimate(teams, stages) / kCyclesPerMicrosecond;
    return true;
  }

  double estimate(int teams, int stages) const {
    const PersistentShape& s = plan.shape;
    const EngineTile tile = tile_of(plan.engine);
    const double tiles = double(s.recurrent.row_tiles) * s.recurrent.depth_tiles;
    const double product = tiles * tile_cycles(plan.engine) * (s.rows / tile.columns);
    const double sums =
        2.0 * s.recurrent.split * s.rows * s.recurrent.partial_row * 4 / kSharedBytes;
    const double moved = r.backward ? 2.0 * s.team * s.units * s.rows * 4
                                    : double(s.team) * s.units * s.rows * tile.operand_bytes;
    const double transfer = alone() ? 0 : moved / kExchangeBytes;
    const double latency = alone() ? 0 : cluster() ? kClusterExchange : kGridExchange;
    double step = product + sums + kCell + transfer;
    double window = 0;  // while the exchange is on its way
    if (plan.layers > 1 && !r.backward) window = product + sums + kCell;
    if (plan.layers > 1 && r.backward) step += product + sums + transfer;
    step += std::max(latency, window);
    const double depth = (plan.layers - 1) * (r.backward ? 2.0 : 1.0);
    const int runs =
        together() ? plan.launches() : int((int64_t(plan.slices) * stages + teams - 1) / teams);
    const int groups = divide_up(int(p.num_layers), plan.layers);
    const double weights = tiles * kTileBytes / kExchangeBytes;
    const double steps = double(r.steps) + depth;
    return groups * (input_cycles(p, r, device) + runs * (kLaunch + weights + steps * step));
  }
};

double stepwise_cycles(const Problem& p, const CudaRequest& r, const DeviceSpec& d) {
  const double macs = double(r.batch) * double(p.gate_rows()) * double(p.out_size());
  const double product = macs / (product_macs(p, r.tf32) * d.processors);
  const double layer =
      double(p.num_directions) * double(r.steps) * std::max(kStepwiseStep, product);
  return double(p.num_layers) * (input_cycles(p, r, d) + layer);
}

}  // namespace

bool plan_cuda(const Problem& p, const CudaRequest& request, const DeviceSpec& device,
               const char* forced_text, CudaPlan* best, std::string* reason) {
  const bool tensor_cores = device.capability >= 80;  // of TF32 and of our 16-bit products
  CudaRequest r = request;
  r.tf32 = r.tf32 && tensor_cores;
  Forced forced;
  if (!parse(forced_text, &forced, reason)) return false;
  auto wanted = [&](CudaBackend b) { return forced.backend < 0 || forced.backend == int(b); };
  bool found = false;
  if (wanted(CudaBackend::kStepwise) && !forced.units && !forced.rows && forced.layers <= 1) {
    *best = CudaPlan{};
    best->backend = CudaBackend::kStepwise, best->layers = 1;
    best->microseconds = stepwise_cycles(p, r, device) / kCyclesPerMicrosecond;
    found = true;
  }
  bool persistent = p.dtype != DType::kFloat64 && !p.proj_size && !p.layer_norm &&
                    p.hidden_size <= 1 << 16 && r.steps < INT32_MAX && r.batch > 0 && r.steps > 0;
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
      for (int narrow = 0; narrow <= (half || r.tf32 ? 0 : 1); narrow++)
        for (int rows : {2, 8, 16, 24, 32, 48, 64, 96, 128}) {
          const Engine engine = half     ? Engine::kHalf
                                : r.tf32 ? Engine::kTf32
                                : narrow ? Engine::kFfmaNarrow
                                         : Engine::kFfma;
          if (forced.rows) rows = forced.rows;
          if (rows % tile_of(engine).columns || (narrow && rows > 2)) continue;
          // A chain is all layers, or as many as there is room for.
          for (int layers = int(std::min<int64_t>(p.num_layers, kMaxStages)); layers >= 1;
               layers--) {
            if (p.num_directions > 1 && layers > 1) continue;
            if (forced.layers && layers != forced.layers) continue;
            Candidate c{p, r, device, {}};
            c.plan.backend = backend, c.plan.engine = engine, c.plan.layers = layers;
            if (!c.complete(units, rows)) continue;
            if (!found || c.plan.microseconds < best->microseconds) *best = c.plan, found = true;
          }
          if (forced.rows) break;
        }
    }
  }
  if (!found)
    *reason = std::string("FUSEDRNN_PLAN=") + forced_text + " cannot run this shape on this device";
  return found;
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
