"""What setup.py decides, what it says when it cannot build, and what its binary asks for."""

import functools
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY, BINARY = "libfusedrnn.so", "fusedrnn_C.abi3.so"
NVCC_12_4 = "compute_50\ncompute_75\ncompute_80\ncompute_86\ncompute_87\ncompute_89\ncompute_90\n"
NVCC_13_0 = NVCC_12_4.replace("compute_50\n", "") + "compute_100\ncompute_103\ncompute_120\n"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fusedrnn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(tmp_path):
    """Makes an executable that prints the lines given, and returns its path."""

    def make(name: str, *lines: str, status: int = 0) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        prints = "".join(f"echo '{line}'\n" for line in lines)
        path.write_text(f"#!/bin/sh\n{prints}exit {status}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return make


def assert_one_sentence(text: str) -> None:
    assert re.fullmatch(r"fusedrnn: [^\n]+\.", text), text
    assert not re.search(r"\. [A-Z]", text), text


def run_setup(root: Path, *args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", *args],
        cwd=root,
        env={**os.environ, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


# What cannot be built.


def stub_torch(folder: Path, version: str) -> Path:
    info = folder / f"torch-{version}.dist-info"
    for path, text in {
        folder / "torch/__init__.py": "raise ImportError('the build must not import torch')",
        info / "METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n",
    }.items():
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return folder


def test_old_torch_and_missing_compiler_end_in_one_sentence(tmp_path):
    site = stub_torch(tmp_path, "2.9.1")
    for env, expected in (
        ({"PYTHONPATH": str(site)}, "torch >= 2.10 and finds 2.9.1"),
        ({"CXX": "/nonexistent"}, "'/nonexistent' cannot be used"),
        ({"FUSEDRNN_CUDA": "maybe"}, "FUSEDRNN_CUDA is 'maybe'"),
    ):
        done = run_setup(ROOT, "build_ext", "--build-lib", str(tmp_path / "lib"), **env)
        assert done.returncode == 1
        assert "Traceback" not in done.stdout
        last = done.stdout.strip().split("\n")[-1]
        assert_one_sentence(last)
        assert expected in last


@pytest.mark.parametrize(
    ("version", "enough"),
    [("2.9.1", False), ("1.13.0", False), ("2.10.0", True), ("2.13.0+cpu", True), ("3.0", True)],
)
def test_torch_versions(build, version, enough):
    assert build.at_least(version, build.MIN_TORCH) is enough


def test_missing_torch(build, monkeypatch):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="finds none") as error:
        build.find_torch()
    assert_one_sentence(str(error.value))


def test_compiler_that_lacks_a_flag_is_named_with_its_complaint(build, monkeypatch, script):
    compiler = script("old-g++", "unrecognized option -std=c++20", status=1)
    compiler.write_text(compiler.read_text().replace("echo", "echo >&2"))
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(SystemExit, match="unrecognized option") as error:
        build.find_cxx()
    assert_one_sentence(str(error.value))


@pytest.mark.parametrize(
    ("cc", "cxx"),
    [
        ("gcc", "g++"),
        ("gcc-12", "g++-12"),
        ("clang-16", "clang++-16"),
        ("x-linux-gcc", "x-linux-g++"),
    ],
)
def test_cc_implies_its_cxx(build, monkeypatch, script, cc, cxx):
    expected = script(cxx)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("CC", f"{expected.with_name(cc)} -pthread")
    assert build.find_cxx() == [str(expected), "-pthread"]


# CUDA: which nvcc, for which GPUs.


def test_nvcc_is_taken_from_cuda_home_first(build, monkeypatch, script):
    banner = "Cuda compilation tools, release 12.8, V12.8.93"
    first, second = script("home/bin/nvcc", banner), script("path/nvcc", banner)
    monkeypatch.delenv("FUSEDRNN_CUDA", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(second.parent), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_HOME", str(first.parent.parent))
    assert build.find_nvcc() == str(first)
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    assert build.find_nvcc() == str(second)
    monkeypatch.setenv("FUSEDRNN_CUDA", "0")
    assert build.find_nvcc() is None


def test_nvcc_may_be_absent_unless_required(build, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    monkeypatch.delenv("FUSEDRNN_CUDA", raising=False)
    assert build.find_nvcc() is None
    monkeypatch.setenv("FUSEDRNN_CUDA", "1")
    with pytest.raises(SystemExit, match="needs nvcc and finds none") as error:
        build.find_nvcc()
    assert_one_sentence(str(error.value))


@pytest.mark.parametrize("release", ["release 11.5, V11.5.119", "release 12.3, V12.3.1", ""])
def test_old_nvcc(build, release):
    with pytest.raises(SystemExit, match=r"need nvcc >= 12\.4") as error:
        build.check_nvcc("/usr/bin/nvcc", release)
    assert_one_sentence(str(error.value))


@pytest.mark.parametrize("release", ["release 12.4, V12.4.131", "release 13.0, V13.0.88"])
def test_new_nvcc(build, release):
    build.check_nvcc("/usr/bin/nvcc", f"Cuda compilation tools, {release}")


@pytest.mark.parametrize(
    ("listing", "asked", "archs"),
    [
        (NVCC_12_4, "", "7.5 8.0 9.0+PTX"),
        (NVCC_13_0, "", "7.5 8.0 9.0 10.0 12.0+PTX"),
        (NVCC_13_0, "9.0a;8.0", "9.0a 8.0"),
        (NVCC_13_0, "8.0, 12.0+PTX", "8.0 12.0+PTX"),
    ],
)
def test_architectures(build, listing, asked, archs):
    assert build.select_archs(listing, asked) == archs.split()


@pytest.mark.parametrize("asked", ["7.0", "9.0b", "90", "sm_90", "8.0;13.7"])
def test_unknown_architectures(build, asked):
    with pytest.raises(SystemExit, match=r"this nvcc knows .*8\.0, 8\.6.*12\.0") as error:
        build.select_archs(NVCC_13_0, asked)
    assert_one_sentence(str(error.value))


def test_archs_of_torchs_variable(build, sources, script, monkeypatch, capsys):
    assert build.torch_archs("7.0 7.5;8.6 9.0a 10.0 12.0+PTX") == "7.5;8.6;9.0a;10.0;12.0+PTX"
    assert build.torch_archs("") == build.torch_archs("7.0") == ""
    (sources / "cuda/stepwise").mkdir(parents=True)
    (sources / "cuda/stepwise/kernel.cu").touch()
    nvcc = str(script("nvcc", *NVCC_13_0.split()))

    def compiled_for() -> set[str]:
        text = build.ninja_file(Path("/site/torch"), ["g++"], nvcc)
        assert "FUSEDRNN_CUDA=0 leaves them out" in capsys.readouterr().out
        return set(re.findall(r"\bsm_(\w+)", text))

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    monkeypatch.delenv("FUSEDRNN_CUDA_ARCHS", raising=False)
    assert compiled_for() == {"86"}
    monkeypatch.setenv("FUSEDRNN_CUDA_ARCHS", "8.9")
    assert compiled_for() == {"89"}


@pytest.mark.parametrize(
    ("archs", "plain", "clusters"),
    [
        (
            "7.5 8.0 9.0 10.0 12.0+PTX",
            "75:sm_75 80:sm_80,sm_90,sm_100,sm_120,compute_80",
            "90:sm_90,sm_100,sm_120,compute_90",
        ),
        ("9.0", "80:sm_90", "90:sm_90"),
        ("9.0a 12.0", "90a:sm_90a 80:sm_120", "90a:sm_90a 90:sm_120"),
        ("8.6", "80:sm_86", "86:sm_86"),  # empty kernels: the linker wants their names
        # Every GPU that can compile the PTX further finds some that uses all it has.
        ("7.5+PTX", "75:sm_75,compute_75 80:compute_80", "90:compute_90"),
        ("12.0+PTX 12.0+PTX", "80:sm_120,compute_80", "90:sm_120,compute_90"),
    ],
)
def test_gencode(build, archs, plain, clusters):
    for ptx, expected in ((build.PTX, plain), (build.CLUSTER_PTX, clusters)):
        options = build.gencode(archs.split(), ptx)
        short = [re.sub(r"-gencode=arch=compute_(\w+),code=\[(.*)\]", r"\1:\2", o) for o in options]
        assert short == expected.split()


def test_sources_tell_no_other_gpus_apart(build):
    """For all others the PTX of an older one does, see PTX in setup.py."""
    text = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.*"))
    asked = set(re.findall(r"__CUDA_ARCH__ *[<>=]+ *(\d+)0\b", text))
    assert asked and asked <= {p.replace(".", "") for p in (*build.PTX, *build.CLUSTER_PTX)}


# What is compiled, and how.


@pytest.fixture
def sources(build, monkeypatch, tmp_path):
    """A source tree of empty files in place of ours."""
    names = "torch/library python/module plan/planner cpu/kernels cpu/dispatch".split()
    for name in names:
        path = tmp_path / "csrc" / f"{name}.cpp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(build, "ROOT", tmp_path)
    for name in ("CXXFLAGS", "LDFLAGS", "NVCCFLAGS", "FUSEDRNN_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "csrc"


def flags_of(text: str) -> dict[str, str]:
    """Object -> its flags, in the order in which build.ninja has them."""
    found = re.findall(r"^build build/ninja/csrc/(\S+): \S+ \S+\n  flags = (.*)$", text, re.M)
    assert found
    return dict(found)


def test_only_csrc_torch_sees_torch_and_only_csrc_python_python(build, sources):
    flags = flags_of(build.ninja_file(Path("/site/torch"), ["g++"], None))
    for where, seen in (
        ("/site/torch", "torch/library.o"),
        (sysconfig.get_path("include"), "python/module.o"),
    ):
        assert {name for name, line in flags.items() if where in line} == {seen}


def test_kernels_are_compiled_once_for_each_instruction_set_and_linked_weakest_first(
    build, sources
):
    text = build.ninja_file(Path("/site/torch"), ["g++"], None)
    flags = {name: line for name, line in flags_of(text).items() if "kernels" in name}
    names = [f"cpu/kernels.{isa}.o" for isa in build.ISAS]
    assert sorted(flags) == sorted(names)
    for isa, name in zip(build.ISAS, names, strict=True):
        assert f"-DFUSEDRNN_ISA={isa} {build.ISAS[isa]}".strip() == flags[name].strip()
    assert "-m" not in next(iter(build.ISAS.values()))  # the first runs on every such processor
    linked = re.search(r"^build build/ninja/libfusedrnn.so: link (.*)$", text, re.M)[1].split()
    assert linked[-len(names) :] == [f"build/ninja/csrc/{name}" for name in names]
    for name in ("torch/library.o", "plan/planner.o", "cpu/dispatch.o"):
        assert all(f"-DFUSEDRNN_HAVE_{isa}=1" in flags_of(text)[name] for isa in build.ISAS)


def test_cuda_sources_are_compiled_when_there_are_any(build, sources, script):
    nvcc = str(script("nvcc", *NVCC_13_0.split()))
    without = build.ninja_file(Path("/site/torch"), ["g++"], nvcc)
    assert "nvcc" not in without
    assert "WITH_CUDA" not in without
    (sources / "cuda/stepwise").mkdir(parents=True)
    for name in ("stepwise/kernel.cu", "cluster_kernel.cu", "device.cpp", "layers.cpp"):
        (sources / "cuda" / name).touch()
    text = build.ninja_file(Path("/site/torch"), ["ccache", "g++", "-m64"], nvcc)
    rules = dict(re.findall(r"^build build/ninja/csrc/cuda/(\S+): (\w+) ", text, re.M))
    assert rules.pop("layers.o") == "cxx"
    assert set(rules) == {"stepwise/kernel.o", "cluster_kernel.o", "device.o"}
    assert set(rules.values()) == {"nvcc"}
    assert f"{nvcc} -ccbin g++ " in text
    flags = flags_of(text)
    assert ["sm_75" in flags[f"cuda/{name}"] for name in rules] == [False, True, False]
    assert ["sm_90" in flags[f"cuda/{name}"] for name in rules] == [True, True, False]
    library = flags["torch/library.o"]
    assert "-DFUSEDRNN_WITH_CUDA=1" in library
    assert """'-DFUSEDRNN_CUDA_ARCHS="7.5;8.0;9.0;10.0;12.0+PTX"'""" in library
    assert "cuda" not in build.ninja_file(Path("/site/torch"), ["g++"], None)


def test_flags_of_the_environment_are_kept(build, sources, monkeypatch):
    monkeypatch.setenv("CXXFLAGS", "-fsanitize=address -DX=$HOME")
    monkeypatch.setenv("LDFLAGS", "-fsanitize=address")
    text = build.ninja_file(Path("/site/torch"), ["g++"], None)
    assert "-fsanitize=address -DX=$$HOME" in text
    assert re.search("-shared .* -fsanitize=address", text)


# What was built.


@functools.cache
def lines_of(name: str, *command: str) -> list[str]:
    file = Path(importlib.util.find_spec("fusedrnn_C").origin).with_name(name)
    tool = shutil.which(command[0]) or pytest.skip(f"needs {command[0]}")
    run = subprocess.run([tool, *command[1:], file], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def symbols(name: str, which: str) -> list[str]:
    return [line.split()[-1] for line in lines_of(name, "nm", "-D", which)]


def needed(name: str) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(\w+)", "\n".join(lines_of(name, "readelf", "-d"))))


def test_binaries_need_only_what_every_torch_has():
    torch = {"libtorch", "libtorch_cpu", "libc10"}  # no libtorch_cuda, no libcudart
    system = {"libstdc", "libgcc_s", "libc", "libm", "libdl", "librt", "libpthread", "ld"}
    assert "libtorch" in needed(LIBRARY)  # the way to the CUDA symbols, see TORCH_LIBS
    assert needed(LIBRARY) <= torch | system
    assert "libfusedrnn" in needed(BINARY)
    assert needed(BINARY) <= {"libfusedrnn"} | system


def test_the_library_uses_only_the_stable_abi_of_torch_and_no_python():
    names = symbols(LIBRARY, "--undefined-only")
    assert [name for name in names if re.match(r"_ZN?K?(2at|3c10|5torch)", name)] == []
    assert [name for name in names if re.match(r"_?Py", name)] == []


def test_the_module_uses_only_the_stable_abi_of_python():
    names = symbols(BINARY, "--undefined-only")
    private = re.compile(r"_Py(?!_(NoneStruct|TrueStruct|FalseStruct|Dealloc))")
    assert [name for name in names if private.match(name) or "torch" in name] == []


def test_binaries_export_nothing_that_could_clash():
    for name, only in ((LIBRARY, "fusedrnn_inspection"), (BINARY, "PyInit_fusedrnn_C")):
        names = symbols(name, "--defined-only")
        names.remove(only)
        assert [name for name in names if "fusedrnn" in name or name.startswith("cuda")] == []


def test_binary_has_every_instruction_set(build):
    from fusedrnn import _C

    assert sorted(name for name, _ in _C.cpu_variants()) == sorted(build.ISAS)


@pytest.mark.slow
def test_builds_are_incremental_and_the_wheel_serves_every_python(tmp_path):
    root = tmp_path / "fusedrnn"
    for name in ("csrc", "fusedrnn"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)

    quick = {"FUSEDRNN_CUDA": "0", "CXXFLAGS": "-O0"}

    def compiled() -> set[str]:
        done = run_setup(root, "build_ext", **quick)
        assert done.returncode == 0, done.stdout
        return set(re.findall(r"^\[\d+/\d+\] build/ninja/csrc/(\S+)\.o$", done.stdout, re.M))

    everything = compiled()
    assert {"torch/library", "python/module", "cpu/dispatch"} < everything
    assert compiled() == set()
    (root / "csrc/cpu/dispatch.cpp").touch()
    assert compiled() == {"cpu/dispatch"}
    (root / "csrc/torch/checks.h").touch()
    for name in (LIBRARY, BINARY):
        (root / name).write_text("of an editable install, by now too old")
    assert {name.split("/")[0] for name in compiled()} == {"torch"}
    for name in (LIBRARY, BINARY):
        assert (root / name).read_bytes() == (root / "build/ninja" / name).read_bytes()

    done = run_setup(root, "bdist_wheel", **quick)
    assert done.returncode == 0, done.stdout
    (wheel,) = (root / "dist").iterdir()
    assert re.fullmatch(r"fusedrnn-[\d.]+-cp310-abi3-linux_\w+\.whl", wheel.name)
