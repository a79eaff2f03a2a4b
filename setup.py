"""Builds the ops, `libfusedrnn.so`, for every torch >= 2.10, GPU or not, and beside it the module
`fusedrnn_C`, which loads them in every CPython >= 3.10.

The C++ is always compiled, the CUDA sources whenever nvcc is found. The environment decides:

  FUSEDRNN_CUDA=0|1       leave CUDA out | fail where there is no nvcc
  FUSEDRNN_CUDA_ARCHS     GPU architectures in place of the default ones, e.g. "8.0;9.0;12.0+PTX"
  TORCH_CUDA_ARCH_LIST    the same for all extensions of torch, where the one above is not set
  CUDA_HOME, CUDA_PATH    where nvcc is looked for before PATH and /usr/local/cuda
  CXX (or CC), CXXFLAGS, NVCCFLAGS, LDFLAGS, MAX_JOBS    have their usual meaning

Ninja compiles: in parallel, and only what changed. torch is found but not imported: that is slow.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = Path("build/ninja")  # relative to ROOT, like every path in build.ninja
LIBRARY = BUILD / "libfusedrnn.so"
BINARY = BUILD / "fusedrnn_C.abi3.so"
KERNELS = Path("csrc/cpu/kernels.cpp")
DEVICE = Path("csrc/cuda/device.cpp")  # C++, but nvcc knows where the headers of CUDA are
VERSIONED = ("library.cpp", "module.cpp")  # which are told the version
VERSION = re.findall(r'"(.+)"', (ROOT / "fusedrnn/_version.py").read_text())[0]

MIN_TORCH = (2, 10)  # the first release whose stable ABI has all that csrc/torch calls
MIN_NVCC = (12, 4)  # C++20 and sm_90a came with 12.0, but before 12.4 nvcc refuses g++ 13
MIN_ARCH = (7, 5)
ARCHS = ("7.5", "8.0", "9.0", "10.0", "12.0")  # code for 8.0 runs on 8.6 and 8.9 too
# nvcc makes PTX, which takes longest, and from it machine code for each GPU. The kernels tell only
# these GPUs apart (__CUDA_ARCH__): the PTX of the newest that is no newer than a GPU will do.
# Kernels of clusters, in files of their own, use what came with 9.0; no other kernel does.
PTX = ("7.5", "8.0")
CLUSTER_PTX = ("9.0",)

AVX512 = "-march=x86-64-v4 -mprefer-vector-width=512"
# KERNELS is compiled once with each of these. They are linked in this order, weakest first: of an
# inline function that several objects carry the linker keeps the first, and it must not be one with
# instructions that the CPU at hand may lack. Baseline's vectors are short enough for -O1.
ISAS = {
    "x86_64": {
        "baseline": "-O1",
        "avx2": "-march=x86-64-v3",
        "avx512": AVX512,
        "avx512bf16": f"{AVX512} -mavx512bf16 -mavx512vnni",
        "amx": f"{AVX512} -mavx512bf16 -mavx512vnni -mamx-tile -mamx-bf16 -mamx-int8",
    },
    "aarch64": {
        "neon": "",
    },
}.get(platform.machine(), {"baseline": ""})

# -O3 takes half as long again to compile, for kernels that are no faster (measured on x86-64).
CXX_FLAGS = (
    "-std=c++20 -O2 -fpeel-loops -DNDEBUG -fPIC -fvisibility=hidden -ffp-contract=fast"
    " -Wall -Wextra"
)
NVCC_FLAGS = (
    "-std=c++20 -O3 -DNDEBUG --expt-relaxed-constexpr"
    " -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v"
)
TORCH_LIST = "TORCH_CUDA_ARCH_LIST"
OUTPUTS = "-MD -MF $out.d -c $in -o $out"
# The oldest torch and Python whose interfaces are used: newer ones load the binary, older may not.
TORCH_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
PYTHON_ABI = "-DPy_LIMITED_API=0x030a0000"
# Where torch has CUDA, libtorch.so leads to libtorch_cuda.so and so to the symbols that csrc/torch
# declares weak. Nothing refers to libtorch.so itself, so the linker has to be told to keep it.
TORCH_LIBS = "-ltorch_cpu -lc10 -Wl,--no-as-needed,-ltorch,--as-needed"


def fail(message: str) -> NoReturn:
    """Ends the build with one sentence: a SystemExit comes out of pip without a traceback."""
    raise SystemExit(f"fusedrnn: {message}")


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def at_least(found: str, needed: tuple[int, ...]) -> bool:
    return numbers(found) >= needed


def check_python() -> None:
    if sys.platform != "linux":
        fail(f"only Linux is supported for now, and this is {sys.platform}.")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        fail("free-threaded Python has no stable ABI to build for; use the ordinary one.")
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        fail(f"there is no Python.h in {include}; install the package python3-dev (or -devel).")


def find_torch() -> Path:
    """The folder of the installed torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        fail("building needs torch >= 2.10 and finds none; install it first.")
    found = importlib.metadata.version("torch")
    if not at_least(found, MIN_TORCH):
        fail(f"building needs torch >= 2.10 and finds {found} at {spec.origin}; upgrade it.")
    return Path(spec.origin).parent


def find_cxx() -> list[str]:
    """The C++ compiler as words of a command, tried on what the sources ask of it."""
    names = {"gcc": "g++", "cc": "c++", "clang": "clang++"}
    cxx = os.environ.get("CXX") or re.sub(  # CC=/usr/bin/gcc-12 means /usr/bin/g++-12
        r"\b(gcc|cc|clang)(?=(-\d+)?(\s|$))", lambda m: names[m[1]], os.environ.get("CC", "")
    )
    words = shlex.split(cxx) or [next(filter(shutil.which, names.values()), "g++")]
    test = f"-std=c++20 {' '.join(ISAS.values())} -fsyntax-only -xc++ {os.devnull}"
    try:
        run = subprocess.run([*words, *test.split()], capture_output=True, text=True)
        problem = run.stderr.split("\n")[0] or f"status {run.returncode}"
        works = run.returncode == 0
    except OSError as error:
        works, problem = False, str(error.strerror)
    if not works:
        fail(
            f"building needs g++ >= 11 or clang++ >= 12, and '{shlex.join(words)}' cannot be used"
            f" ({problem}); install one, or name it in CXX."
        )
    return words


def find_ninja() -> str:
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    return shutil.which("ninja", path=path) or fail(
        "building needs ninja and finds none; pip install it."
    )


def find_nvcc() -> str | None:
    """The nvcc to compile with, None to leave CUDA out."""
    env = os.environ
    wanted = env.get("FUSEDRNN_CUDA", "")
    if wanted not in ("", "0", "1"):
        fail(f"FUSEDRNN_CUDA is '{wanted}'; set it to 0 (no CUDA) or 1 (CUDA), or not at all.")
    if wanted == "0":
        return None
    folders = [f"{env[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)]
    path = os.pathsep.join([*folders, env.get("PATH", os.defpath), "/usr/local/cuda/bin"])
    nvcc = shutil.which("nvcc", path=path)
    if nvcc:
        check_nvcc(nvcc, ask_nvcc(nvcc, "--version"))
    elif wanted:
        fail("FUSEDRNN_CUDA=1 needs nvcc and finds none; set CUDA_HOME to the CUDA toolkit.")
    return nvcc


def ask_nvcc(nvcc: str, option: str) -> str:
    return subprocess.run([nvcc, option], capture_output=True, text=True).stdout


def check_nvcc(nvcc: str, banner: str) -> None:
    """`banner` is what `nvcc --version` prints."""
    release = re.search(r"release (\d+\.\d+)", banner)
    found = release[1] if release else "of unknown version"
    if not at_least(found, MIN_NVCC):
        fail(
            f"the CUDA sources need nvcc >= 12.4, and {nvcc} is {found}; set CUDA_HOME to a newer"
            " toolkit, or FUSEDRNN_CUDA=0 to leave CUDA out."
        )


def select_archs(listing: str, asked: str) -> list[str]:
    """The GPU architectures to compile for; `listing` is what `nvcc --list-gpu-arch` prints.

    "+PTX" adds, as in torch's lists, code that the driver of a newer GPU can compile further.
    """
    known = set(re.findall(r"compute_(\d+)", listing))
    archs = re.findall(r"[^\s,;]+", asked)
    for arch in archs:
        form = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", arch)
        if not form or form[1] + form[2] not in known:
            names = ", ".join(f"{int(number) / 10}" for number in sorted(known, key=int))
            fail(f"FUSEDRNN_CUDA_ARCHS has '{arch}', and this nvcc knows {names or 'none'}.")
    if archs:
        return archs
    archs = [arch for arch in ARCHS if arch.replace(".", "") in known]
    return [*archs[:-1], f"{archs[-1]}+PTX"]


def torch_archs(listed: str) -> str:
    """TORCH_CUDA_ARCH_LIST as FUSEDRNN_CUDA_ARCHS: without what is older than our kernels."""
    archs = re.findall(r"\d+\.\d[af]?(?:\+PTX)?", listed)
    return ";".join(arch for arch in archs if at_least(arch, MIN_ARCH))


def gencode(archs: Sequence[str], ptx: Sequence[str]) -> list[str]:
    """nvcc's options for the GPUs in `archs`, by way of PTX for the ones in `ptx`, oldest first.

    GPUs older than that get no code; if all are, kernels are empty, for one of them. With "+PTX"
    the binary keeps all PTX that newer GPUs tell apart.
    """
    codes: dict[str, list[str]] = {}
    for arch in archs:
        name = arch.removesuffix("+PTX")
        older = [p for p in ptx if at_least(name, numbers(p))]
        if older:  # what is for one kind of GPU, "9.0a", has PTX of that kind
            made = name if name[-1] in "af" else older[-1]
            codes.setdefault(made, []).append(f"sm_{name}")
        if arch != name:
            for p in ptx[max(len(older) - 1, 0) :]:
                codes.setdefault(p, []).append(f"compute_{p}")
    if not codes:
        name = archs[0].removesuffix("+PTX")
        codes = {name: [f"sm_{name}"]}
    options = [
        f"-gencode=arch=compute_{made},code=[{','.join(dict.fromkeys(names))}]"
        for made, names in codes.items()
    ]
    return [option.replace(".", "") for option in options]


def ninja_file(torch: Path, cxx: list[str], nvcc: str | None) -> str:
    """build.ninja for the sources now in csrc/."""

    def sources(pattern: str) -> list[Path]:
        return sorted(path.relative_to(ROOT) for path in ROOT.glob(f"csrc/{pattern}"))

    def words(*args: object) -> str:
        return shlex.join(map(str, args)).replace("$", "$$")

    def user(variable: str) -> str:
        return os.environ.get(variable, "").replace("$", "$$")

    defines = [f"-DFUSEDRNN_HAVE_{isa}=1" for isa in ISAS]
    linker = compiler = words(*cxx)
    rules = {"cxx": f"{compiler} {CXX_FLAGS} -Icsrc $flags {user('CXXFLAGS')} {OUTPUTS}"}
    cuda = sources("cuda/**/*.cu") if nvcc else []
    cuda_host = sources("cuda/**/*.cpp") if nvcc else []
    codes: dict[Path, str] = {}  # GPU architectures of each source
    if nvcc and cuda:
        listing = ask_nvcc(nvcc, "--list-gpu-arch")
        asked = os.environ.get("FUSEDRNN_CUDA_ARCHS", "")
        archs = select_archs(listing, asked or torch_archs(os.environ.get(TORCH_LIST, "")))
        print(
            f"fusedrnn: CUDA kernels for {' '.join(archs)}: minutes of processor time;"
            " FUSEDRNN_CUDA=0 leaves them out, FUSEDRNN_CUDA_ARCHS=9.0 compiles for one GPU"
        )
        defines += ["-DFUSEDRNN_WITH_CUDA=1", f'-DFUSEDRNN_CUDA_ARCHS="{";".join(archs)}"']
        host = next(word for word in reversed(cxx) if word[0] != "-")  # CXX may be "ccache g++"
        compiler = words(nvcc, "-ccbin", host)
        flags = f"{NVCC_FLAGS} $flags -Icsrc {user('NVCCFLAGS')}"
        for source in cuda:
            clusters = source.name.startswith("cluster_")
            codes[source] = words(*gencode(archs, CLUSTER_PTX if clusters else PTX))
        # Registers and spills of each kernel go to a log beside its object, all else is shown.
        rules["nvcc"] = (
            f"{compiler} {flags} {OUTPUTS} > $out.log 2>&1; status=$$?;"
            " grep -v -e '^ptxas info' -e '^ .* bytes stack frame' $out.log; exit $$status"
        )
        # nvcc links what it compiled, for it alone knows where its static runtime is.
        linker = f"{compiler} -forward-unknown-to-host-compiler"

    steps = []  # (rule, source, what tells its object from others of that source, flags)
    # First what takes longest, so that the rest fills the gaps. Of the kernels the weakest come
    # last, for objects are linked in the reverse order.
    for isa, isa_flags in reversed(ISAS.items()):
        steps.append(("cxx", KERNELS, f".{isa}", f"-DFUSEDRNN_ISA={isa} {isa_flags}"))
    # Only csrc/torch is told where torch is, only csrc/python where Python is.
    headers = {
        "torch": f"{TORCH_ABI} {words('-isystem', torch / 'include')}",
        "python": f"{PYTHON_ABI} {words('-isystem', sysconfig.get_path('include'))}",
    }
    for folder, where in headers.items():
        for source in sources(f"{folder}/*.cpp"):
            if source.name.startswith("cuda") and not cuda:
                continue
            version = [f'-DFUSEDRNN_VERSION="{VERSION}"'] if source.name in VERSIONED else []
            steps.append(("cxx", source, "", f"{where} {words(*defines, *version)}"))
    for source in sources("plan/*.cpp") + sources("cpu/**/*.cpp") + cuda_host:
        if source not in (KERNELS, DEVICE):
            steps.append(("cxx", source, "", words(*defines)))
    for source in [*cuda, *(source for source in cuda_host if source == DEVICE)]:
        steps.append(("nvcc", source, "", codes.get(source, "")))

    lines = [f"builddir = {BUILD}"]
    for rule, command in rules.items():
        lines += [f"rule {rule}", f"  command = {command}", "  description = $out"]
        lines += ["  depfile = $out.d", "  deps = gcc"]
    for rule, command in (("link", linker), ("link_module", words(*cxx))):
        lines += [
            f"rule {rule}",
            f"  command = {command} -shared $in -o $out {user('LDFLAGS')} $flags",
        ]
    objects: dict[bool, list[str]] = {False: [], True: []}  # whether they are Python's
    for rule, source, part, step_flags in steps:
        made = str(BUILD / source.with_suffix(f"{part}.o"))
        objects[source.parts[1] == "python"].append(made)
        lines += [f"build {made}: {rule} {source}", f"  flags = {step_flags}"]
    objects[False].reverse()  # the weakest first
    lines += [f"build {LIBRARY}: link {' '.join(objects[False])}"]
    lines += [f"  flags = {words('-L', torch / 'lib', f'-Wl,-soname,{LIBRARY.name}')} {TORCH_LIBS}"]
    lines += [f"build {BINARY}: link_module {' '.join(objects[True])} {LIBRARY}"]
    lines += [f"  flags = {words('-Wl,-rpath,$ORIGIN')}", ""]
    return "\n".join(lines)


class BuildExt(build_ext):
    """Has ninja build the library of the ops and the extension module."""

    def get_ext_filename(self, fullname: str) -> str:
        return LIBRARY.name if fullname == LIBRARY.stem else super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        check_python()
        torch, cxx, nvcc = find_torch(), find_cxx(), find_nvcc()
        print(f"fusedrnn: torch in {torch}, {' '.join(cxx)}, {nvcc or 'no nvcc, for CPUs only'}")
        file = ROOT / BUILD / "build.ninja"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(ninja_file(torch, cxx, nvcc))
        jobs = os.environ.get("MAX_JOBS")
        command = [find_ninja(), "-f", str(BUILD / "build.ninja"), *([f"-j{jobs}"] if jobs else [])]
        if subprocess.run(command, cwd=ROOT).returncode:
            fail("the compilation failed; the compiler's messages are above.")
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        self.mkpath(str(target.parent))
        self.copy_file(str(ROOT / BUILD / target.name), str(target))
        # An editable install leaves a copy in ROOT, which is found first there: keep it current.
        if (ROOT / target.name).exists():
            self.copy_file(str(ROOT / BUILD / target.name), str(ROOT / target.name))


if __name__ == "__main__":  # the tests import this file
    setup(
        ext_modules=[
            Extension(binary.name.partition(".")[0], sources=[], py_limited_api=True)
            for binary in (LIBRARY, BINARY)
        ],
        cmdclass={"build_ext": BuildExt},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
