"""The benchmarks: their statistics, cases, check, peers and rows."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
# The benchmarks are not installed, they belong to the clone.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fusedrnn
from benchmarks import adapters, check, machine, measure, peers, suite
from benchmarks.cases import CASES, GATES, MODES, Case, select
from benchmarks.measure import Budget, Summary
from benchmarks.peers import PEERS, Peer

ROOT = Path(__file__).resolve().parent.parent
TINY = Budget(seconds=0.01, rounds=2, turn=0.0)
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("small_machine")
SMALL = [
    Case("gru", "GRU", 5, 24, layers=2, steps=6, batch=3, bidirectional=True),
    Case("lstm", "LSTM", 5, 24, layers=1, steps=9, batch=4, shortest=2),
    Case("rnn", "RNN", 5, 24, layers=1, steps=6, batch=3, input_grad=False),
]


def rows_of(others, cases=SMALL, modes=MODES, dtypes=(torch.float32,), threads=(1,)):
    return list(suite.rows(cases, modes, dtypes, threads, CPU, TINY, (PEERS[0], *others)))


class Scripted:
    """Work that claims the times it was given, and notes in what order it was called."""

    def __init__(self, name, seconds, log):
        self.name, self.seconds, self.log = name, iter(seconds), log

    def __call__(self, repeats):
        self.log.append((self.name, repeats))
        return next(self.seconds)


# Statistics


def test_summary_is_the_median_and_the_quartiles():
    assert Summary.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Summary(3.0, 2.0, 4.0, 5)
    assert Summary.of([7.0]) == Summary(7.0, 7.0, 7.0, 1)
    assert Summary.of([1.0, 2.0, 2.0, 8.0]) == Summary(2.0, 1.0, 8.0, 4)  # too few for quartiles
    assert Summary.of([5.0, 1.0, 3.0, 2.0, 4.0]).spread == 2.0


def test_speedup_is_the_median_of_paired_ratios():
    # A disturbed machine took ten times as long in the second round, for both.
    assert measure.speedup([2.0, 20.0, 2.0], [1.0, 10.0, 0.5]) == Summary(2.0, 2.0, 4.0, 3)
    with pytest.raises(ValueError):
        measure.speedup([1.0], [1.0, 2.0])


def test_turns_alternate_and_the_first_calls_do_not_count():
    log: list[tuple[str, int]] = []
    works = [
        Scripted(name, [9.0, *times], log)
        for name, times in (("a", [1.0, 2.0, 3.0]), ("b", [4.0, 5.0, 6.0]))
    ]
    times = measure.interleave(works, Budget(seconds=1e-9, rounds=3, turn=0.0))
    assert times == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert "".join(name for name, _ in log) == "ab" + "ab" + "ba" + "ab"


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_that_spin_come_to_rest(threads, monkeypatch):
    happened = []

    class Spinning:
        rest = 0.1

        def __call__(self, repeats: int) -> float:
            happened.append("spins")
            return 1.0

    monkeypatch.setattr(measure.time, "sleep", happened.append)
    monkeypatch.setattr(measure.torch, "get_num_threads", lambda: threads)
    measure.interleave([Spinning(), lambda repeats: 1.0], Budget(seconds=1e-9, rounds=1, turn=0.0))
    assert happened[-2:] == (["spins", "spins"] if threads == 1 else [0.1, 0.0])


def test_short_work_is_repeated_within_its_turn():
    log: list[tuple[str, int]] = []
    work = Scripted("a", [9.0, 0.25, 2.5], log)
    assert measure.interleave([work], Budget(seconds=1e-9, rounds=1, turn=1.0)) == [[2.5]]
    assert [repeats for _, repeats in log] == [1, 1, 4]


def test_slow_work_is_done_fewer_times():
    def sleep(repeats):
        time.sleep(0.02)
        return 0.02

    budget = Budget(seconds=0.001, rounds=50, turn=0.0, longest=10.0)
    assert 3 <= len(measure.interleave([sleep], budget)[0]) < 10


def test_seconds_are_those_of_one_call_and_not_of_freeing_its_results():
    class Slow:
        def __del__(self):
            time.sleep(0.05)

    def call():
        time.sleep(0.01)
        return Slow()

    assert 0.01 <= measure.seconds_of(call, CPU, 3) < 0.04


@pytest.mark.parametrize(
    ("ratio", "noise", "verdict"),
    [
        ((1.5, 1.4, 1.6), (0.9, 1.1), "faster"),
        ((0.7, 0.6, 0.8), (0.9, 1.1), "slower"),
        ((1.05, 1.04, 1.06), (0.9, 1.1), "tie"),  # as torch.nn is against itself
        ((1.5, 0.9, 2.0), (0.99, 1.01), "tie"),  # now faster, now slower
        ((1.05, 1.04, 1.06), (0.99, 1.01), "faster"),
    ],
)
def test_what_is_within_the_noise_is_a_tie(ratio, noise, verdict):
    assert measure.verdict(Summary(*ratio, 9), Summary(1.0, *noise, 9)) == verdict


# Cases


def test_cases_have_names_of_their_own_and_are_selected_by_them():
    assert len({case.name for case in CASES}) == len(CASES)
    assert select() == list(CASES)
    assert {case.name for case in select(["long", "book-gru"], ["GRU"])} == {
        "long-gru-256",
        "book-gru-256",
    }
    with pytest.raises(ValueError, match="no case has 'tetris' in its name"):
        select(["gru", "tetris"])
    with pytest.raises(ValueError, match="no case is left"):
        select(["book-gru"], ["RNN"])


def test_the_grid_is_measured_when_named():
    grid = select(["grid"])
    assert {case.cell for case in grid} == set(GATES)
    assert {(case.hidden_size, case.batch) for case in grid} >= {(8, 1), (8, 512), (2048, 1)}
    assert len({case.name for case in (*CASES, *grid)}) == len(CASES) + len(grid)
    assert [case.name for case in select(["grid-lstm-h8-b1"])] == ["grid-lstm-h8-b1"]


def test_every_source_has_every_cell():
    sources = {case.name.partition("-")[0] for case in CASES}
    for source in sources:
        assert {c.cell for c in CASES if c.name.startswith(source)} == set(GATES), source


def test_a_cpu_is_spared_what_takes_seconds_unless_it_is_asked_for():
    assert "stack-lstm-1024x4" not in {c.name for c in select(device="cpu")}
    assert [c.name for c in select(["stack-lstm-1024x4"], device="cpu")] == ["stack-lstm-1024x4"]
    quick = select(device="cpu", quick=True)
    assert 10 < len(quick) < len(select(device="cpu"))
    assert max(case.steps for case in quick) <= 20


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_operations_are_those_of_the_matrix_products(case):
    """Counted by torch for the same products, written out."""
    from torch.utils.flop_counter import FlopCounterMode

    inputs = torch.randn(case.tokens, case.input_size, requires_grad=case.input_grad)
    parameters = dict(case.module(torch.float32).named_parameters())
    with FlopCounterMode(display=False) as counter:
        for layer in range(case.layers):
            x = inputs
            if layer:
                width = case.hidden_size * case.directions
                x = torch.randn(case.tokens, width, requires_grad=True)
            for end in ["", "_reverse"][: case.directions]:
                h = torch.randn(case.tokens, case.hidden_size, requires_grad=True)
                y = x @ parameters[f"weight_ih_l{layer}{end}"].T
                (y + h @ parameters[f"weight_hh_l{layer}{end}"].T).sum().backward()
    assert case.flops(training=True) == counter.get_total_flops()
    assert 2 < case.flops(training=True) / case.flops(training=False) <= 3


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_bytes_are_those_of_inputs_and_results(case, mode):
    module, data = case.module(torch.float32), case.data(torch.float32, CPU)
    results = measure.Unit(module, data, mode, case.input_grad).results()
    x = data.input.data if case.shortest else data.input
    moved = [x, *module.parameters(), *results.values()]
    moved += [data.output_grad] if mode == "training" else []
    assert case.least_bytes(mode == "training", 4) == sum(4 * t.numel() for t in moved)
    assert case.weights == sum(p.numel() for p in module.parameters())


def test_packed_lengths_span_their_range_and_quick_cases_are_short():
    case = select(["speech"], ["LSTM"])[0]
    assert (min(case.lengths), max(case.lengths), len(case.lengths)) == (50, 200, 32)
    assert case.lengths != sorted(case.lengths, reverse=True)
    assert max(case.shortened().lengths) <= 20 and case.shortened().shortest > 0
    assert case.data(torch.float32, CPU).input.data.shape == (case.tokens, 64)


# Check


def spoilt(spoil):
    """A peer that is torch.nn but for what `spoil` does to its module."""

    def build(layer, example):
        module = copy.deepcopy(layer)
        spoil(module)
        return module

    return Peer("spoilt", build)


def scale_output(module):
    def scale(m, args, result):
        y, state = result
        packed = isinstance(y, PackedSequence)
        return y._replace(data=y.data * 1.0001) if packed else y * 1.0001, state

    module.register_forward_hook(scale)


def lose_state(module):
    module.register_forward_hook(lambda m, args, result: (result[0], result[1][:0]))


def poison_state(module):
    def poison(m, args, result):
        y, state = result
        if isinstance(state, tuple):
            return y, (state[0] * math.nan, *state[1:])
        return y, state * math.nan

    module.register_forward_hook(poison)


def scale_gradient(module):
    module.weight_hh_l0.register_hook(lambda grad: grad * 1.0001)


def forget_gradient(module):
    module.bias_hh_l0.requires_grad_(False)


def fail(module):
    module.register_forward_hook(lambda m, args, result: torch.ones(2) @ torch.ones(3))


SPOILS = [scale_output, lose_state, poison_state, scale_gradient, forget_gradient, fail]


@pytest.mark.parametrize("spoil", SPOILS)
def test_wrong_peers_get_no_time(spoil):
    cases = SMALL if spoil is scale_output else SMALL[:1]
    for row in rows_of([spoilt(spoil), PEERS[1]], cases, ["training"]):
        reference, wrong, fused = row.results
        assert wrong == suite.Result("spoilt", problem=wrong.problem)
        assert wrong.problem
        assert reference.problem is None and fused.problem is None
        assert reference.seconds and fused.speedup


def test_a_failing_reference_leaves_the_others_their_times(monkeypatch):
    def build(layer, example):
        raise MemoryError("out of memory")

    broken = Peer("torch.nn", build)
    row = next(
        iter(suite.rows(SMALL[:1], MODES, [torch.float32], [1], CPU, TINY, (broken, PEERS[1])))
    )
    assert row.results[0].problem == "MemoryError: out of memory"
    assert row.results[1].seconds and row.results[1].speedup is None


def test_inference_is_checked_on_its_own():
    def only_without_grad(module):
        def hook(m, args, result):
            return result if torch.is_grad_enabled() else (result[0] * 1.0001, result[1])

        module.register_forward_hook(hook)

    rows = rows_of([spoilt(only_without_grad)], SMALL[:1])
    assert [(row.mode, bool(row.results[1].problem)) for row in rows] == [
        ("training", False),
        ("inference", True),
        ("forward", False),
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fused_passes_the_check(dtype):
    for case in SMALL:
        expected = check.expect(case, dtype, CPU)
        for mode in MODES:
            data = case.data(dtype, CPU)
            module = PEERS[1].build(case.module(dtype), data.input)
            results = measure.Unit(module, data, mode, case.input_grad).results()
            assert check.problem(results, expected, mode) is None
            assert 0 <= check.error(results, expected) <= 2
            assert ("grad x" in results) == (mode == "training" and case.input_grad)
            assert ("grad weight_hh_l0" in results) == (mode == "training")
            del results["output"]
            assert check.problem(results, expected, mode) == "no output"


def test_where_tf32_is_permitted_its_rounding_is_no_mistake(monkeypatch):
    def use_tf32(module):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(check.to_tf32(parameter))

    assert check.to_tf32(torch.tensor([1 + 2**-10, 1 + 2**-12, -(2.0**-20)])).tolist() == [
        1 + 2**-10,
        1.0,
        -(2.0**-20),
    ]
    for case in SMALL:
        data = case.data(torch.float32, CPU)
        module = spoilt(use_tf32).build(case.module(torch.float32), data.input)
        results = measure.Unit(module, data, "training", case.input_grad).results()
        assert check.problem(results, check.expect(case, torch.float32, CPU), "training")
        with monkeypatch.context() as patch:
            patch.setattr(check, "permits_tf32", lambda *_: True)
            lenient = check.expect(case, torch.float32, CPU)
        assert check.problem(results, lenient, "training") is None
        scaled = {name: t * 1.01 for name, t in results.items()}
        assert check.problem(scaled, lenient, "training")


def test_tf32_is_permitted_as_torch_says():
    cuda = torch.device("cuda")
    assert check.permits_tf32(torch.float32, cuda, contextlib.nullcontext)
    assert not check.permits_tf32(torch.float32, cuda, measure.no_tf32)
    assert not check.permits_tf32(torch.float32, CPU, contextlib.nullcontext)
    assert not check.permits_tf32(torch.bfloat16, cuda, contextlib.nullcontext)


# Peers


def flashrnn(layer, example):
    return adapters.FlashRNN(layer, example, backend="vanilla")  # the one that a CPU runs


@pytest.mark.parametrize(
    ("build", "package", "modes", "cases"),
    [
        (adapters.CellLoop, "torch", MODES, [SMALL[0], SMALL[2]]),
        (adapters.OnnxRuntime, "onnxruntime", ["inference"], [SMALL[0], SMALL[2]]),
        (adapters.OpenVino, "openvino", ["inference"], [SMALL[0], SMALL[2]]),
        (flashrnn, "flashrnn", MODES, [Case(c, c, 5, 16, 1, 4, 3) for c in GATES]),
    ],
    ids=["loop", "onnx", "openvino", "flashrnn"],
)
def test_adapters_compute_the_same(build, package, modes, cases):
    pytest.importorskip(package)
    for case in cases:
        expected = check.expect(case, torch.float32, CPU)
        data = case.data(torch.float32, CPU)
        for mode in modes:
            module = build(case.module(torch.float32), data.input)
            results = measure.Unit(module, data, mode, case.input_grad).results()
            assert check.problem(results, expected, mode, peers.RIGHT) is None


@pytest.mark.slow
def test_torch_compile_computes_the_same():
    row = next(iter(rows_of([p for p in PEERS if p.name == "torch.compile"], SMALL[2:])))
    compiled = row.results[1]
    assert compiled.seconds or compiled.problem  # torch cannot compile it on every machine
    assert compiled.problem is None or not compiled.problem.startswith("error of")


def test_peers_are_asked_only_what_they_answer():
    def asked(case, mode="training", dtype=torch.float32, device="cpu"):
        question = peers.Question(case, mode, dtype, torch.device(device))
        return {peer.name for peer in PEERS if peer.can(question)}

    small, packed = SMALL[2], SMALL[1]
    always = {"torch.nn", "fusedrnn", "fusedrnn, recompute"}
    assert asked(packed) == always
    assert asked(small) == always | {"torch.compile", "cell loop"}
    few_bits = {"fusedrnn int8", "fusedrnn bfloat16"}
    inference = few_bits | {"ONNX Runtime", "OpenVINO"}
    assert asked(small, "inference") == asked(small) - {"fusedrnn, recompute"} | inference
    assert asked(packed, "inference") == {"torch.nn", "fusedrnn", "torch int8"} | few_bits
    assert asked(small, "inference", torch.bfloat16) & inference == set()
    exact = {"torch.nn, no TF32", "fusedrnn, no TF32"}
    assert asked(small, device="cuda") == asked(small) | exact | {"FlashRNN"}
    assert asked(small, dtype=torch.bfloat16, device="cuda") == asked(small) | {"FlashRNN"}
    assert asked(packed, device="cuda") == always | exact


def test_copies_have_their_weights_in_one_piece(monkeypatch):
    """Or cuDNN would gather them at every call of torch.nn, which would be charged with that."""
    flat = []
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda self: flat.append(self))
    for peer in [*PEERS[:4], *(p for p in PEERS if p.name == "torch.compile")]:
        flat.clear()
        made = peer.build(SMALL[2].module(torch.float32), None)
        assert made is flat[-1], peer.name


@pytest.mark.parametrize("case", SMALL[:3])
def test_weights_in_fewer_bits_are_compared_with_each_other(case):
    """Rounded results are no mistake, other wrong ones are; torch's rival is ours in 8 bits."""
    few_bits = [p for p in PEERS if p.relative]
    assert len(few_bits) == 3
    wrong = dataclasses.replace(spoilt(poison_state), relative=peers.ROUNDED)
    row = next(iter(rows_of([*few_bits, PEERS[1], wrong], [case], ["inference"])))
    found = {r.peer: r for r in row.results}
    assert "error of h_n" in found.pop("spoilt").problem
    assert not [r.problem for r in found.values() if r.problem]
    assert found["fusedrnn int8"].error > 50 and found["fusedrnn int8"].lead is None
    ratio = found["torch.nn"].lead.median / found["fusedrnn"].speedup.median
    assert ratio == pytest.approx(1)
    rivals = {p.name: p.rival for p in few_bits}
    assert rivals["torch int8"] == "fusedrnn int8"
    assert ("torch int8" in found) == (case.cell != "RNN")
    if "torch int8" in found:
        assert found["torch int8"].lead != found["torch int8"].speedup


def test_absent_peers_are_named(monkeypatch):
    gone = Peer("gone", PEERS[0].build, peers._cpu_inference, ("no_such_package",))
    monkeypatch.setattr(peers, "PEERS", (*PEERS[:2], gone))
    of_cpu = peers.Question(SMALL[0], "inference", torch.float32, CPU)
    assert peers.absent([of_cpu]) == ["gone (no_such_package)"]
    assert peers.absent([dataclasses.replace(of_cpu, mode="training")]) == []


def test_peers_are_chosen_by_name(monkeypatch):
    assert [p.name for p in peers.choose(["cell loop"])] == ["torch.nn", "cell loop"]
    with pytest.raises(ValueError, match="no peer is 'keras'"):
        peers.choose(["keras"])
    absent = Peer("absent", PEERS[0].build, needs=("no_such_package",))
    monkeypatch.setattr(peers, "PEERS", (*PEERS, absent))
    with pytest.raises(ValueError, match="absent needs the package no_such_package"):
        peers.choose(["absent"])
    assert "absent" not in {p.name for p in peers.choose([])}


# Rows


def test_a_slowed_peer_comes_out_slower():
    class Slowed(nn.GRU):
        def forward(self, *args):
            time.sleep(0.02)
            return super().forward(*args)

    def slow_down(module):
        module.__class__ = Slowed

    for row in rows_of([spoilt(slow_down)], SMALL[:1]):
        reference, slow = row.results
        assert slow.seconds.median > 0.02 > reference.seconds.median
        assert slow.speedup.median < 0.5 and slow.speedup.upper < 1
        assert slow.verdict == "slower"
        assert slow.tokens_per_second < reference.tokens_per_second
        assert slow.step_seconds == pytest.approx(slow.seconds.median / 6)
        assert slow.matmul_fraction < reference.matmul_fraction
        assert slow.bandwidth_fraction < reference.bandwidth_fraction
        assert slow.first_call_seconds > 0.02


def test_memory_is_that_of_the_layer():
    case = Case("rnn", "RNN", 64, 512, layers=1, steps=50, batch=64)
    kept = []

    def hoard(module):
        module.register_forward_hook(lambda m, args, result: kept.append(bytearray(b"1" * 2**26)))

    row = rows_of([spoilt(hoard)], [case], ["training"])[0]
    reference, hoarder = row.results
    output = 4 * 50 * 64 * 512
    # A tanh RNN needs its output and nothing else, or each step's hidden state as well.
    assert 0 < reference.saved_bytes <= 2 * output
    if reference.peak_bytes is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert output < reference.peak_bytes < 30 * output
    assert hoarder.peak_bytes > 2**26 > reference.peak_bytes


def test_a_peak_has_what_pools_kept_of_earlier_calls(monkeypatch):
    monkeypatch.delenv("FUSEDRNN_POISON", raising=False)
    layer, x = fusedrnn.LSTM(64, 256), torch.randn(100, 32, 64)
    if machine.peak_bytes(lambda: None, CPU) is None:
        pytest.skip("this system does not tell a process its peak memory")
    for _ in range(3):
        layer(x)[0].sum().backward()
    peak = machine.peak_bytes(lambda: layer(x)[0].sum().backward(), CPU)
    saved = 4 * 100 * 32 * (4 + 1) * 256  # four gates and the cell's state of each token
    assert peak > saved


def test_saved_bytes_leave_out_what_the_caller_has():
    class Saves(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            y = x @ weight.T
            ctx.save_for_backward(x, weight, y, x.new_zeros(100))
            return y

        @staticmethod
        def backward(ctx, grad):
            raise NotImplementedError

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(24, 5))

        def forward(self, x):
            y = Saves.apply(x, self.weight)
            return y, y[-1]

    data = SMALL[2].data(torch.float32, CPU)
    assert measure.Unit(Layer(), data, "forward", True).saved_bytes() == 400


def test_cpus_are_kept_busy_for_a_while():
    cpus = os.sched_getaffinity(0)
    with machine.kept_busy(1) as others:
        assert [os.sched_getaffinity(other.pid) for other in others] == [{max(cpus)}]
        assert others[0].poll() is None
    assert others[0].poll() is not None
    with pytest.raises(ValueError, match=f"there are {len(cpus)} CPUs"), machine.kept_busy(999):
        pass


def test_rows_are_made_with_their_number_of_threads():
    seen = []

    def note_threads(module):
        module.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))

    before = torch.get_num_threads()
    case = Case("tiny", "RNN", 4, 4, layers=1, steps=1, batch=1)
    rows = rows_of([spoilt(note_threads)], [case], ["inference"], threads=[2, 1])
    assert [row.threads for row in rows] == [2, 1]
    assert sorted(seen, reverse=True) == seen and set(seen) == {1, 2}
    assert torch.get_num_threads() == before


# What only a GPU can do, with stand-ins for its calls: a clock of its own, replays, its memory


class FakeEvent:
    clock = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.clock

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at - self.at


class FakeGraph:
    """Runs what was captured once more, into the same tensors."""

    def replay(self):
        for name, t in self.unit.run().items():
            self.kept[name].copy_(t)


@pytest.fixture
def fake_cuda(monkeypatch):
    nothing = contextlib.nullcontext
    monkeypatch.setattr(torch.cuda, "device", nothing)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", nothing)
    monkeypatch.setattr(torch.cuda, "stream", nothing)
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    return torch.device("cuda")


def test_a_gpu_s_time_is_its_own(fake_cuda):
    def call():
        FakeEvent.clock += 2.0  # milliseconds, and no time at all on the wall

    assert measure.seconds_of(call, fake_cuda, 5) == pytest.approx(2e-3)


def test_replays_are_checked_for_what_they_do_not_write(fake_cuda):
    case = SMALL[2]
    expected = check.expect(case, torch.float32, CPU)
    data = case.data(torch.float32, CPU)
    unit = measure.Unit(case.module(torch.float32), data, "training", case.input_grad)
    replay = measure.Replay(unit)
    replay._graph.unit, replay._graph.kept = unit, {k: t.detach() for k, t in replay._kept.items()}
    assert check.problem(replay.results(), expected, "training") is None
    del replay._graph.kept["grad weight_hh_l0"]
    replay._graph.unit = measure.Unit(
        case.module(torch.float32), data, "inference", case.input_grad
    )
    assert "grad" in check.problem(replay.results(), expected, "training")
    replay.device = fake_cuda
    assert replay(3) == 0.0


def test_a_gpu_s_peak_is_its_allocator_s(fake_cuda, monkeypatch):
    state = {"now": 100, "peak": 0}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda d: state["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: state["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda d: state.update(peak=100))
    assert machine.peak_bytes(lambda: state.update(peak=350), fake_cuda) == 250
