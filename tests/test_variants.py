"""Each CPU instruction set in the binary that this processor has, forced by FUSEDRNN_CPU.

The choice is made once a process, so each variant has one of its own: this file is also the
program that makes all checks with the VARIANT in use, and prints what each found.
"""

import functools
import hashlib
import json
import os
import subprocess
import sys
import traceback

import pytest
import torch
from cases import CELLS, DTYPES, make_pair, random_state

import fusedrnn
from fusedrnn import _C

VARIANTS = [name for name, supported in _C.cpu_variants() if supported]
DEEP = [(40, 33, 17, 257), (9, 70, 513, 33), (3, 9, 5, 520), (10, 3, 17, 257), (1, 15, 9, 257)]
MAX_ULP = 2.0
WIDTH = 19  # of layers below: no multiple of any vector's lanes
# T, B, input_size, hidden_size; the last two take weights as they lie
SHAPES = [(5, 3, 4, 5), (3, 37, 33, 67), (27, 20, 9, 16), (1, 3, 40, 67), (2, 2, 4, 21)]


@functools.cache
def findings(variant):
    """What each of CHECKS returned for `variant`, or how it failed."""
    done = subprocess.run(
        [sys.executable, __file__, variant],
        env={**os.environ, "FUSEDRNN_CPU": variant, "FUSEDRNN_THREADS": "all"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


# The checks


def own_dtypes():
    """Those for which the variant in use has kernels of its own: a weaker one runs the rest."""
    own = {"amx": [torch.float32, torch.bfloat16], "avx512bf16": [torch.bfloat16]}
    return own.get(os.environ["FUSEDRNN_CPU"], DTYPES)


def numbers():
    """Outputs, states and gradients by the rule of test_numbers.py."""
    from test_numbers import compare

    for cell in CELLS:
        for dtype in own_dtypes():
            for T, B, width, hidden in SHAPES:
                plain, fused = make_pair(
                    cell, width, hidden, num_layers=2, bidirectional=True, dtype=dtype
                )
                x = torch.randn(T, B, width).to(dtype)
                compare(plain, fused, x, random_state(plain, B))


def layer_norm():
    """The same with layer normalisation, whose sums have code of their own."""
    from test_layer_norm import NORMED, normed, twin
    from test_numbers import compare

    for cell in NORMED:
        for dtype in own_dtypes():
            fused = normed(cell, 4, 21, num_layers=2, bidirectional=True, dtype=dtype)
            compare(twin(fused), fused, torch.randn(5, 3, 4).to(dtype), random_state(fused, 3))


def bits():
    """By dtype a digest of a result that differs with the order and the rounding of its sums."""
    found = {}
    for dtype in DTYPES:
        _, fused = make_pair("gru", 64, 128, dtype=dtype)
        x = torch.randn(20, 16, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
        y, _ = fused(x)
        found[str(dtype)] = hashlib.sha256(y.detach().double().numpy().tobytes()).hexdigest()
    return found


def points(dtype):
    """Finite numbers of every size, dense where the functions bend: (rows, WIDTH)."""
    import numpy as np

    rng = np.random.default_rng(0)
    unsigned = np.uint32 if dtype == np.float32 else np.uint64
    largest = np.array(np.finfo(dtype).max).view(unsigned)
    patterns = np.linspace(0, float(largest), 150_000).astype(unsigned).clip(0, largest)
    saturated = 110 if dtype == np.float32 else 760  # sigmoid is 0 below
    x = np.concatenate(
        [
            patterns.view(dtype),
            rng.uniform(0, 1, 50_000),
            rng.uniform(0, 12, 100_000),
            rng.uniform(0, saturated, 100_000),
            np.exp(rng.uniform(-30, 4, 50_000)),
            np.log(2) * np.arange(0, 1200, 0.5),  # where the argument's reduction changes
        ]
    ).astype(dtype)
    x = np.concatenate([x, -x])
    return x[: x.size // WIDTH * WIDTH].reshape(-1, WIDTH)


def activations(x):
    """(name, exact function's name, values as a module computes them) at the points x."""
    dtype, device = x.dtype, "cpu"
    identity, rows = torch.eye(WIDTH, dtype=dtype, device=device), len(x)
    ones, nothing = (
        torch.ones(1, rows, WIDTH, dtype=dtype),
        torch.zeros(1, rows, WIDTH, dtype=dtype),
    )

    def layer(cls, which, bias=()):
        """All weights 0 but W_ih of gate `which`, the identity; gates in `bias` are saturated."""
        made = cls(WIDTH, WIDTH, dtype=dtype)
        with torch.no_grad():
            for p in made.parameters():
                p.zero_()
            if which is not None:
                made.weight_ih_l0[which * WIDTH : (which + 1) * WIDTH] = identity
            for gate in bias:
                made.bias_ih_l0[gate * WIDTH : (gate + 1) * WIDTH] = 1000
        return made

    with torch.no_grad():
        yield "RNN: tanh", "tanh", layer(fusedrnn.RNN, 0)(x[None])[0]
        # n = tanh(0), so that h = n + z (1 - n) is z
        yield "GRU: z", "sigmoid", layer(fusedrnn.GRU, 1)(x[None], ones)[0]
        # z = sigmoid(0) and h_0 = 0: h is n / 2, which is exact
        yield "GRU: n", "tanh", 2 * layer(fusedrnn.GRU, 2)(x[None])[0]
        # g = tanh(0), so that c is f 1 + i 0
        yield "LSTM: f", "sigmoid", layer(fusedrnn.LSTM, 1)(x[None], (nothing, ones))[1][1]
        # f = o = 1 and i g = 0, so that h is tanh(c_0)
        yield (
            "LSTM: tanh(c)",
            "tanh",
            layer(fusedrnn.LSTM, None, (1, 3))(nothing, (nothing, x[None]))[0],
        )


def ulps():
    """tanh and sigmoid over the whole range, as seen through the modules.

    On tiles a product of float32 loses what is smaller than the smallest normal number.
    """
    import numpy as np

    lost = 2.0**-125 if _C.cpu_variant() == "amx" else 0.0

    for dtype, wide in ((np.float32, np.float64), (np.float64, np.longdouble)):
        x = points(dtype)
        with np.errstate(over="ignore", under="ignore"):
            exact = {"tanh": np.tanh(x.astype(wide)), "sigmoid": 1 / (1 + np.exp(-x.astype(wide)))}
        for name, function, found in activations(torch.from_numpy(x)):
            reference = exact[function]
            if name == "GRU: n":  # the last bit of a subnormal half is lost
                reference = np.where(
                    np.abs(x) < 4 * np.finfo(dtype).tiny, found[0].numpy(), reference
                )
            ulp = np.spacing(np.abs(reference).astype(dtype)).astype(wide)
            error = np.abs(found[0].numpy().astype(wide) - reference)
            error = np.maximum(error - (lost if dtype == np.float32 else 0), 0) / ulp
            worst = np.unravel_index(np.nanargmax(error), error.shape)
            # Not `error > MAX_ULP`: NaN must fail.
            assert (error <= MAX_ULP).all(), (
                f"{name} {x.dtype}: {error[worst]:.2f} ulp at {x[worst]!r}, "
                f"found {found[0].numpy()[worst]!r}, exact {reference[worst]!r}"
            )


def deep():
    """Sums long enough to be cut, tokens enough for several blocks, more rows than a task has.

    And few rows, of which W_hh is not packed, and few tokens, of which nothing is.
    """
    from test_numbers import compare

    for T, B, width, hidden in DEEP:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            plain, fused = make_pair("lstm", width, hidden, dtype=dtype)
            compare(plain, fused, torch.randn(T, B, width).to(dtype), random_state(plain, B))


def special():
    """Numbers that are not finite, or nearly so, where torch.nn has them; other rows unharmed."""
    largest = torch.finfo(torch.float32).max
    for cell in CELLS:
        if cell == "relu":
            continue  # overflows to infinities of either sign, in an order of its own
        plain, fused = make_pair(cell, 5, 20, dtype=torch.float32)
        quiet = torch.randn(12, 4, 5)
        for value in (float("inf"), float("-inf"), float("nan"), largest, -largest):
            for place in ("x", "weight_ih_l0", "weight_hh_l0"):
                if place == "weight_hh_l0" and abs(value) == largest:
                    continue  # of a state of either sign and rounding's size: chance
                x = quiet.clone()
                with torch.no_grad():
                    kept = {n: p.clone() for n, p in fused.named_parameters()}
                    if place == "x":
                        x[1, 2, 3] = value
                    else:
                        for module in (plain, fused):
                            dict(module.named_parameters())[place][7, 2] = value
                    with torch.no_grad():
                        expected, found = plain(x)[0], fused(x)[0]
                    for module in (plain, fused):
                        for n, p in module.named_parameters():
                            p.copy_(kept[n])
                torch.testing.assert_close(
                    found, expected, rtol=1e-5, atol=1e-5, equal_nan=True, msg=f"{place} {value}"
                )


def rows():
    """The same bits for every number of threads and of rows in a task, whatever a row holds."""
    for dtype in DTYPES:
        for B, value in (
            (17, 0),
            (33, 0),
            (48, 0),
            (70, 0),
            (40, float("nan")),
            (70, float("inf")),
        ):
            _, fused = make_pair("lstm", 9, 40, num_layers=2, dtype=dtype)
            x = torch.randn(6, B, 9).to(dtype)
            x[3, 0, 0] = value
            results = []
            for threads in (1, 2, 3, 5, 8):
                torch.set_num_threads(threads)
                fused.zero_grad()
                y, states = fused(x)
                y.sum().backward()
                results.append([y, *states, *(p.grad for p in fused.parameters())])
            torch.set_num_threads(1)
            for other in results[1:]:
                for a, b in zip(results[0], other, strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def quantization():
    """Weights in 8 bits and in bfloat16, which each instruction set multiplies in its own way."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # benchmarks
    from test_quantization import SHAPES, check_shapes

    check_shapes(SHAPES[:2] + SHAPES[4:])


CHECKS = {
    "numbers": numbers,
    "layer_norm": layer_norm,
    "bits": bits,
    "ulps": ulps,
    "deep": deep,
    "special": special,
    "rows": rows,
    "quantization": quantization,
}


def main(variant):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    assert _C.cpu_variant() == variant, f"{_C.cpu_variant()} was chosen, not {variant}"
    found = {}
    for name, check in CHECKS.items():
        try:
            found[name] = check()
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


# The tests


@pytest.mark.parametrize("check", [name for name in CHECKS if name != "bits"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant, check):
    if check == "ulps":
        pytest.importorskip("numpy")
    failure = findings(variant)[check]
    assert failure is None, failure


def test_variants_are_different_code():
    """Without fused multiply-add sums round otherwise: proof that not all runs used one variant."""
    pytest.importorskip("numpy")
    with_fma = [v for v in VARIANTS if v in ("avx2", "avx512", "avx512bf16", "amx")]
    if not with_fma or "baseline" not in VARIANTS:
        pytest.skip("needs baseline and a variant with fused multiply-add")
    digests = {variant: findings(variant)["bits"] for variant in ("baseline", *with_fma)}
    for dtype in ("torch.float64", "torch.float32"):
        assert all(digests[v][dtype] != digests["baseline"][dtype] for v in with_fma), digests


@pytest.mark.parametrize("variant", ["avx512bf16", "amx"])
def test_numbers_of_its_own(variant):
    """What these compute in other ways; all else they leave to avx512."""
    pytest.importorskip("numpy")
    if variant not in VARIANTS:
        pytest.skip(f"this processor lacks {variant}")
    own, plain = (findings(v)["bits"] for v in (variant, "avx512"))
    assert own.keys() == plain.keys()
    expected = {"torch.bfloat16"} | ({"torch.float32"} if variant == "amx" else set())
    assert {d for d in own if own[d] != plain[d]} == expected


def test_the_best_variant_is_the_default():
    environment = {k: v for k, v in os.environ.items() if k != "FUSEDRNN_CPU"}
    program = "import fusedrnn; print(fusedrnn._C.cpu_variant())"
    for more in ({}, {"FUSEDRNN_CPU": ""}):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment | more,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == VARIANTS[0]


UNKNOWN = """
import torch, fusedrnn
layer, x = fusedrnn.GRU(3, 4), torch.zeros(5, 2, 3)
for call in (lambda: layer(x), lambda: layer(x), fusedrnn._C.cpu_variant, fusedrnn.info):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.parametrize("name", ["sse5", "AVX2", "avx512 "])
def test_unknown_variant(name):
    """The import works, each use says what is wrong and what there is."""
    done = subprocess.run(
        [sys.executable, "-c", UNKNOWN],
        env={**os.environ, "FUSEDRNN_CPU": name},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.rstrip("\n").split("\n")
    assert len(lines) == 4
    for line in lines:
        assert f"FUSEDRNN_CPU is {name}, which this build or this processor lacks" in line
        assert line.endswith(f"choose from: {', '.join(VARIANTS)}")


if __name__ == "__main__":
    main(sys.argv[1])
