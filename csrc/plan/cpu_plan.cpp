#include "plan/cpu_plan.h"

#include <algorithm>

namespace fusedrnn {
namespace {

constexpr int64_t kL2Bytes = 2 << 20;  // of one core

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As it is packed.
int64_t recurrent_weight_bytes(const Problem& p, const CpuCosts& costs) {
  return p.gate_rows() * p.out_size() * costs.weight_bytes;
}

// ---- the variant ----

bool takes(const CpuVariant& variant, const Problem& p, const CpuRequest& r, const CpuMachine& m,
           bool named) {
  const CpuCosts& costs = variant.costs[int(p.dtype)];
  if (!costs.computes || (costs.tiled && !m.tiles)) return false;
  // On tiles a float32 is three bfloat16, which take time to make: only larger products pay for
  // that. Who names the variant gets it with all that is packed.
  if (costs.planes == 1) return true;
  if (r.tokens <= kFewTokensBack) return false;
  constexpr int64_t kLeastRows = 16, kMostTokensWithout = 64;
  return named || (r.batch >= kLeastRows && r.tokens > kMostTokensWithout && p.hidden_size >= 64 &&
                   p.gate_rows() >= 128);
}

int choose_variant(const Problem& p, const CpuRequest& r, const CpuMachine& m) {
  int i = 0;
  while (i < m.count - 1 && !takes(m.variants[i], p, r, m, m.named && i == 0)) i++;
  return i;
}

// ---- weights in fewer bytes ----

// With fewer rows tiles are mostly empty.
constexpr int64_t kLeastTileRows = 7;

// How weights in fewer bytes are multiplied, and the variant that does. Integers where the widest
// vectors have their products; else few rows are multiplied in place, and more by panels of the
// call.
ProductKind choose_product(const Problem& p, const CpuRequest& r, const CpuMachine& m,
                           int* variant) {
  const int64_t deepest =
      std::max({p.product_input(0), p.hidden_size, p.num_directions * p.out_size()});
  auto first_variant = [&](auto fits) {
    for (int i = 0; i < m.count; i++)
      if (fits(m.variants[i])) return *variant = i, true;
    return false;
  };
  auto first = [&](auto fits) {
    return first_variant([&](const CpuVariant& v) { return fits(v.costs[int(DType::kFloat32)]); });
  };
  if (p.stored == Stored::kInt8 && first([&](const CpuCosts& c) {
        return (c.computes || c.deepest_integers) &&
               (!c.tiled || (m.tiles && r.batch >= kLeastTileRows));
      }) &&
      deepest <= m.variants[*variant].costs[int(DType::kFloat32)].deepest_integers)
    return ProductKind::kIntegers;
  const auto pairs = [&](const CpuVariant& v) {
    const CpuCosts& c = v.costs[int(DType::kBFloat16)];
    return c.computes && c.weight_bytes == 2 &&
           (!c.tiled || (m.tiles && r.batch >= kLeastTileRows));
  };
  if (p.stored == Stored::kBFloat16 && r.batch > kDotRows && first_variant(pairs))
    return ProductKind::kPairs;
  if (r.batch <= kDotRows && first([](const CpuCosts& c) { return c.words; }))
    return ProductKind::kWords;
  *variant = choose_variant(p, r, m);
  return ProductKind::kPanels;
}

// The costs of that product.
CpuCosts product_costs(const CpuPlan& plan, const Problem& p, const CpuMachine& m) {
  CpuCosts costs = m.variants[plan.variant].costs[int(p.dtype)];
  if (plan.pass.product == ProductKind::kPanels) return costs;
  if (plan.pass.product == ProductKind::kPairs)
    return m.variants[plan.variant].costs[int(DType::kBFloat16)];
  costs.planes = 1, costs.weight_bytes = p.stored == Stored::kInt8 ? 1 : 2;
  costs.least_rows = std::max<int64_t>(1, costs.least_rows);
  return costs;
}

// ---- weights that are read unpacked ----

// How many threads share the steps of a call whose weights are all read unpacked; 0: they are
// packed.
int64_t unpacked_threads(const Problem& p, const CpuCosts& costs, const CpuRequest& r,
                         const CpuMachine& m) {
  constexpr int64_t kBytesOfThread = 256 << 10;  // take longer to read than threads to synchronise
  const int64_t depth = p.hidden_size + std::max(p.input_size, p.num_directions * p.hidden_size),
                weights = p.gate_rows() * depth * bytes(p.dtype);
  // More tokens pay for the packing: soon if the weights are small, or in many steps, each of which
  // reads all of them, from beyond L2 even.
  int64_t most_tokens = 8;
  if (weights >= kL2Bytes / 4 && costs.loads_quickly) {
    if (r.steps <= 3)
      most_tokens = kFewTokens;
    else if (r.steps <= 8 && weights <= kL2Bytes)
      most_tokens = 16;
  }
  // In backward, and where operands are not pairs, bfloat16 is widened; tiles multiply faster than
  // pairs.
  if (p.dtype == DType::kBFloat16) {
    if (r.backward || costs.tiled || !costs.loads_quickly)
      most_tokens = 4;
    else if (weights < kL2Bytes)
      most_tokens = std::min<int64_t>(most_tokens, 16);
  }
  if (r.backward) most_tokens = std::min(most_tokens, kFewTokensBack);
  if (r.tangent) return 0;
  const bool plain = p.stored == Stored::kPlain && !p.one_hot && !p.proj_size && !p.zoneout &&
                     !p.all_states && !p.layer_norm &&
                     (r.backward || (!r.resets && !r.recurrent_dropout));
  if (!plain || r.tokens > most_tokens) return 0;
  return std::max<int64_t>(1, std::min(r.ensemble * weights / kBytesOfThread, m.threads));
}

int64_t unpacked_hh_bytes(const Problem& p) {
  return p.gate_rows() * p.out_size() * bytes(p.dtype);
}

// With few rows a step takes about as long with W_hh unpacked, and packing it as long as some
// steps. Beyond L2 both wait for the same bytes.
bool reads_hh_unpacked(const Problem& p, const CpuCosts& costs, const CpuRequest& r) {
  const int64_t weights = unpacked_hh_bytes(p);
  const int64_t most_steps = weights > kL2Bytes ? 64 : 32 / std::max<int64_t>(1, r.batch);
  return !r.tangent && r.batch <= kDotRows && r.steps <= most_steps && weights >= kL2Bytes / 8 &&
         !p.layer_norm && p.stored == Stored::kPlain && costs.loads_quickly && !costs.tiled;
}

// How many bytes of weights an unpacked forward reads before it reads the first of them again.
int64_t bytes_between(const Problem& p, int64_t longest) {
  int64_t between = 0;
  for (int64_t layer = 0; layer < p.num_layers; layer++) {
    const int64_t elements = p.gate_rows() * (p.layer_input(layer) + p.hidden_size);
    between = longest == 1 ? between + p.num_directions * elements : std::max(between, elements);
  }
  return between * bytes(p.dtype);
}

// Weights that are more than L2 holds, but not by so much that little of them is found there the
// next time, are read in alternating directions, unless L3 is as quick.
bool alternates(int64_t bytes_of_thread, const CpuMachine& m) {
  return !m.quick_l3 && bytes_of_thread > kL2Bytes && bytes_of_thread <= 5 * kL2Bytes;
}

// For one row of the batch a quick L3 is read fastest as one stream, except in bfloat16, whose rows
// take half the bytes. Sums differ, so this does not depend on the number of threads.
bool streams(int64_t bytes, int64_t rows, const Problem& p, const CpuMachine& m) {
  return m.quick_l3 && rows == 1 && bytes > kL2Bytes && p.dtype != DType::kBFloat16;
}

// Unpacked weights are prefetched where L3 holds little of them when they are read again. Several
// rows compute long enough for prefetches from L3 to pay too.
bool prefetches(int64_t bytes_between, int64_t rows, const CpuMachine& m) {
  return bytes_between > (rows >= kDotRows ? 2 * kL2Bytes : m.l3_bytes / 8 * 3);
}

// Cells are computed during the next product where that is long: with several planes or digits, or
// with weights from beyond L2, of which gates and states take a part.
bool overlaps_cells(const Problem& p, const CpuCosts& costs) {
  return costs.tiled && !p.layer_norm &&
         (costs.planes > 1 || costs.deepest_integers ||
          recurrent_weight_bytes(p, costs) > kL2Bytes / 2);
}

// ---- rows of the batch ----

// As many threads as the work is worth.
int64_t threads_for(const Problem& p, const CpuRequest& r, const CpuMachine& m) {
  constexpr int64_t kWorkOfThread = 1 << 20;  // multiply-adds that take longer than to wake one
  constexpr int64_t kWorkOfGate = 8;          // its activation, counted the same way
  if (m.all_threads) return m.threads;
  int64_t per_token = 0;
  for (int64_t layer = 0; layer < p.num_layers; layer++)
    per_token +=
        p.num_directions * p.gate_rows() * (p.product_input(layer) + p.out_size() + kWorkOfGate);
  return std::min(m.threads,
                  std::max<int64_t>(1, r.ensemble * r.tokens * per_token / kWorkOfThread));
}

// Rows of a task at most: as many as keep their states and gates in L2. More of them share what a
// step reads of large weights, where the gradients of their gates, which a step of backward reads
// too, leave room for that.
int64_t most_rows(const Problem& p, const CpuCosts& costs, bool backward, ProductKind product) {
  constexpr int64_t kManyRows = 64;
  const bool room = !backward || kManyRows * p.gate_rows() * costs.weight_bytes <= kL2Bytes / 2;
  const bool many = p.dtype == DType::kBFloat16 || product == ProductKind::kIntegers ||
                    product == ProductKind::kPairs ||
                    (recurrent_weight_bytes(p, costs) > kL2Bytes && room);
  return many ? kManyRows : kManyRows / 2;
}

// Threads that take a task together: where each row has two or more and a step is worth a barrier,
// or few rows read more weights in a step than L2 holds, of which each member then reads a part.
int64_t members_for(const Problem& p, const CpuCosts& costs, const CpuRequest& r, int64_t threads,
                    bool all_threads, int64_t most_rows) {
  constexpr int64_t kWorkOfBarrier = 1 << 12;  // once a step, for each thread that comes
  // In backward members exchange more, the gradients of all gates.
  const int64_t few_rows = r.backward ? 15 : 16;
  if (r.resets || r.tangent || p.proj_size || p.layer_norm) return 1;
  const int64_t step = p.gate_rows() * p.hidden_size;
  auto worth = [&](int64_t n) { return all_threads || n * n * kWorkOfBarrier <= step; };
  int64_t members = 1;
  while ((members + 1) * r.batch <= threads && worth(members + 1)) members++;
  const int64_t weights = recurrent_weight_bytes(p, costs);
  if (members > 1 || weights <= kL2Bytes || divide_up(r.batch, threads) > few_rows) return members;
  // No more tasks than teams.
  return threads /
         std::max({int64_t(1), threads * kL2Bytes / 2 / weights, divide_up(r.batch, most_rows)});
}

// Each thread, or team, has a share of the batch, or its share of the weights of an ensemble has
// one of their rows. A share of more rows than a task may have is cut into
// equal tasks, and none has fewer rows than the kernels multiply at once.
void divide_rows(const Problem& p, const CpuCosts& costs, const CpuRequest& r, const CpuMachine& m,
                 CpuPlan* plan) {
  plan->threads = threads_for(p, r, m);
  plan->rows_per_task = 1, plan->tasks = 0, plan->members = 1, plan->ensemble = r.ensemble;
  if (r.batch == 0) return;
  const int64_t threads = std::max<int64_t>(1, plan->threads / r.ensemble);
  const int64_t most = most_rows(p, costs, r.backward, plan->pass.product);
  plan->members = members_for(p, costs, r, threads, m.all_threads, most);
  const int64_t least =
      m.all_threads || plan->members > 1 ? 1 : std::min(r.batch, costs.least_rows);
  const int64_t share = std::max(divide_up(r.batch, threads / plan->members), least);
  plan->rows_per_task = divide_up(share, divide_up(share, most));
  plan->tasks = r.ensemble * divide_up(r.batch, plan->rows_per_task);
}

}  // namespace

CpuPlan plan_cpu(const Problem& p, const CpuRequest& all, const CpuMachine& m) {
  CpuPlan plan{};
  CpuRequest r = all;  // of each weights of an ensemble
  r.batch /= r.ensemble, r.tokens /= r.ensemble;
  if (p.stored == Stored::kPlain)
    plan.variant = choose_variant(p, r, m);
  else
    plan.pass.product = choose_product(p, r, m, &plan.variant);
  const CpuCosts costs = product_costs(plan, p, m);
  const int64_t unpacked = unpacked_threads(p, costs, r, m);
  plan.unpacked = unpacked > 0;
  divide_rows(p, costs, r, m, &plan);
  plan.pass.alternates = true;
  constexpr int64_t kManyRows = 16;
  plan.pass.long_sums = r.batch >= kManyRows;
  if (r.backward) {
    plan.threads = std::max(plan.threads, unpacked);
  } else if (plan.unpacked) {
    plan.threads = unpacked;
    const int64_t between = bytes_between(p, r.longest);
    plan.pass.alternates = alternates(between / unpacked, m);
    plan.pass.streams = streams(between, r.batch, p, m);
    plan.pass.prefetches = prefetches(between, r.batch, m);
    // Of a single step all that W_hh is multiplied with is known at its beginning.
    plan.recurrent_first = plan.pass.alternates && r.longest == 1;
  } else {
    plan.pass.unpacked_hh = reads_hh_unpacked(p, costs, r);
    plan.pass.streams = plan.pass.unpacked_hh && streams(unpacked_hh_bytes(p), r.batch, p, m);
    plan.pass.overlaps_cells = overlaps_cells(p, costs);
  }
  return plan;
}

// ---- in words ----

namespace {

std::string count(int64_t n, const char* noun) {
  return std::to_string(n) + " " + noun + (n == 1 ? "" : "s");
}

std::string rows_in_words(const CpuPlan& plan, const CpuRequest& r) {
  const std::string of = r.ensemble > 1 ? " of " + count(r.ensemble, "member") : "";
  std::string text = count(r.batch, "batch row") + of + " in " + count(plan.tasks, "task") +
                     " of up to " + count(plan.rows_per_task, "row") + ", each through all " +
                     (r.backward ? "steps of a layer" : "layers and steps") + " by ";
  if (plan.members == 1) return text + "one thread";
  return text + count(plan.members, "thread") +
         " that divide the hidden units and synchronise at each step";
}

std::string weights_in_words(const CpuPlan& plan, bool backward) {
  if (plan.pass.unpacked_hh) return "; W_hh read unpacked";
  if (!plan.unpacked) return "";
  return std::string("; weights read unpacked") +
         (plan.pass.alternates && !backward ? ", in alternating directions" : "") +
         (plan.pass.prefetches ? ", prefetched"
          : plan.pass.streams  ? ", row by row"
                               : "") +
         (plan.recurrent_first ? ", W_hh first" : "");
}

std::string idle_in_words(const CpuPlan& plan, const CpuMachine& m) {
  std::string text;
  auto idle = [&](int64_t threads, const char* reason) {
    if (threads > 0) text += "; " + count(threads, "thread") + " idle: " + reason;
  };
  idle(m.threads - plan.threads, "too little work");
  if (plan.tasks * plan.members < plan.threads)
    idle(plan.threads - plan.tasks * plan.members, "too few batch rows to divide");
  return text;
}

std::string products_in_words(const CpuPlan& plan, const Problem& p, const CpuCosts& costs) {
  const ProductKind product = plan.pass.product;
  if (p.stored != Stored::kPlain)
    return std::string("; weights in ") + (p.stored == Stored::kInt8 ? "int8" : "bfloat16") +
           (product == ProductKind::kPanels  ? ", packed by the call"
            : product == ProductKind::kWords ? ", widened in the product"
            : product == ProductKind::kPairs ? ", products of pairs"
                                             : ", products of integers") +
           (product != ProductKind::kPanels && costs.tiled ? " on tiles" : "");
  const bool narrow = bytes(p.dtype) == 2;  // stored in 16 bits, computed in 32
  if (!plan.unpacked && costs.planes > 1)
    return "; products on tiles, each float32 as three bfloat16";
  if (!plan.unpacked && narrow && costs.weight_bytes == 2)
    return std::string("; products ") + (costs.tiled ? "on tiles" : "of pairs") + " of " +
           traits(p.dtype).name + ", all else in float32";
  return narrow ? std::string("; ") + traits(p.dtype).name + " is computed in float32" : "";
}

}  // namespace

std::string describe(const CpuPlan& plan, const Problem& p, const CpuRequest& r,
                     const CpuMachine& m) {
  const CpuVariant& variant = m.variants[plan.variant];
  const bool by_units = plan.unpacked && !r.backward;
  std::string text = std::string(variant.name) + ", " + std::to_string(plan.threads) + " of " +
                     count(m.threads, "thread") + ": ";
  text += !by_units        ? rows_in_words(plan, r)
          : r.ensemble > 1 ? count(r.ensemble, "member") + " divided among threads"
                           : "hidden units divided among threads";
  text += weights_in_words(plan, r.backward) + (by_units ? "" : idle_in_words(plan, m));
  return text + products_in_words(plan, p, variant.costs[int(p.dtype)]);
}

}  // namespace fusedrnn
