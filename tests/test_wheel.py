"""What a wheel of this build would ask of the system that it is installed on."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fusedrnn import _C

BINARIES = sorted(Path(importlib.util.find_spec("fusedrnn_C").origin).parent.glob("*fusedrnn*.so"))


def test_the_binaries_run_with_the_glibc_of_manylinux_2_28():
    """NVIDIA's static run time is bound to the glibc it is linked on, so only builds without it."""
    objdump = shutil.which("objdump") or pytest.skip("needs objdump")
    if _C.cuda_archs():
        pytest.skip("built with CUDA: release.yml builds such wheels in a manylinux_2_28 container")
    assert BINARIES
    for binary in BINARIES:
        command = [objdump, "-T", str(binary)]
        table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        newer = [
            line
            for line in table.splitlines()
            for version in re.findall(r"GLIBC_([\d.]+)", line)
            if tuple(map(int, version.split("."))) > (2, 28)
        ]
        assert newer == []
