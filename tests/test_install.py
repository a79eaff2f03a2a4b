"""What an installation holds, what is imported from where, and what an unusable one says."""

from __future__ import annotations

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import fusedrnn
from fusedrnn.__main__ import main

ROOT = Path(__file__).resolve().parent.parent


# What is said where the compiled part cannot be used.


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Runs fusedrnn/_C.py with tmp_path searched first; returns the message of its ImportError."""
    binary = sys.modules["fusedrnn_C"]
    monkeypatch.delitem(sys.modules, "fusedrnn_C")
    monkeypatch.syspath_prepend(tmp_path)

    def run() -> str:
        with pytest.raises(ImportError) as error:
            runpy.run_path(str(ROOT / "fusedrnn/_C.py"))
        message = str(error.value)
        assert error.value.__suppress_context__ or not error.value.__context__
        assert "\n" not in message and not re.search(r"\. [A-Z]", message)
        return message

    yield run
    sys.modules["fusedrnn_C"] = binary


def test_nothing_compiled(check, monkeypatch):
    monkeypatch.setitem(sys.modules, "fusedrnn_C", None)  # as if it were not found
    assert "not compiled; run `pip install .`" in check()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "file too short"),
        (b"MZ" + bytes(1000), "invalid ELF header"),
        (Path(torch._C.__file__).read_bytes(), "PyInit_fusedrnn_C"),
    ],
    ids=["empty", "of another system", "another module"],
)
def test_broken_binary(check, tmp_path, content, problem):
    (tmp_path / "fusedrnn_C.abi3.so").write_bytes(content)
    message = check()
    assert "cannot be loaded" in message and problem in message and "install it again" in message


@pytest.mark.parametrize(("line", "version"), [("__version__ = '0.0.7'", "0.0.7"), ("", "unknown")])
def test_binary_of_another_version(check, tmp_path, line, version):
    (tmp_path / "fusedrnn_C.py").write_text(line)
    message = check()
    assert f"fusedrnn is version {fusedrnn.__version__} and" in message
    assert f"{tmp_path / 'fusedrnn_C.py'} is version {version}; run `pip install .`" in message


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0+cu117", "2.9.0a0+git1234"])
def test_torch_that_is_too_old(check, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    assert f"needs torch >= 2.10 and finds {version}; upgrade" in check()


def test_the_check_comes_before_all_else():
    program = "import torch; torch.__version__ = '2.9.1'; import fusedrnn"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: fusedrnn needs torch >= 2.10")


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "cannot open"), (b"", "too short")], ids=["missing", "empty"]
)
def test_the_library_beside_the_binary_is_broken(tmp_path, content, problem):
    binary = Path(sys.modules["fusedrnn_C"].__file__)
    shutil.copy(binary, tmp_path)
    if content is not None:
        (tmp_path / "libfusedrnn.so").write_bytes(content)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fusedrnn"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    message = done.stderr.splitlines()[-1]
    assert "ImportError: the compiled part of fusedrnn cannot be loaded" in message
    assert f"libfusedrnn.so: {problem}" in message or f"libfusedrnn.so: file {problem}" in message


def test_the_binary_knows_its_version():
    assert sys.modules["fusedrnn_C"].__version__ == fusedrnn.__version__


# The command.


def test_console_script_and_version(capsys):
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="fusedrnn")
    assert script.load() is main
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"fusedrnn {fusedrnn.__version__}\n"


# Each form of an installation, from a clone and from elsewhere.

# The first line of what this prints says where the sources are, the second where the binary is.
PROGRAM = """
import sys, torch, fusedrnn
print(fusedrnn.__file__, sys.modules["fusedrnn_C"].__file__, sep="\\n")
plain = torch.nn.GRU(5, 33, 2)
x = torch.randn(7, 3, 5)
expected = plain(x)[0]
fusedrnn.swap(plain)
assert torch.allclose(plain(x)[0], expected, atol=1e-5)
"""


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def take_objects(folder: Path) -> Path:
    """Compiled objects from here, so that a build there has less to compile; returns `folder`."""
    if (ROOT / "build/ninja").exists():
        shutil.copytree(ROOT / "build/ninja", folder / "build/ninja")
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The sources as a fresh clone has them."""
    no = ".git build dist .venv *.so *.egg-info __pycache__ .*_cache .hypothesis".split()
    folder = tmp_path_factory.mktemp("clone") / "fusedrnn"
    return take_objects(shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*no)))


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """Links to all that is installed here, but for fusedrnn."""
    folder = tmp_path_factory.mktemp("packages")
    for path in sys.path:
        if Path(path).name not in ("site-packages", "dist-packages"):
            continue
        for entry in Path(path).iterdir():
            ours = entry.name.startswith(("fusedrnn", "__editable__")) or entry.suffix == ".pth"
            if not ours and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def python(packages, tmp_path_factory):
    """Makes a virtual environment with these packages; returns its interpreter."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("venv")
        venv.create(folder)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "packages.pth").write_text(f"{packages}\n")
        return folder / "bin/python"

    return make


PIP = ("-m", "pip", "--no-input", "--disable-pip-version-check", "--no-cache-dir")
INSTALL = (*PIP, "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")


@pytest.fixture(scope="module")
def sdist(clone, python, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(python(), "setup.py", "--quiet", "sdist", "--dist-dir", folder, cwd=clone)
    shutil.rmtree(clone / "fusedrnn.egg-info")
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return source


@pytest.fixture(scope="module")
def wheel(clone, python, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(python(), *PIP, "wheel", *options, clone, cwd=folder, FUSEDRNN_CUDA="0")
    (file,) = folder.iterdir()
    return file


def files_of(root: Path, *folders: str) -> set[str]:
    found = [path for folder in folders for path in (root / folder).rglob("*") if path.is_file()]
    return {p.relative_to(root).as_posix() for p in found if p.parent.name != "__pycache__"}


@pytest.mark.slow
def test_wheel_holds_the_package_and_its_binary(clone, wheel):
    info = f"fusedrnn-{fusedrnn.__version__}.dist-info/"
    names = {n for n in zipfile.ZipFile(wheel).namelist() if not n.startswith(info)}
    assert names == files_of(clone, "fusedrnn") | {"fusedrnn_C.abi3.so", "libfusedrnn.so"}


@pytest.mark.slow
def test_sdist_holds_what_building_and_testing_need(clone, unpacked):
    folders = "fusedrnn csrc tests benchmarks docs".split()
    expected = {f for f in files_of(clone, *folders) if not f.startswith("benchmarks/results/")}
    assert files_of(unpacked, *folders) == expected
    top = {path.name for path in unpacked.iterdir()}
    assert top >= {"setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"}


@pytest.fixture(scope="module", params=["plain", "editable", "wheel", "sdist"])
def installed(request, clone, python) -> tuple[str, Path, Path]:
    """A form of installation, the interpreter that has it, and the sources at hand."""
    form, interpreter = request.param, python()
    if form in ("plain", "editable"):
        what = sources = clone
    elif form == "wheel":
        what, sources = request.getfixturevalue("wheel"), clone
    else:
        what = sources = take_objects(request.getfixturevalue("unpacked"))
    option = ["--editable"] if form == "editable" else []
    run(interpreter, *INSTALL, *option, what, cwd=clone.parent, FUSEDRNN_CUDA="0")
    yield form, interpreter, sources
    for name in ("fusedrnn_C.abi3.so", "libfusedrnn.so"):
        (clone / name).unlink(missing_ok=True)


@pytest.mark.slow
def test_what_is_imported(installed, tmp_path):
    form, interpreter, sources = installed
    (site,) = (interpreter.parent.parent / "lib").glob("python*/site-packages")
    where = sources if form == "editable" else site
    for cwd, source in ((sources, sources), (tmp_path, where)):
        package, binary = run(interpreter, "-c", PROGRAM, cwd=cwd).splitlines()
        assert Path(package) == source / "fusedrnn/__init__.py"
        assert Path(binary) == where / "fusedrnn_C.abi3.so"
    for command in ((interpreter, "-m", "fusedrnn"), (interpreter.parent / "fusedrnn",)):
        for cwd in (sources, tmp_path):
            assert run(*command, "--version", cwd=cwd) == f"fusedrnn {fusedrnn.__version__}\n"
    modules = "tests benchmarks csrc setup docs".split()
    absent = f"import importlib.util as u; print(*filter(u.find_spec, {modules}))"
    assert run(interpreter, "-c", absent, cwd=tmp_path) == "\n"


@pytest.mark.slow
@pytest.mark.parametrize("installed", ["plain", "editable", "sdist"], indirect=True)
def test_commands_run_from_the_root_of_the_sources(installed, tmp_path):
    _, interpreter, root = installed
    tiny = "demo --hidden=16 --layers=1 --batch=4 --steps=8 --epochs=1 --device=cpu".split()
    tiny += ["--max-tokens=600", f"--out={tmp_path}"]
    assert "saved" in run(interpreter, "-m", "fusedrnn", *tiny, cwd=root)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "-m", "fusedrnn")
    assert "saved" in run(interpreter, *torchrun, *tiny, cwd=root)
    benchmark = "--quick --case streaming-lstm-256 --mode inference --threads=1 --device=cpu"
    options = [*benchmark.split(), "--seconds=0.01", f"--out={tmp_path / 'out.json'}"]
    assert "streaming-lstm-256x2" in run(interpreter, "-m", "benchmarks", *options, cwd=root)
    pytest_script = tmp_path / "pytest"  # not `-m`, which would put the clone on the path
    pytest_script.write_text("import sys, pytest\nsys.exit(pytest.console_main())\n")
    few = "reference benchmarks_report docs cpu_plan".split()
    tests = [*(f"tests/test_{name}.py" for name in few), "-k", "not examples"]
    assert " passed" in run(interpreter, pytest_script, "-q", *tests, cwd=root)


@pytest.mark.slow
def test_sources_that_are_not_installed_say_so(clone, python):
    command = [python(), "-m", "fusedrnn", "info"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert done.returncode == 1
    assert "fusedrnn is not compiled; run `pip install .`" in done.stderr.splitlines()[-1]
