"""Which CUDA kernels a process may run: launches that are refused, checks, the switch, lost blocks.

The emulator stands in for the GPU, with launches that it refuses and kernels that it makes wrong.
"""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from cases import make_pair, random_state, run
from emulator.ops import instead_of_cpu, load
from torch import nn
from torch.autograd import forward_ad

import fusedrnn
from benchmarks import plans
from fusedrnn import cuda, families, support


@pytest.fixture
def gpu(monkeypatch):
    """The ops run emulated, with nothing known of their kernels; checks are on."""
    monkeypatch.setenv(cuda.SWITCH, "verified")
    monkeypatch.delenv("FUSEDRNN_PLAN", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with instead_of_cpu(seed=1):
        emulated = load()
        emulated.forget()
        yield emulated
        emulated.play("")
        emulated.fail_after(-1)
        emulated.forget()


@pytest.fixture
def device(gpu, monkeypatch):
    """The modules too take CPU tensors for such of the GPU, an H100 as the emulator plays it."""
    clusters = tuple(132 // n for n in range(1, 17))
    spec = cuda.Spec(capability=90, processors=132, shared_bytes=227 << 10, clusters=clusters)
    monkeypatch.setattr(support, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(cuda, "missing", lambda device: None)
    monkeypatch.setattr(cuda, "spec", lambda device: spec)
    monkeypatch.setattr(cuda, "OPS", gpu)
    monkeypatch.setattr(cuda, "is_capturing", lambda: False)
    cuda._plans.cache_clear()
    cuda._standings.cache_clear()
    return gpu


@pytest.fixture
def checked(monkeypatch):
    """The names of the families that were checked, in order."""
    names = []
    verify = families.verify

    def record(number, namespace, device):
        names.append(families.by_number(number).name)
        return verify(number, namespace, device)

    monkeypatch.setattr(families, "verify", record)
    return names


def states(gpu) -> dict[str, str]:
    """By the names of the families that were tried."""
    lines = (line.split(" ", 2) for line in gpu.standings(0).splitlines())
    return {families.by_number(int(number)).name: state for number, state, _ in lines}


class Job:
    """A call whose plan is a cluster: both directions, results and what they should be."""

    def __init__(self, cell="gru", hidden=72, layers=1, bidirectional=False, dtype=torch.float32):
        self.plain, self.fused = make_pair(
            cell, 3, hidden, num_layers=layers, bidirectional=bidirectional, dtype=dtype
        )
        self.x = torch.randn(3, 5, 3).to(dtype)
        self.few = 1e-4 if dtype == torch.float32 else 5e-2
        self.exact = run(self.plain.double(), self.x.double(), None)
        self.plain.to(dtype)

    def check(self) -> list[str]:
        """The warnings of a run whose results are right."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = run(self.fused, self.x, None)
        for name, exact in self.exact.items():
            error = (found[name].double() - exact).abs().max() / exact.abs().max()
            assert error <= self.few, (name, error)
        return [str(w.message) for w in caught]


# ---- launches that are refused ----


def test_a_refused_launch_is_planned_again(gpu, monkeypatch):
    monkeypatch.setenv(cuda.SWITCH, "on")
    job = Job()
    gpu.play("refuse-clusters")
    (warning,) = job.check()
    assert warning.startswith("fusedrnn: the GPU refused the plan 'cluster: ")
    assert "(emulated launch failure)" in warning
    assert job.check() == []
    kinds = {name.split()[0] for name in states(gpu)}
    assert kinds == {"cluster"} and set(states(gpu).values()) == {"refused"}
    gpu.play("")  # for the process
    assert job.check() == []


@pytest.mark.parametrize("position", ["verified", "on"])
def test_all_that_is_refused_is_one_warning(gpu, position, monkeypatch):
    """Whether it is met by the call or by a check before."""
    monkeypatch.setenv(cuda.SWITCH, position)
    job = Job(hidden=200)
    gpu.play("refuse-clusters,refuse-cooperative")
    (warning,) = job.check()
    assert "'cluster: " in warning and "'grid: " in warning
    assert "wrong" not in states(gpu).values()
    assert job.check() == []


def test_a_later_launch_of_a_call_is_refused(gpu, monkeypatch):
    """The layers before have run: they run again, as the plan says now."""
    monkeypatch.setenv(cuda.SWITCH, "on")
    job = Job(layers=2, bidirectional=True)
    gpu.play("refuse-clusters,after=1")
    assert len(job.check()) == 1


@pytest.mark.parametrize("refused", ["refuse-all", "refuse-all,after=1"])
def test_nothing_is_accepted(device, refused, monkeypatch):
    """torch.nn runs the call, and plain PyTorch backward where forward was accepted."""
    monkeypatch.setenv(cuda.SWITCH, "on")
    job = Job()
    device.play(refused)
    text = " ".join(job.check())
    assert "'cluster: " in text and "'grid: " in text and "'stepwise'" in text
    assert job.check() == []
    assert "refused" in fusedrnn.explain(job.fused, job.x)
    lengths = torch.tensor([3, 1, 2, 3, 3])  # which torch.nn does not take
    y, _ = job.fused(job.x, lengths=lengths)
    for b, length in enumerate(lengths):
        expected, _ = job.plain(job.x[:length, b])
        torch.testing.assert_close(y[:length, b], expected)


def test_a_forced_plan_is_not_replaced(gpu, monkeypatch):
    monkeypatch.setenv(cuda.SWITCH, "on")
    monkeypatch.setenv("FUSEDRNN_PLAN", "cluster")
    gpu.play("refuse-clusters")
    job = Job()
    with pytest.raises(RuntimeError, match="failed with the plan 'cluster: .*emulated launch fail"):
        job.fused(job.x)
    assert states(gpu) == {}


def test_other_errors_are_raised(gpu, monkeypatch):
    monkeypatch.setenv(cuda.SWITCH, "on")
    gpu.fail_after(0)  # with 719, cudaErrorLaunchFailure
    with pytest.raises(RuntimeError, match="failed with the plan"):
        gpu.forward(*arguments())
    assert states(gpu) == {}


# ---- the check at first use ----


def test_a_family_is_checked_once(gpu, checked):
    job = Job()
    assert job.check() == []
    forward, backward = checked
    assert forward.startswith("cluster GRU forward") and backward.startswith("cluster GRU backward")
    assert states(gpu) == dict.fromkeys(checked, "right")
    assert job.check() == [] and len(checked) == 2


def test_nothing_is_checked_where_the_switch_is_on(gpu, checked, monkeypatch):
    monkeypatch.setenv(cuda.SWITCH, "on")
    assert Job().check() == [] and checked == []


@pytest.mark.parametrize(
    "faults, dtype, kinds",
    [
        ("send-zeros", torch.float32, {"cluster", "grid"}),
        ("swap-registers", torch.bfloat16, {"cluster", "grid", "block"}),
    ],
)
def test_wrong_kernels_are_struck_out(gpu, checked, faults, dtype, kinds):
    job = Job(dtype=dtype)
    gpu.play(faults)
    found = job.check()
    wrong = [name for name, state in states(gpu).items() if state == "wrong"]
    assert wrong and {name.split()[0] for name in wrong} <= kinds
    assert len(found) == len(set(found)) == len(wrong)
    assert all("will not run on cpu, because a small case has an error of" in w for w in found)
    before = len(checked)
    assert job.check() == [] and len(checked) == before


@pytest.mark.parametrize("exchange", ["block", "stepwise", "grid"])
def test_a_check_finds_a_lost_block(gpu, exchange):
    gpu.play("lose-block")
    family = next(f for f in families.cuda_families() if f.exchange == exchange)
    assert "has an error of" in families.verify(family.number, "fusedrnn_emulated", "cpu")


class WrongMembers:
    """The emulated ops, of which `broken` is wrong for ensembles alone: all members have weight
    `kind` of the first, or without a kind each other's gradients of weights.
    """

    def __init__(self, gpu, broken: str, kind: int | None) -> None:
        self.gpu, self.broken, self.kind = gpu, broken, kind

    def __getattr__(self, name):
        op = getattr(self.gpu, name)
        return (lambda *given: self.run(op, given)) if name == self.broken else op

    def run(self, op, given):
        def stacked(argument):
            return (
                isinstance(argument, list)
                and isinstance(argument[0], torch.Tensor)
                and argument[0].dim() == 3
            )

        if self.kind is None:
            *states, dweights = op(*given)
            return (*states, [g.flip(0) for g in dweights] if stacked(dweights) else dweights)
        given = [copy.copy(a) for a in given]
        for weights in filter(stacked, given):
            weights[self.kind] = weights[self.kind][:1].expand_as(weights[self.kind])
        return op(*given)


WRONG_MEMBERS = [("forward", kind) for kind in range(4)]  # W_ih, W_hh and the biases
WRONG_MEMBERS += [("backward", 0), ("backward", 1), ("backward", None)]
WRONG_MEMBERS += [("forward_tangent", 1), ("backward_tangent", 1), ("backward_tangent", None)]


@pytest.mark.parametrize("broken, kind", WRONG_MEMBERS)
def test_a_check_finds_what_is_wrong_for_ensembles_alone(gpu, broken, kind):
    """Of every exchange, with one layer a launch or several."""
    found = [
        families.problem(f, WrongMembers(gpu, broken, kind), torch.device("cpu"))
        for f in families.cuda_families()
        if (f.mode, f.dtype) == ("LSTM", torch.float32)
        and f.backward == broken.startswith("backward")
        and f.tangent == broken.endswith("tangent")
    ]
    assert found and all(text and text.startswith("of an ensemble has an error") for text in found)


def test_kernels_that_are_wrong_for_ensembles_run_no_more(gpu, monkeypatch):
    compute = families.problem

    def some_are_wrong(family, ops, device):
        wrong = WrongMembers(ops, "backward", None) if family.exchange == "cluster" else ops
        return compute(family, wrong, device)

    monkeypatch.setattr(families, "problem", some_are_wrong)
    job = Job()
    warned = job.check()
    reason = "will not run on cpu, because a small case of an ensemble has an error of"
    assert warned and all(reason in text for text in warned)
    wrong = [name for name, state in states(gpu).items() if state == "wrong"]
    assert len(wrong) == len(warned)
    assert all(name.startswith("cluster GRU backward") for name in wrong)
    assert job.check() == []


def test_a_check_is_not_blamed_for_a_block_of_another_call(gpu, monkeypatch):
    """Which may end while the check runs, and raises its own error."""
    _, other = make_pair("gru", 3, 19)
    verify = families.verify

    def beside(*arguments):
        with monkeypatch.context() as patch:
            patch.setenv(cuda.SWITCH, "on")
            patch.setenv("FUSEDRNN_PLAN", "grid,units=8,rows=8,layers=1")
            gpu.play("lose-block")
            other(torch.randn(2, 3, 3))
            gpu.play("")
        return verify(*arguments)

    job = Job()
    with monkeypatch.context() as patch:
        patch.setattr(families, "verify", beside)
        with pytest.raises(RuntimeError, match="gave up an earlier call.*in its grid kernels"):
            job.fused(job.x)
    assert job.check() == []
    assert {state for name, state in states(gpu).items() if name.startswith("cluster")} == {"right"}


@pytest.mark.filterwarnings("ignore:.*will not run")
def test_a_wrong_family_can_be_forced_only_without_checks(gpu, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_PLAN", "cluster")
    gpu.play("send-zeros")
    job = Job()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="small case has an error.*KERNELS=on runs them"):
            job.fused(job.x)
    monkeypatch.setenv(cuda.SWITCH, "on")
    job.fused(job.x)


@pytest.mark.filterwarnings("ignore:.*will not run")
def test_a_check_that_cannot_be_computed(gpu, monkeypatch):
    def broken(*_):
        raise ValueError("no such thing")

    monkeypatch.setattr(families, "cases", broken)
    monkeypatch.setenv("FUSEDRNN_PLAN", "stepwise")
    job = Job()
    with pytest.raises(RuntimeError, match="failed: ValueError: no such thing"):
        job.fused(job.x)


def test_a_check_inside_of_other_modes(gpu, checked):
    """What surrounds the first call does not reach its check."""
    _, fused = make_pair("gru", 3, 10)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        fused(torch.randn(3, 2, 3))
    assert set(states(gpu).values()) == {"right"}


# ---- derivatives of forward and of backward, which have families of their own ----

DEPRECATED = pytest.mark.filterwarnings("ignore:.*jit.script.* is deprecated:DeprecationWarning")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_check_of_derivatives_finds_a_lost_block(gpu, backward):
    gpu.play("lose-block")
    for family in families.cuda_families():
        if family.tangent and (family.mode, family.backward) == ("LSTM", backward):
            found = families.verify(family.number, "fusedrnn_emulated", "cpu")
            assert found and "has an error of" in found


def derivatives_of(module, x, v):
    def loss(x):
        return module(x)[0].sin().sum()

    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    dx.square().sum().backward()
    found = [leaf.grad, *(p.grad for p in module.parameters())]
    module.zero_grad()
    found += torch.func.jvp(loss, (x,), (v,))
    found.append(torch.func.jvp(torch.func.grad(loss), (x,), (v,))[1])
    found.append(torch.func.hessian(loss)(x[:1]))
    return [t.detach() for t in found]


@DEPRECATED
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_derivatives_are_checked_once(gpu, checked, dtype, monkeypatch):
    """FUSEDRNN_PLAN says nothing of them."""
    job = Job(dtype=dtype, hidden=7)
    if dtype == torch.float32:
        monkeypatch.setenv("FUSEDRNN_PLAN", "grid")
    v = torch.randn_like(job.x)
    few = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fusedrnn")
        for _ in range(2):
            found = derivatives_of(job.fused, job.x, v)
    torch.testing.assert_close(found, derivatives_of(job.plain, job.x, v), **few)
    name = str(dtype).removeprefix("torch.")
    of_tangents = [text for text in checked if "tangent" in text]
    assert sorted(of_tangents) == [
        f"stepwise GRU {way} tangent, {name}" for way in ("backward", "forward")
    ]
    assert set(states(gpu).values()) == {"right"}


@DEPRECATED
@pytest.mark.parametrize("wrong", ["forward tangent", "backward tangent", "tangent"])
def test_plain_pytorch_runs_derivatives_that_are_wrong(gpu, wrong, monkeypatch):
    """Also inside of torch.func's transforms; forward and backward keep their kernels."""
    verify = families.verify

    def some_are_wrong(number, namespace, device):
        bad = wrong in families.by_number(number).name
        return "is wrong" if bad else verify(number, namespace, device)

    monkeypatch.setattr(families, "verify", some_are_wrong)
    job = Job(dtype=torch.float64, hidden=7)
    v = torch.randn_like(job.x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = derivatives_of(job.fused, job.x, v)
        again = derivatives_of(job.fused, job.x, v)
        of_rows = torch.func.vmap(lambda x, v: derivatives_of_rows(job.fused, x, v))
        batched = of_rows(torch.stack([job.x, v]), torch.stack([v, job.x]))
    expected = derivatives_of(job.plain, job.x, v)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(again, expected, rtol=1e-9, atol=1e-10)
    for i, (a, b) in enumerate(((job.x, v), (v, job.x))):
        expected = derivatives_of_rows(job.plain, a, b)
        torch.testing.assert_close(batched[i], expected, rtol=1e-9, atol=1e-10)
    of_wrong = {name for name, state in states(gpu).items() if state == "wrong"}
    assert of_wrong and all(wrong in name for name in of_wrong)
    texts = [str(w.message) for w in caught if "fusedrnn" in str(w.message)]
    assert len(texts) == len(of_wrong)
    assert all("will not run on cpu, because a small case is wrong" in text for text in texts)


def derivatives_of_rows(module, x, v):
    return torch.func.jvp(torch.func.grad(lambda x: module(x)[0].sin().sum()), (x,), (v,))[1]


def test_forward_mode_where_nothing_runs(device, called):
    """Plain PyTorch: cuDNN has none."""
    job = Job(dtype=torch.float64, hidden=7)
    v, expected = torch.randn_like(job.x), None
    with forward_ad.dual_level():
        expected = forward_ad.unpack_dual(job.plain(forward_ad.make_dual(job.x, v))[0]).tangent
    device.play("refuse-all")
    called.clear()
    with forward_ad.dual_level(), pytest.warns(RuntimeWarning, match="refused the plan"):
        found = forward_ad.unpack_dual(job.fused(forward_ad.make_dual(job.x, v))[0]).tangent
    torch.testing.assert_close(found, expected)
    assert not called


# ---- captures ----


def test_no_check_in_a_capture(device, checked, monkeypatch):
    job = Job()
    device.play("capture")
    monkeypatch.setattr(cuda, "is_capturing", lambda: True)
    assert job.check() == [] and checked == [] and states(device) == {}
    assert "torch.nn's own kernels" in fusedrnn.explain(job.fused, job.x)
    device.play("")
    monkeypatch.setattr(cuda, "is_capturing", lambda: False)
    assert job.check() == [] and len(checked) == 2
    device.play("capture")
    monkeypatch.setattr(cuda, "is_capturing", lambda: True)
    assert "fused CUDA kernels" in fusedrnn.explain(job.fused, job.x)
    assert job.check() == [] and len(checked) == 2


def test_an_op_in_a_capture_runs_only_what_was_checked(gpu):
    job = Job()
    gpu.play("capture")
    with pytest.raises(RuntimeError, match="no CUDA kernel can run"):
        job.fused(job.x)


# ---- the switch ----


def test_off_is_torch_nn(gpu, monkeypatch):
    assert fusedrnn.cuda_kernels() == "verified"
    assert fusedrnn.cuda_kernels("off") == "off" == fusedrnn.cuda_kernels()
    assert cuda.missing(torch.device("cuda", 0)) == "FUSEDRNN_CUDA_KERNELS=off"
    with pytest.raises(RuntimeError, match="no CUDA kernel can run: FUSEDRNN_CUDA_KERNELS=off"):
        gpu.forward(*arguments())
    with pytest.raises(ValueError, match="expected one of off, verified, on, got 'of'"):
        fusedrnn.cuda_kernels("of")


def test_an_unknown_position(gpu, monkeypatch):
    monkeypatch.setenv(cuda.SWITCH, "maybe")
    with pytest.raises(RuntimeError, match="is 'maybe'; it takes off, verified or on"):
        gpu.forward(*arguments())


def arguments():
    import test_ops

    return test_ops.arguments("gru", dtype=torch.float32).values()


def test_backward_after_the_switch_went_off(gpu, monkeypatch):
    job = Job()
    y, _ = job.fused(job.x.requires_grad_())
    monkeypatch.setenv(cuda.SWITCH, "off")
    (found,) = torch.autograd.grad(y.sum(), job.x)
    (expected,) = torch.autograd.grad(job.plain(job.x)[0].sum(), job.x)
    torch.testing.assert_close(found, expected)


def test_explain_says_how_float32_is_multiplied(device, monkeypatch):
    job = Job(dtype=torch.float32)
    assert "products over all steps in float32" in fusedrnn.explain(job.fused, job.x)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert "each number as two of bfloat16" in fusedrnn.explain(job.fused, job.x)


def test_explain_of_an_ensemble(device):
    """Its slices are those of each member: 3 of 5 rows, one of 15. torch.nn runs no vmap."""
    job = Job(dtype=torch.float32)
    rows = job.x.shape[1]
    text = fusedrnn.explain(job.fused, job.x, members=3)
    config = job.fused._config()
    for way, line in zip((False, True), text.splitlines()[1:3], strict=True):
        args = config, torch.float32, len(job.x), 3 * rows, way, cuda.spec(job.x.device)
        expected = cuda.plan(*args, members=3).text
        assert line.endswith(expected) and expected != cuda.plan(*args).text
    wide, x = job.fused.double(), job.x.double()
    assert "because forward would be stepwise" in fusedrnn.explain(wide, x)
    assert "fused CUDA kernels, forward stepwise" in fusedrnn.explain(wide, x, members=3)


# ---- what is left to torch.nn ----


@pytest.fixture
def called(monkeypatch):
    """How often torch.nn's own forward has run."""
    counts = []
    for cls in (nn.GRU, nn.LSTM):
        own = cls.forward
        monkeypatch.setattr(
            cls, "forward", lambda self, *args, own=own: counts.append(1) or own(self, *args)
        )
    return counts


def test_torch_nn_runs_what_would_be_stepwise(device, called, monkeypatch):
    job = Job(dtype=torch.float32)
    wide, x = job.fused.double(), job.x.double()  # float64 has stepwise kernels alone
    called.clear()
    assert "because forward would be stepwise" in fusedrnn.explain(wide, x)
    wide(x)
    assert len(called) == 1
    # What torch.nn cannot do stays stepwise.
    with forward_ad.dual_level():
        assert support.torch_instead(wide, x, None) is None
    wrapped: list = []
    torch.func.vmap(lambda x: wrapped.append(support.torch_instead(wide, x, None)) or x)(x)
    assert wrapped == [None]
    wide(x, lengths=torch.tensor([3, 1, 2, 3, 3]))
    wide.eval()(x)  # cuDNN has no backward of it
    wide.train().recompute = True
    wide(x)
    assert len(called) == 1
    assert "stepwise" in fusedrnn.explain(wide, x)
    del wide.recompute
    with torch.no_grad():
        wide.eval()(x)
    assert len(called) == 2
    monkeypatch.setenv("FUSEDRNN_PLAN", "stepwise")
    wide(x)
    assert len(called) == 2
    assert "fused CUDA kernels, forward stepwise" in fusedrnn.explain(wide, x)


def test_torch_nn_runs_both_ways_where_one_would_be_stepwise(device, called, monkeypatch):
    """LSTM 1024 of three layers in bfloat16: forward is grid, backward stepwise."""
    spec = plans.DEVICES["H200"]
    monkeypatch.setattr(cuda, "spec", lambda device: spec)
    fused = fusedrnn.LSTM(1024, 1024, 3, device="meta", dtype=torch.bfloat16)
    x = torch.empty(512, 64, 1024, device="meta", dtype=torch.bfloat16)
    assert support.torch_instead(fused, x, None) == "backward would be stepwise"
    with torch.no_grad():
        assert support.torch_instead(fused, x, None) is None


# ---- a driver that is too old ----


def test_a_runtime_that_cannot_use_the_gpu(monkeypatch):
    asked = []

    def spec(device):
        asked.append(device)
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(cuda, "spec", spec)
    monkeypatch.setattr(cuda._C, "cuda_versions", lambda: (13000, 12040))
    monkeypatch.setattr(cuda, "_unusable", {})
    for _ in range(3):
        reason = cuda.unusable(torch.device("cuda", 0))
    assert reason and "the CUDA 13.0 runtime of this build cannot use the GPU" in reason
    assert "insufficient" in reason and "serves CUDA up to 12.4" in reason
    assert len(asked) == 1


@pytest.mark.skipif(not cuda.ARCHS, reason="built without nvcc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_runtime_in_the_binary_says_why(monkeypatch):
    """Without a driver it has the error that it has with an old one."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "_unusable", {})
    reason = cuda.unusable(torch.device("cuda", 0))
    assert reason and "runtime of this build cannot use the GPU" in reason


def test_a_report_of_swap_says_what_only_stepwise_kernels_run(device):
    def reason(**options):
        (layer,) = fusedrnn.swap(nn.LSTM(3, 4, **options)).layers
        return layer.reason

    assert reason() == ""
    assert "only stepwise kernels take float64" in reason(dtype=torch.float64)
    assert "only stepwise kernels take projections" in reason(proj_size=2)


# ---- a block that is lost ----


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_lost_block(gpu, backward, layers, monkeypatch):
    """The others give up: their results are NaN, the next call raises, and the process goes on."""
    monkeypatch.setenv(cuda.SWITCH, "on")
    monkeypatch.setenv("FUSEDRNN_PLAN", f"grid,units=8,rows=8,layers={layers}")
    for cell in ("relu", "gru", "lstm"):
        _, fused = make_pair(cell, 3, 19, num_layers=layers)
        x = torch.randn(4, 9, 3, requires_grad=True)
        states = tuple(s.requires_grad_() for s in random_state(fused, 9))
        expected, state = fused(x, states if cell == "lstm" else states[0])
        if not backward:
            gpu.play("lose-block")
            y, _ = fused(x, states if cell == "lstm" else states[0])
            # The last block has the last units of the last layer, of the last row.
            assert y[-1, 8:].isnan().any() and torch.equal(y[:, :8], expected[:, :8])
        else:
            gpu.play("lose-block")
            dh = torch.autograd.grad(expected.sum() + sum(s.sum() for s in state), states)[0]
            assert dh[0, 8:].isnan().any()  # the lowest layer comes last
        gpu.play("")
        with pytest.raises(
            RuntimeError, match="gave up an earlier call on cpu: in its grid kernels"
        ):
            fused(x)
        torch.testing.assert_close(fused(x, states if cell == "lstm" else states[0])[0], expected)


def test_kernels_that_lost_a_block_run_no_more(gpu, monkeypatch):
    monkeypatch.setenv(cuda.SWITCH, "on")
    monkeypatch.setenv("FUSEDRNN_PLAN", "grid,units=8,rows=8,layers=1")
    _, fused = make_pair("gru", 3, 19)
    gpu.play("lose-block")
    fused(torch.randn(2, 3, 3))
    gpu.play("")
    monkeypatch.delenv("FUSEDRNN_PLAN")
    job = Job()
    with pytest.raises(RuntimeError, match="gave up an earlier call"):
        job.fused(job.x)
    assert {name.split()[0] for name in states(gpu)} == {"grid"}
    assert job.check() == []
