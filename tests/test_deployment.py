"""The blocks of docs/deployment.md that need other compilers: AOTInductor, and C++ with CMake."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import fusedrnn
from fusedrnn.__main__ import main

PAGE = Path(__file__).resolve().parents[1] / "docs/deployment.md"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


def run(*command, cwd, **env):
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_path_of_the_library(capsys):
    assert main(["library"]) == 0
    path = capsys.readouterr().out.strip()
    assert path == fusedrnn.info()["library"] and Path(path).name == "libfusedrnn.so"


@pytest.mark.slow
def test_a_package_in_cpp_without_python(tmp_path, monkeypatch):
    cmake = shutil.which("cmake")  # as the extra [test] installs it
    assert cmake, "pip install cmake"
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "deployment"}
    for block in blocks("python")[:3]:  # up to the exported program
        exec(block, names)
    package = tmp_path / "tagger.aoti.pt2"
    torch._inductor.aoti_compile_and_package(names["program"], package_path=str(package))
    words = torch.randint(100, (3, 11))
    torch.save(words, "words.pt")

    (tmp_path / "tagger.cpp").write_text(blocks("cpp")[0])
    (tmp_path / "CMakeLists.txt").write_text(blocks("cmake")[0])
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    run(cmake, "-B", "build", prefix, cwd=tmp_path)
    run(cmake, "--build", "build", cwd=tmp_path)
    program = tmp_path / "build/tagger"
    assert "libpython" not in run("ldd", program, cwd=tmp_path)
    library = fusedrnn.info()["library"]
    run(program, library, package, "words.pt", "scores.pt", cwd=tmp_path)
    torch.testing.assert_close(torch.load("scores.pt"), names["model"](words))
