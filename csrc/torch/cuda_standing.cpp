#include "torch/cuda_standing.h"

#include <atomic>
#include <map>
#include <mutex>

#include "cuda/device.h"
#include "cuda/elementwise.h"
#include "torch/host.h"
#include "torch/switches.h"

namespace fusedrnn {
namespace {

// ---- what is known ----

enum class State { kRight, kWrong, kRefused };
constexpr const char* kStateNames[] = {"right", "wrong", "refused"};

struct Standing {
  State state;
  std::string reason;
};

std::mutex mutex;
std::map<int, std::map<int, Standing>> known;  // of a device, of a family
std::atomic<int64_t> changes{0};

const Standing* find(int device, int family) {  // with the mutex held
  const auto of_device = known.find(device);
  if (of_device == known.end()) return nullptr;
  const auto found = of_device->second.find(family);
  return found == of_device->second.end() ? nullptr : &found->second;
}

// False: it was known to be wrong, or refused, before.
bool set(int device, int family, const Standing& standing) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Standing* before = find(device, family);
  if (before && before->state != State::kRight) return false;
  known[device][family] = standing;
  changes++;
  return true;
}

Families with_state(int device, State state) {
  const std::lock_guard<std::mutex> lock(mutex);
  Families found;
  const auto of_device = known.find(device);
  if (of_device == known.end()) return found;
  for (const auto& [family, standing] : of_device->second)
    if (standing.state == state) found.set(size_t(family));
  return found;
}

// Null: never tried.
std::optional<Standing> standing_of(int device, int family) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Standing* found = find(device, family);
  return found ? std::optional<Standing>(*found) : std::nullopt;
}

struct Trial {
  std::string plan;
  bool tf32;
};
thread_local std::optional<Trial> trial;

bool is_set(const char* text) { return text && *text; }

constexpr const char* kLostBlock = "a block waited 10 seconds for another";

// Kernels that lost a block in an earlier call, whose results are NaN: they run no more.
void raise_lost_block(const CurrentDevice& on, int code) {
  if (!code) return;
  std::string name;
  const Families families = launched_like(code);
  for (int i = 0; i < kFamilies; i++)
    if (families[size_t(i)]) {
      if (name.empty()) name = kExchangeNames[int(family_at(i).exchange)];
      set(on.index(), i, {State::kRefused, kLostBlock});
    }
  // Not in the words of an error that the modules answer by another attempt.
  fail("fusedrnn gave up an earlier call on ", on.name(), ": in its ", name, " kernels ",
       kLostBlock,
       ", and its results are NaN. The process can go on; such kernels will not run in "
       "it again, unless FUSEDRNN_PLAN asks for them");
}

// ---- the check ----

// Has a small case computed by the kernels of a family. False where they must not run; they are
// struck out then.
bool passes(const Family& family, const CurrentDevice& on) {
  const int index = index_of(family);
  std::string reason = host().check_family(index, kOpNamespace, on.name());
  const int code = take_lost_block();
  if (code && launched_like(code)[size_t(index)])
    reason += std::string(reason.empty() ? "" : "; ") + kLostBlock;
  else
    raise_lost_block(on, code);  // of a call that still ran
  if (reason.empty()) {
    set(on.index(), index, {State::kRight, ""});
    return true;
  }
  if (set(on.index(), index, {State::kWrong, reason}))
    warn("fusedrnn: the CUDA kernels '" + name_of(family) + "' will not run on " + on.name() +
         ", because a small case " + reason);
  return false;
}

}  // namespace

bool permits_tf32(bool torch_does) { return trial ? trial->tf32 : torch_does; }

CudaPlan permitted_plan(const Problem& p, const CudaRequest& request, const CurrentDevice& on) {
  const KernelSwitch position = kernel_switch();
  // FUSEDRNN_PLAN is about forward and backward: their derivatives have one plan.
  const char* forced = trial ? trial->plan.c_str() : request.tangent ? "" : forced_plan();
  const bool asked = forces(forced, request.backward);
  if (!trial) raise_lost_block(on, take_lost_block());
  FUSEDRNN_EXPECT(trial || position != KernelSwitch::kOff,
                  "fusedrnn: no CUDA kernel can run: FUSEDRNN_CUDA_KERNELS=off");
  DeviceSpec device{};
  const int error = device_spec(&device);
  FUSEDRNN_EXPECT(error == 0, "fusedrnn: asking the device failed: ", error_text(error));
  const bool checked = !trial && position == KernelSwitch::kVerified;
  const int index = on.index();
  Families unchecked;
  for (;;) {
    if (!asked) {
      device.struck = with_state(index, State::kRefused) | unchecked;
      if (checked) device.struck |= with_state(index, State::kWrong);
    }
    CudaPlan plan{};
    std::string reason;
    FUSEDRNN_EXPECT(plan_cuda(p, request, device, forced, &plan, &reason),
                    "fusedrnn: ", asked ? "" : "no CUDA kernel can run: ", reason);
    const Family family = family_of(p, request, plan);
    if (!checked) return plan;
    const std::optional<Standing> standing = standing_of(index, index_of(family));
    if (standing && standing->state == State::kRight) return plan;
    if (asked) {
      FUSEDRNN_EXPECT(!standing || standing->state != State::kWrong,
                      "fusedrnn: FUSEDRNN_PLAN=", forced,
                      " asks for kernels of which a small case ", standing->reason,
                      "; FUSEDRNN_CUDA_KERNELS=on runs them all the same");
      if (standing) return plan;  // refused before: the launch says so again
    }
    if (is_capturing(on.stream())) {
      FUSEDRNN_EXPECT(!asked,
                      "fusedrnn: kernels cannot be checked while a CUDA graph is captured: make "
                      "the call once before");
      unchecked.set(size_t(index_of(family)));
      continue;
    }
    if (passes(family, on)) return plan;
    const std::optional<Standing> now = standing_of(index, index_of(family));
    if (!is_set(forced) && now && now->state == State::kRefused)
      throw Refused{index, launched_like(launch_code(family.exchange, family.chained)),
                    describe(plan), now->reason};
  }
}

void check_launch(int error, const char* what, const CudaPlan& plan, const Family& family,
                  int device) {
  if (error == 0) return;
  const Refused refused{device, launched_like(launch_code(family.exchange, family.chained)),
                        describe(plan), error_text(error)};
  if (launch_was_refused(error) && (trial || family.tangent || !is_set(forced_plan()))) {
    if (!trial) throw refused;
    std::string text;
    strike(refused, &text);
  }
  fail("fusedrnn: ", what, " failed with the plan '", refused.plan, "': ", refused.error);
}

void strike(const Refused& refused, std::string* text) {
  for (int i = 0; i < kFamilies; i++)
    if (refused.families[size_t(i)]) set(refused.device, i, {State::kRefused, refused.error});
  *text += (text->empty() ? "'" : ", '") + refused.plan + "' (" + refused.error + ")";
}
void warn_of_refusals(const std::string& text) {
  warn("fusedrnn: the GPU refused the plan " + text + "; this process will not ask for such again");
}

void forget_standings() {
  const std::lock_guard<std::mutex> lock(mutex);
  known.clear();
  changes++;
}

// ---- ops without tensors ----

void trial_op(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments args(stack, count);
  const auto plan = args.take<std::string>();
  const bool tf32 = args.take<bool>();
  args.end();
  trial = plan.empty() ? std::nullopt : std::optional<Trial>({plan, tf32});
}

void standings_op(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments args(stack, count);
  const int device = int(args.take<int64_t>());
  args.end();
  std::string text;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [family, standing] : known[device])
    text += std::to_string(family) + " " + kStateNames[int(standing.state)] + " " +
            standing.reason + "\n";
  stack[0] = torch::stable::detail::from(text);
}

void generation_op(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = torch::stable::detail::from(changes.load());
}

}  // namespace fusedrnn
