"""The microbenchmarks of the GPU command, under the emulator."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
from compiling import setup_script

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu import micro, summary


@pytest.fixture(scope="module")
def emulated_library():
    from emulator import build

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(micro.PATH, str(build("plain", "micro.so")))
        yield micro.Library()


def test_microbenchmarks_end_and_receive_what_was_sent(emulated_library):
    """Every kernel, with the emulator's checks of what the PTX ISA demands."""
    runs = list(micro.runs(repeats=3, largest=4))
    assert len({m.id for m in micro.runs()}) == len(list(micro.runs()))
    assert {m.kernel for m in runs} < {m.kernel for m in micro.runs(largest=16)}
    assert {m.cluster for m in micro.runs()} == {1, 2, 4, 8, 16}
    assert {m.cluster for m in micro.runs(clusters=False)} == {1}
    few = [micro.Micro(k, "", blocks=3, size=64, repeats=3) for k in ("flags", "data_words")]
    for m in [*runs, *few]:
        found = emulated_library.run(m)
        assert found["cycles"] > 0, m
    fits = micro.fitting(emulated_library, sizes=(1, 3), shared=(1024,), most=2)
    assert fits == {"clusters": {"1024": [132, 44]}, "launched": {"1": None, "3": None}}
    lines = summary.clusters_table({**fits, "clusters": {"1024": [132, 66, 44]}})
    assert lines[-1] == ["3", "44", "accepted"] and lines[2][-1] == "not tried"


def test_a_microbenchmark_that_fails_says_so(emulated_library, capfd):
    with pytest.raises(RuntimeError, match="there is no such kernel"):
        emulated_library.run(micro.Micro("warp_drive", ""))
    with pytest.raises(RuntimeError, match="emulated launch failure"):  # st.async needs two blocks
        emulated_library.run(micro.Micro("exchange", "", size=1024, repeats=2))
    with pytest.raises(RuntimeError, match="emulated launch failure"):
        emulated_library.run(micro.Micro("flags", "", blocks=5000, size=64, repeats=2))


def test_a_microbenchmark_without_its_library(tmp_path, monkeypatch):
    monkeypatch.setenv(micro.PATH, str(tmp_path / "micro.so"))
    with pytest.raises(FileNotFoundError, match="benchmarks.gpu build"):
        micro.Library()


def test_microbenchmarks_compile(tmp_path):
    setup = setup_script()
    try:
        setup.find_nvcc() or pytest.skip("no nvcc (see setup.py for where it is looked for)")
    except SystemExit as error:
        pytest.skip(f"nvcc cannot be used: {error}")
    path = micro.build("8.0;9.0", tmp_path / "micro.so")
    library = ctypes.CDLL(str(path))  # it needs a driver to run, and none to be loaded
    library.micro_error.restype = ctypes.c_char_p
    assert library.micro_error(-1) == b"there is no such kernel"
