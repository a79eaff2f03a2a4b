"""Threads, processes, sizes at both ends, memory, and torch's global switches."""

import copy
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from cases import CELLS, make_pair, random_state, run
from tolerances import assert_as_exact_as_torch
from torch.utils.data import DataLoader, Dataset

import fusedrnn
from fusedrnn import reference, tangents


def gradients(module, x):
    y = module(x)[0]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(module.parameters()))]


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Threads and processes


def test_threads_at_once():
    """One module and different ones, called from many threads."""
    torch.set_num_threads(2)
    modules = [make_pair(cell, 8, 9, num_layers=2, bidirectional=True)[1] for cell in CELLS]
    x = torch.randn(20, 6, 8)
    expected, wrong = [gradients(m, x) for m in modules], []

    def work(i):
        for j in range(i, i + 20):
            k = j % len(modules) if i else 0
            if not same_bits(gradients(modules[k], x), expected[k]):
                wrong.append(CELLS)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 0, 0, 1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize(
    "limit",
    [
        "OMP_THREAD_LIMIT=1",
        pytest.param("OMP_DYNAMIC=true", marks=pytest.mark.slow),
        pytest.param("OMP_MAX_ACTIVE_LEVELS=0", marks=pytest.mark.slow),
    ],
)
def test_fewer_openmp_threads_than_torch_asked_for(limit, tmp_path):
    """torch.nn's float32 LSTM then trains on memory that nobody has written."""
    pairs = [make_pair(cell, 20, 64) for cell in ("rnn", "gru", "lstm", "lstm-proj")]
    x = torch.randn(10, 33, 20)
    torch.save((x, [ours for _, ours in pairs]), tmp_path / "given")
    program = (
        "import torch; from cases import run; torch.set_num_threads(2);"
        "x, modules = torch.load('given', weights_only=False);"
        "torch.save([run(module, x, None) for module in modules], 'found')"
    )
    name, value = limit.split("=")
    env = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | {name: value}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), env.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, check=True, timeout=300)
    for found, (theirs, ours) in zip(torch.load(tmp_path / "found"), pairs, strict=True):
        exact = run(copy.deepcopy(theirs).double(), x.double(), None)
        assert_as_exact_as_torch(found, run(theirs, x, None), exact)
        assert same_bits(found.values(), run(ours, x, None).values())


def reserve_of(y):
    """What forward left for backward, from the node of an output."""
    return next(t for t in y.grad_fn.saved_tensors if t is not None and t.dtype == torch.uint8)


def needs_kept_reserves():
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        pytest.skip("torch 2.10 takes no memory but its own")
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("nothing is kept where AddressSanitizer is to see each block")


def test_memory_of_a_reserve_is_used_again():
    """Of one that is no longer needed, whoever dropped it, and of no other."""
    needs_kept_reserves()
    module, x = fusedrnn.LSTM(8, 128, 2), torch.randn(64, 32, 8)
    expected = gradients(module, x)
    y, other = module(x)[0], module(x)[0]
    reserves = [reserve_of(t) for t in (y, other)]
    assert all(r.nbytes > 1 << 20 and r.data_ptr() % 4096 == 0 for r in reserves)
    first, second = (r.data_ptr() for r in reserves)
    assert first != second
    del reserves
    for _ in range(2):
        found = torch.autograd.grad(y.square().sum(), list(module.parameters()), retain_graph=True)
        assert same_bits(found, expected[1:])
    third = reserve_of(module(x)[0]).data_ptr()
    assert third not in (first, second)
    dropping = [y]
    del y
    thread = threading.Thread(target=dropping.clear)
    thread.start(), thread.join(60)
    y, z = module(x)[0], module(x)[0]
    assert {reserve_of(t).data_ptr() for t in (y, z)} == {first, third}
    assert same_bits([y, z, other], [expected[0]] * 3)
    found = torch.autograd.grad(other.square().sum(), list(module.parameters()))
    assert same_bits(found, expected[1:])


def test_a_reserve_of_another_process():
    """A child of fork uses copies of what its parent keeps."""
    needs_kept_reserves()
    module, x = fusedrnn.LSTM(8, 128, 2), torch.randn(64, 32, 8)
    torch.set_num_threads(2)
    y = module(x)[0]
    expected = gradients(module, x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=send_gradients, args=(queue, module, x))
    process.start()
    found = [torch.from_numpy(g) for g in queue.get(timeout=60)]
    process.join(60)
    assert process.exitcode == 0 and same_bits(found, expected)
    assert same_bits([y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))], found)


def send_gradients(queue, module, x):
    torch.set_num_threads(1)
    queue.put([g.numpy() for g in gradients(module, x)])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_other_processes(start):
    """A forked process, like any that used torch's threads before, is left one thread by torch."""
    torch.set_num_threads(2)
    module, x = make_pair("lstm", 8, 9, num_layers=2)[1], torch.randn(20, 6, 8)
    expected = gradients(module, x)
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    process = context.Process(target=send_gradients, args=(queue, module, x))
    process.start()
    found = [torch.from_numpy(g) for g in queue.get(timeout=60)]
    process.join(60)
    assert process.exitcode == 0
    assert same_bits(found, expected)


class Encoded(Dataset):
    """Items that one of our layers computes in the worker."""

    def __init__(self):
        self.gru = make_pair("gru", 3, 4)[1].requires_grad_(False)
        self.x = torch.randn(6, 5, 3)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.gru(self.x[i])[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_in_workers_of_a_data_loader(start):
    torch.set_num_threads(2)
    data = Encoded()
    expected = torch.stack([data[i] for i in range(len(data))])
    loader = DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context=start)
    torch.testing.assert_close(torch.cat(list(loader)), expected, rtol=0, atol=0)


# Memory


def resident():
    """MB of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@pytest.mark.parametrize("cell", ["gru", "lstm-proj"])
def test_no_memory_grows(cell):
    """1,000 steps of changing lengths: a leak of one output each would be 60 MB."""
    module = make_pair(cell, 16, 32, num_layers=2, bidirectional=True)[1]
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    x = torch.randn(30, 8, 16)
    for step in range(1_100):
        optimizer.zero_grad()
        module(x[: 20 + step % 11])[0].square().mean().backward()
        optimizer.step()
        if step == 100:
            gc.collect()
            before = resident()
    gc.collect()
    assert resident() - before < 12


@pytest.mark.parametrize("cell", CELLS)
def test_out_of_memory_leaves_the_module_usable(cell):
    """2^43 elements of an expanded input: no machine has room for what comes out."""
    module = make_pair(cell, 1, 3)[1]
    x = torch.randn(4, 2, 1)
    expected = gradients(module, x)
    for save in (False, True):
        module.requires_grad_(save)
        with pytest.raises(RuntimeError):
            module(torch.zeros(1, 1, 1).expand(2**22, 2**21, 1))
    assert same_bits(gradients(module, x), expected)


# Sizes


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_one_of_everything(cell, bidirectional):
    plain, fused = make_pair(cell, 1, 1, bidirectional=bidirectional, dtype=torch.float64)
    x, states = torch.randn(1, 1, 1, dtype=torch.float64), random_state(plain, 1)
    theirs, ours = (run(m, x, states) for m in (plain, fused))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 2, 3), (5, 0, 3), (0, 0, 3)])
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_at_all(cell, shape):
    """T=0 is torch.nn's error, B=0 its empty result with zero gradients."""
    plain, fused = make_pair(cell, 3, 4, num_layers=2, bidirectional=True)
    x = torch.zeros(shape)
    if shape[0] == 0:
        for module in (plain, fused):
            with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
                module(x)
        return
    y, state = fused(x)
    assert y.shape == plain(x)[0].shape
    state = state if fused.mode == "LSTM" else (state,)
    assert all(s.shape[1] == 0 for s in state)
    (y.sum() + sum(s.sum() for s in state)).backward()
    assert all(not p.grad.any() for p in fused.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_more_steps_than_16_bits_count(cell):
    """All cells share the code that counts steps; of others torch.nn takes minutes."""
    plain, fused = make_pair(cell, 2, 3, bidirectional=True, dtype=torch.float64)
    x = torch.randn(70_000, 2, 2, dtype=torch.float64)
    theirs, ours = (run(m, x, random_state(plain, 2)) for m in (plain, fused))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def available():
    """GB that this machine can still give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("MemAvailable")).split()[1]) / 2**20


@pytest.mark.slow
def test_more_elements_than_31_bits_count():
    """An output of 2^31 elements and more; every row's input is the same, so is every result."""
    if available() < 14:
        pytest.skip("needs 14 GB of free memory")
    torch.set_num_threads(2)
    module = make_pair("gru", 1, 2)[1]
    steps, batch = 2**10, 2**20 + 3
    one = torch.randn(steps, 1, 1)
    with torch.no_grad():
        y, h = module(one.expand(steps, batch, 1))
        expected, last = module(one)
    assert y.numel() > 2**31
    torch.testing.assert_close(y[:, -1:], expected)
    torch.testing.assert_close(y[-1, :: 2**16], expected[-1].expand(17, -1))
    torch.testing.assert_close(h[:, ::999], last.expand(-1, len(range(0, batch, 999)), -1))


# Values that are no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_infinity_in_gradients(cell, value):
    """Where torch.nn's gradients are finite, infinite or NaN, ours are too."""
    plain, fused = make_pair(cell, 3, 4, num_layers=2, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    x[2, 1, 0] = value
    theirs, ours = (run(m, x, random_state(plain, 2)) for m in (plain, fused))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, equal_nan=True)


# Switches


@pytest.mark.parametrize("cell", CELLS)
def test_deterministic_algorithms(cell):
    """The mode that refuses what is not deterministic has nothing to refuse."""
    module = make_pair(cell, 3, 4, num_layers=2, bidirectional=True, dropout=0.2)[1]
    x, lengths = torch.randn(5, 3, 3), torch.tensor([5, 0, 2])
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            torch.manual_seed(4)
            y = module(x, lengths=lengths)[0]
            runs.append([y, *torch.autograd.grad(y.sum(), list(module.parameters()))])
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_bits(*runs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_half_precision_trains(cell, dtype):
    """`.half()` and `.bfloat16()`: dtypes as torch.nn's, values near those of float32."""
    plain, fused = make_pair(cell, 3, 4, num_layers=2)
    low = fused.half() if dtype == torch.float16 else fused.bfloat16()
    x, states = torch.randn(5, 2, 3), random_state(plain, 2)
    exact = run(plain, x, states)
    found = run(low, x.to(dtype), tuple(s.to(dtype) for s in states))
    for name, value in exact.items():
        assert found[name].dtype == dtype, name
        assert (found[name].float() - value).norm() <= 0.05 * value.norm() + 0.05, name


def test_create_graph_costs_forward_and_backward_nothing(monkeypatch):
    """What a second derivative needs runs when it is asked for, not before: the plain
    implementation, where there is no kernel.
    """
    calls = []
    monkeypatch.setattr(tangents, "has_kernels", lambda call: False)
    plain = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *a, **k: calls.append(a) or plain(*a, **k))
    module, x = fusedrnn.LSTM(3, 4, 2), torch.randn(5, 2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
    assert not calls
    grad.square().sum().backward()
    assert len(calls) == 1
