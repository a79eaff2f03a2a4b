"""Resident memory of long runs over many sizes: it settles, close to where torch.nn's settles.
Pages that a call left stay for the next one.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import os, random, sys
import torch

layers = torch.nn if sys.argv[1] == "torch.nn" else __import__("fusedrnn")
torch.manual_seed(0), random.seed(0), torch.set_num_threads(1)
lengths = random.Random(0)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def train(net, steps, batch):
    net(torch.randn(steps, batch, net.input_size))[0].sum().backward()


def two_layers():
    # Gradients that stay alive lie between the blocks of other calls.
    net = layers.LSTM(16, 64, 2, bidirectional=True)
    kept = None
    for i in range(240):
        train(net, 5 + i % 23, 32)
        gru = layers.GRU(16, 128)
        kept = torch.autograd.grad(gru(torch.randn(3, 2, 16))[0].sum(), list(gru.parameters()))
        yield kept


def random_sizes():
    nets = [layers.RNN(8, 96), layers.GRU(8, 48, 3), layers.LSTM(8, 160, bidirectional=True)]
    for _ in range(240):
        train(lengths.choice(nets), lengths.randint(1, 60), lengths.randint(1, 40))
        yield


def large_once():
    net = layers.LSTM(32, 256, 2)
    for i in range(300):
        train(net, 300 if i == 5 else lengths.randint(1, 12), 32)
        yield


seen = [resident() for _ in {"two_layers": two_layers, "random_sizes": random_sizes,
                             "large_once": large_once}[sys.argv[2]]()]
print(max(seen[: len(seen) // 2]), max(seen[len(seen) // 2 :]), seen[-1])
"""


def run(which: str, mix: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, which, mix], capture_output=True, text=True, check=True
    )
    return list(map(int, done.stdout.split()))


@pytest.mark.parametrize("mix", ["two_layers", "random_sizes", "large_once"])
def test_resident_memory_settles(mix, monkeypatch):
    monkeypatch.delenv("FUSEDRNN_POISON", raising=False)  # would touch every page
    early, late, ours = run("fusedrnn", mix)
    assert late <= 1.05 * early, f"{early / 1e6:.0f} MB grew to {late / 1e6:.0f} MB"
    expected = run("torch.nn", mix)[-1]
    assert ours <= 1.2 * expected, f"{ours / 1e6:.0f} MB, torch.nn {expected / 1e6:.0f} MB"


SMALL_CALLS_BETWEEN = """
import resource, statistics
import torch, fusedrnn

torch.set_num_threads(1)
large, small = fusedrnn.LSTM(64, 256), fusedrnn.LSTM(16, 32, 2)
x, xs = torch.randn(50, 32, 64), torch.randn(12, 8, 16)


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    large(x)[0].sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


seen = []
for _ in range(9):
    seen.append(faults())
    for _ in range(80):
        small(xs)[0].sum().backward()
print(statistics.median(seen))
"""


def test_small_calls_between_leave_the_pages_of_large_ones(monkeypatch):
    monkeypatch.delenv("FUSEDRNN_POISON", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", SMALL_CALLS_BETWEEN], capture_output=True, text=True, check=True
    )
    # Of 15 MB of reserve and scratch memory there are 3,600 pages; the rest is torch's.
    assert float(done.stdout) < 2500
