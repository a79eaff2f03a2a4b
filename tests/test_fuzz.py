"""Arguments that make no sense: every call returns or raises, and the process lives on.

The cases run in processes of their own, for what is looked for is a crash. A failure prints the
command that repeats it: this file is also the program that runs cases FIRST to LAST of a SEED.
"""

import random
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

import fusedrnn
from fusedrnn import calls, ops

MEMORY = 1 << 30  # bytes: what asks for more gets an exception
DTYPES = [torch.float32] * 6 + [
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e5m2,
]
INTEGERS = [torch.int64, torch.int64, torch.int32, torch.uint8]
NUMBERS = [-(2**63), -(2**31), -3, -1, 0, 1, 2, 3, 4, 7, 2**16, 2**31, 2**32, 2**61, 2**63 - 1]


def sizes(rng, dims=None):
    dims = rng.choice([0, 1, 2, 2, 3, 3, 3, 4]) if dims is None else dims
    return [rng.choice([0, 1, 1, 2, 3, 4, 5, 7]) for _ in range(dims)]


def fill(rng, shape, dtype):
    """A dense tensor of small or terrible numbers."""
    t = torch.randint(-3, 9, shape).to(dtype)
    if dtype.is_floating_point and t.numel() and rng.random() < 0.3:
        t = torch.full(shape, rng.choice([float("nan"), float("inf"), -1e38, 1e-40])).to(dtype)
    return t


def tensor(rng, shape=None, dtype=None):
    """Any kind of tensor, of the shape and dtype given or of random ones."""
    shape = sizes(rng) if shape is None else list(shape)
    dtype = dtype or rng.choice(DTYPES)
    kind = rng.randrange(28)
    t = fill(rng, shape, dtype)
    if kind == 0:
        t = fill(rng, [1] * len(shape), dtype).expand(shape)
    elif kind == 1 and shape:
        t = fill(rng, [2 * n for n in shape], dtype)[tuple(slice(None, None, 2) for _ in shape)]
    elif kind == 2 and len(shape) > 1:
        t = fill(rng, shape[::-1], dtype).permute(*reversed(range(len(shape))))
    elif kind == 3:
        t = t.to("meta")
    elif kind == 4:
        t = t.to_sparse()
    elif kind == 5 and (dtype.is_floating_point or dtype.is_complex):
        t = t.requires_grad_()
    elif kind == 6 and dtype.is_complex:
        t = t.conj()
    elif kind == 7:
        t = torch._efficientzerotensor(shape, dtype=dtype)
    elif kind == 8 and shape:
        huge = shape.copy()
        huge[rng.randrange(len(shape))] = rng.choice([2**14, 2**31, 2**40])
        t = fill(rng, [1] * len(shape), dtype).expand(huge)
    return t


def junk(rng):
    """Not even a tensor, or one of random shape."""
    return rng.choice(
        [
            lambda: None,
            lambda: tensor(rng),
            lambda: tensor(rng),
            lambda: tensor(rng),
            lambda: "lstm",
            lambda: [],
            lambda: [tensor(rng), tensor(rng)],
            lambda: (tensor(rng), None),
            lambda: rng.choice(NUMBERS),
            lambda: float("nan"),
            lambda: {"x": 1},
            lambda: torch.float32,
            lambda: object(),
            lambda: True,
        ]
    )()


def packed(rng, width):
    steps = rng.choice([0, 1, 3, 5])
    batch_sizes = [rng.choice([0, 1, 2, 3, -1, 2**40]) for _ in range(steps)]
    if rng.random() < 0.6:
        batch_sizes = sorted((rng.randint(1, 4) for _ in range(steps)), reverse=True)
    tokens = sum(batch_sizes) if 0 <= sum(batch_sizes) < 100 else 4
    data = tensor(rng, [tokens + (rng.random() < 0.2), width], torch.float32)
    rows = rng.choice([0, 2, batch_sizes[0] % 9 if steps else 1])
    index = [None, None, None, torch.randint(-2, 4, [rows])]
    return PackedSequence(data, torch.tensor(batch_sizes), rng.choice(index), rng.choice(index))


def fuzz_module(rng):
    """A module, most often a right one, called with arguments of which some are wrong."""
    name = rng.choice(["RNN", "GRU", "LSTM"])
    width, hidden, layers = rng.randint(1, 4), rng.randint(1, 5), rng.randint(1, 3)
    kwargs = {
        "num_layers": layers,
        "bias": rng.random() < 0.7,
        "batch_first": rng.random() < 0.5,
        "bidirectional": rng.random() < 0.5,
        "dropout": rng.choice([0.0, 0.0, 0.5, 1.0]),
    }
    if name == "LSTM" and hidden > 1 and rng.random() < 0.4:
        kwargs["proj_size"] = rng.randint(1, hidden - 1)
    if rng.random() < 0.3:
        kwargs |= {"recurrent_dropout": rng.choice([0.0, 0.5, 1.0]), "zoneout": rng.random()}
    if name != "RNN" and rng.random() < 0.3:
        kwargs["layer_norm"] = True
    module = getattr(fusedrnn, name)(width, hidden, **kwargs)
    if rng.random() < 0.2:
        parameter = rng.choice(module._flat_weights_names)
        wrong = tensor(rng)
        module.__dict__.setdefault("_parameters", {}).pop(parameter)
        setattr(module, parameter, rng.choice([wrong, None, wrong.detach()]))
    if rng.random() < 0.1:
        wrong = rng.choice([-(2**63), -1, 0, 1, 2, 3, 2**61, 2**63 - 1])
        setattr(module, rng.choice(["hidden_size", "num_layers", "proj_size"]), wrong)
    T, B = rng.choice([0, 1, 2, 3, 4, 5]), rng.choice([0, 1, 2, 5])
    x = rng.choice(
        [
            lambda: tensor(rng, [T, B, width], torch.float32),
            lambda: tensor(rng, [T, B, width], torch.float32),
            lambda: tensor(rng, [T, width], torch.float32),
            lambda: tensor(rng, rng.choice([[T], [T, B]]), rng.choice(INTEGERS)) % (width + 1),
            lambda: packed(rng, width),
            lambda: packed(rng, width),
            lambda: junk(rng),
        ]
    )()
    rows = T if kwargs["batch_first"] else B
    if isinstance(x, PackedSequence):
        rows = max(x.batch_sizes.tolist(), default=0) % 9
    batched = not isinstance(x, torch.Tensor) or x.dim() + (x.dtype in INTEGERS) == 3
    each = [rows] if batched else []
    state = [
        tensor(rng, [layers * (1 + kwargs["bidirectional"]), *each, w], torch.float32)
        for w in (module.proj_size or hidden, hidden)
    ]
    hx = rng.choice(
        [
            lambda: None,
            lambda: tuple(state) if name == "LSTM" else state[0],
            lambda: tuple(state) if name == "LSTM" else state[0],
            lambda: junk(rng),
        ]
    )()
    more = {}
    if rng.random() < (0.1 if isinstance(x, PackedSequence) else 0.4):
        more["lengths"] = rng.choice(
            [
                lambda: torch.randint(0, T + 1, [rows]),
                lambda: torch.randint(-1, 2**40, [rows]),
                lambda: tensor(rng, [rows]),
                lambda: junk(rng),
            ]
        )()
    if rng.random() < 0.2:
        more["resets"] = rng.choice(
            [junk(rng), torch.rand(x.shape[:2]) < 0.3 if isinstance(x, torch.Tensor) else None]
        )
    y, *_ = module(x, hx, return_all=rng.random() < 0.3, **more)
    y = y.data if isinstance(y, PackedSequence) else y
    if y.requires_grad:
        y.float().sum().backward()


def call_of(rng):
    """Right arguments of the forward op, by name; the sizes are sometimes huge and expanded."""
    dims = [0, 1, 2, 3, 5]
    huge = rng.random() < 0.15
    T = rng.choice([0, 1, 2, 2**16] if huge else dims)
    B = rng.choice([0, 1, 2, 2**31, 2**40] if huge else dims)
    width, hidden = (rng.choice([1, 2, 2**20, 2**31] if huge else dims[1:]) for _ in range(2))
    mode, gates = rng.choice([("RNN_TANH", 1), ("RNN_RELU", 1), ("GRU", 3), ("LSTM", 4)])
    layers, directions, bias = rng.choice([1, 1, 2, 3]), rng.choice([1, 2]), rng.random() < 0.7
    proj = rng.randrange(hidden) if mode == "LSTM" and rng.random() < 0.3 else 0
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    out = proj or hidden

    def make(*shape, of=dtype):
        if huge:
            return torch.ones([1] * len(shape), dtype=of).expand(shape)
        return torch.randn(shape).to(of)

    weights, normed = [], gates > 1 and rng.random() < 0.3
    for layer in range(layers):
        for _ in range(directions):
            weights += [make(gates * hidden, width if layer == 0 else directions * out)]
            weights += [make(gates * hidden, out)]
            weights += [make(gates * hidden), make(gates * hidden)] if bias else []
            weights += [make(proj, hidden)] if proj else []
            weights += [make(gates * hidden), make(gates * hidden)] if normed else []
            weights += [make(hidden), make(hidden)] if normed and mode == "LSTM" else []
    states, lstm = rng.random() < 0.6, mode == "LSTM"
    batch_sizes = None
    x = None
    if not huge and T and rng.random() < 0.4:
        B = max(B, 1)
        counts = sorted((rng.randint(1, B) for _ in range(T)), reverse=True)
        B, batch_sizes = counts[0], torch.tensor(counts)
        x = make(sum(counts), width)
    tokens = len(x) if x is not None else T * B
    ids_shape, zoned = (tokens,) if x is not None else (T, B), rng.random() < 0.2
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if rng.random() < 0.2:  # integers, of which few are out of range
        ids = torch.randint(0, min(width, 2**40), [1] if huge else [tokens])
        if rng.random() < 0.2:
            ids = ids + rng.choice([width, -1, 2**62])
        x = ids.expand(tokens) if x is not None else ids.view([1] * 2 if huge else [T, B])
        x = x.expand(T, B) if huge else x
    return {
        "x": make(T, B, width) if x is None else x,
        "hx": make(layers * directions, B, out) if states else None,
        "cx": make(layers * directions, B, hidden) if states and lstm else None,
        "weights": weights,
        "batch_sizes": batch_sizes,
        "lengths": torch.randint(0, T + 1, [B])
        if batch_sizes is None and not huge and rng.random() < 0.4
        else None,
        "mask": make(layers - 1, tokens, directions * out, of=torch.uint8)
        if rng.random() < 0.2
        else None,
        "resets": make(*ids_shape, of=torch.bool) if rng.random() < 0.2 else None,
        "h_mask": make(layers * directions, B, out, of=wide) if rng.random() < 0.2 else None,
        "zone_h": make(layers * directions, tokens, out, of=torch.uint8)
        if zoned and rng.random() < 0.5
        else None,
        "zone_c": make(layers * directions, tokens, hidden, of=torch.uint8)
        if zoned and lstm and rng.random() < 0.5
        else None,
        "dropout": rng.choice([0.0, 0.5, 1.0]),
        "mode": mode,
        "hidden_size": hidden,
        "proj_size": proj,
        "num_layers": layers,
        "bias": bias,
        "bidirectional": directions == 2,
        "zoneout_h": 0.5 if zoned else 0.0,
        "zoneout_c": 0.5 if zoned and lstm else 0.0,
        "all_states": rng.random() < 0.3,
        "layer_norm": normed,
        "save": rng.random() < 0.7,
    }


def spoil(rng, value):
    """`value` made wrong, a little or beyond recognition."""
    if rng.random() < 0.2:
        return junk(rng)
    if isinstance(value, torch.Tensor):
        shape = list(value.shape)
        if shape and rng.random() < 0.5:
            shape[rng.randrange(len(shape))] = rng.choice([0, 1, 2, 5, 6])
        if max(shape, default=0) > 100:
            return value[..., :0]
        return tensor(rng, shape, rng.choice([value.dtype, value.dtype, rng.choice(DTYPES)]))
    if isinstance(value, list):
        if not value:
            return [junk(rng)]
        i = rng.randrange(len(value))
        return rng.choice(
            [
                lambda: [*value[:i], spoil(rng, value[i]), *value[i + 1 :]],
                lambda: value[:i],
                lambda: value + value,
                lambda: value[::-1],
            ]
        )()
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(NUMBERS)
    if isinstance(value, float):
        return rng.choice([-1.0, 2.0, float("nan"), float("inf"), 1.0])
    if isinstance(value, str):
        return rng.choice(["", "GRU", "LSTM", "RNN_RELU", "gru", "x" * 10_000, "\0", "\N{SNOWMAN}"])
    return junk(rng)


def fuzz_ops(rng):
    """forward with some arguments spoiled, or backward from a right forward, spoiled as well."""
    call = call_of(rng)
    if rng.random() < 0.5:
        for _ in range(rng.choice([0, 1, 1, 2, 4])):
            name = rng.choice(list(call))
            call[name] = spoil(rng, call[name])
        if rng.random() < 0.2:
            ops.infer(
                *(call[name] for name in ("x", "hx", "cx", "weights", *calls.Config._fields[:6]))
            )
        y, *_ = ops.forward(*call.values())
        if y.requires_grad:
            y.float().sum().backward()
        return
    y, hn, cn, *made = ops.forward(*(call | {"save": True}).values())
    del call["save"]
    given = [call["x"], call["hx"], call["cx"], *call["weights"]]
    call = {
        "grad_y": rng.choice([torch.randn_like(y), None]),
        "grad_hn": rng.choice([torch.randn_like(hn), None]),
        "grad_cn": rng.choice([torch.randn_like(cn), None]) if cn.numel() else None,
        "grad_hs": rng.choice([torch.randn_like(made[1]), None]),
        "grad_cs": rng.choice([torch.randn_like(made[2]), None]),
        "y": y,
        **dict(zip(("reserve", "hs", "cs"), made, strict=True)),
        "needs": [rng.random() < 0.8 for _ in given],
        "members": rng.choice([0, 0, 1, 2, call["x"].shape[-2]]),
        **call,
    }
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        name = rng.choice(list(call))
        call[name] = spoil(rng, call[name])
    ops.backward(*call.values())


def known_result():
    """Of a call that has nothing to do with the others, unless they wrote where they must not."""
    torch.manual_seed(0)
    module = fusedrnn.LSTM(5, 6, 2, bidirectional=True)
    y, _ = module(torch.randn(4, 3, 5))
    y.sum().backward()
    return [y, *(p.grad for p in module.parameters())]


def main(seed, first, last):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    expected = known_result()
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    returned = 0
    for case in range(first, last):
        print(case, flush=True)  # the last line is the case that crashed
        rng = random.Random(f"{seed} {case}")
        torch.manual_seed(case)
        try:
            rng.choice([fuzz_module, fuzz_ops])(rng)
            returned += 1
        except Exception:
            pass
        if case % 100 == 0:
            assert all(map(torch.equal, known_result(), expected)), "memory was overwritten"
    print(f"{returned} of {last - first} returned", flush=True)


def run_cases(seed, count, seconds):
    command = [sys.executable, __file__, str(seed), "0", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    last = (done.stdout.split("\n")[-2:] or [""])[0]
    repeat = f"python tests/test_fuzz.py {seed} {last} {int(last) + 1 if last.isdigit() else count}"
    assert done.returncode == 0, f"{repeat}\nexit status {done.returncode}\n{done.stderr[-2000:]}"
    # Neither are all calls wrong, nor all right: both would test little.
    returned = int(last.split()[0])
    assert 0.1 * count < returned < 0.9 * count, last


@pytest.mark.parametrize("seed", range(3))
def test_no_argument_crashes(seed):
    run_cases(seed, 700, seconds=120)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 103))
def test_no_argument_crashes_for_long(seed):
    run_cases(seed, 10_000, seconds=600)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
