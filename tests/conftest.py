"""Settings that every test shares."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# Examples differ in cost by far: time per example says nothing here. CI draws the same ones each
# time: what it says is then about the change.
settings.register_profile("fusedrnn", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("fusedrnn")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch finds none"))


@pytest.fixture(autouse=True)
def same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # The kernels leave threads asleep for work as small as tests have.
    monkeypatch.setenv("FUSEDRNN_THREADS", "all")
    monkeypatch.setenv("FUSEDRNN_POISON", "1")
    # What tests run is tested by them: see test_cuda_standing.py for the check at first use.
    # Families that failed as canaries of `python -m benchmarks.gpu` do not run in its tests either.
    canaries = "FUSEDRNN_GPU_CANARIES" in os.environ
    monkeypatch.setenv("FUSEDRNN_CUDA_KERNELS", "verified" if canaries else "on")
    # torch.nn's recurrent layers meet at a barrier each step: with a thread for every core they
    # take minutes as soon as anything else runs. Tests of threads set their own number.
    torch.set_num_threads(1)


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine's rates takes the benchmarks long, and few tests need them."""
    from benchmarks import machine

    monkeypatch.setitem(machine.MATMUL, "cpu", 64)
    monkeypatch.setitem(machine.COPY, "cpu", 4096)
