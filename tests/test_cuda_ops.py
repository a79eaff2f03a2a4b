"""The ops' CUDA side, run on CPU tensors with every launch emulated: numbers, buffers, checks.

The same sources, called by the same modules and autograd; only the launches and the GPU's own ATen
are played. What a GPU alone can tell is in test_gpu.py.
"""

from __future__ import annotations

import copy

import pytest
import test_numbers
import test_ops
import torch
from cases import CELLS, DTYPES, make_pair, random_state, run
from emulator.ops import instead_of_cpu, load
from torch.nn.utils.rnn import pack_padded_sequence

from fusedrnn import ops, reference

BACKENDS = {"stepwise": DTYPES, "grid": DTYPES[1:], "cluster": DTYPES[1:]}


def takes(backend: str, cell: str) -> bool:
    return backend == "stepwise" or cell != "lstm-proj"


# What one backend does not take, the planner gives another: see test_cuda_plan.py.
RUNS = pytest.mark.parametrize(
    "backend, cell", [(b, c) for b in BACKENDS for c in CELLS if takes(b, c)], indirect=["backend"]
)


@pytest.fixture
def backend(request, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_PLAN", request.param)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with instead_of_cpu(seed=1):
        yield request.param


@pytest.fixture
def exact_products():
    """Products go through float64, as where torch permits TF32 for them alone.

    The CPU's float32 product over all steps adds in one order, which costs more digits than
    torch.nn's product a step; it is no part of what runs on a GPU.
    """
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def filled():
    """Every buffer starts as NaN, those inside the op too."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# T, B, input_size, hidden_size, layers, bidirectional, bias, batch_first, states
SHAPES = [
    (1, 1, 1, 1, 1, False, True, False, True),
    (5, 3, 4, 5, 2, True, True, True, False),
    (4, 33, 1, 7, 1, True, False, False, True),
    (3, 2, 3, 33, 3, False, True, False, True),
    (2, 5, 33, 257, 1, False, False, True, False),
]


@pytest.mark.usefixtures("filled", "exact_products")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s[:5])))
@RUNS
def test_matches_torch(backend, cell, shape):
    T, B, inputs, hidden, layers, bidirectional, bias, batch_first, states = shape
    for dtype in BACKENDS[backend]:
        plain, fused = make_pair(
            cell, inputs, hidden, num_layers=layers, bidirectional=bidirectional, bias=bias,
            batch_first=batch_first, dtype=dtype,
        )  # fmt: skip
        x = torch.randn(*(B, T) if batch_first else (T, B), inputs).to(dtype)
        test_numbers.compare(plain, fused, x, random_state(plain, B) if states else None)


@pytest.mark.usefixtures("filled", "exact_products")
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("states", [False, True])
@RUNS
def test_packed(backend, cell, states, bidirectional):
    dtype = BACKENDS[backend][0 if states else 1]
    plain, fused = make_pair(cell, 3, 9, num_layers=2, bidirectional=bidirectional, dtype=dtype)
    lengths = torch.tensor([2, 5, 1, 5, 3])
    packed = pack_padded_sequence(torch.randn(5, 5, 3).to(dtype), lengths, enforce_sorted=False)
    test_numbers.compare(plain, fused, packed, random_state(plain, 5) if states else None)


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("kind", test_ops.KINDS)
@RUNS
def test_computes_what_is_asked_for(backend, cell, kind):
    """Each gradient alone has the bits that it has among all."""
    dtype = BACKENDS[backend][0]
    full = test_ops.backward_arguments(cell=cell, kind=kind, mask=True, dtype=dtype)
    dx, dhx, dcx, dweights = load().backward(*full.values())
    complete = [dx, dhx, dcx, *dweights]
    for i in range(test_ops.KINDS.index(kind), len(complete), 3):  # each at one of the kinds
        needs = [j == i and asked for j, asked in enumerate(full["needs"])]
        dx, dhx, dcx, dweights = load().backward(*(full | {"needs": needs}).values())
        for j, grad in enumerate([dx, dhx, dcx, *dweights]):
            assert torch.equal(grad, complete[j]) if needs[j] else grad.numel() == 0


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("call", test_ops.CALLS)
@RUNS
def test_shapes_are_those_of_the_fakes(backend, cell, call):
    variation = {"dtype": BACKENDS[backend][0], **test_ops.CALLS[call]}
    forward = tuple(test_ops.arguments(cell, **variation).values())
    backward = tuple(test_ops.backward_arguments(cell=cell, **variation).values())
    for op, arguments in ((ops.forward, forward), (ops.backward, backward)):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("kind", test_ops.KINDS)
@RUNS
def test_dropout_between_layers(backend, cell, kind):
    """Of layers in one direction, which a launch may run together."""
    dtype, lengths = BACKENDS[backend][0], torch.tensor([5, 4, 4, 2, 1])
    _, module = make_pair(cell, 3, 10, num_layers=3, dtype=dtype)
    config = module._config()
    packed = pack_padded_sequence(torch.randn(5, 5, 3, dtype=dtype), lengths)
    x = packed.data if kind == "packed" else torch.randn(5, 5, 3, dtype=dtype)
    mask = torch.randint(0, 2, (2, x.shape[:-1].numel(), config.out_size)).byte()
    hx, cx, *_ = (*random_state(module, 5), None)
    leaves = [None if t is None else t.requires_grad_() for t in (x, hx, cx, *module.parameters())]
    rest = (
        packed.batch_sizes if kind == "packed" else None, lengths if kind == "lengths" else None,
        mask, 0.5, *config,
    )  # fmt: skip
    exact_leaves = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    results = []
    for (x, hx, cx, *weights), forward, more in (
        (leaves, ops.forward, (True,)),
        (exact_leaves, reference.forward, ()),
    ):
        y, hn, cn, *_ = forward(x, hx, cx, weights, *rest, *more)
        torch.manual_seed(3)
        outputs = [y, hn, cn] if config.mode == "LSTM" else [y, hn]
        forms = [torch.randn(o.shape, dtype=torch.float64).to(o.dtype) for o in outputs]
        wanted = [t for t in (x, hx, cx, *weights) if t is not None]
        results.append([*outputs, *torch.autograd.grad(outputs, wanted, forms)])
    few = 1e-13 if dtype == torch.float64 else 1e-5
    for ours, exact in zip(*results, strict=True):
        assert (ours.double() - exact).abs().max() <= few * exact.abs().max()


@pytest.mark.parametrize("backend", ["grid", "cluster"], indirect=True)
def test_tf32_is_used_where_torch_permits_it(backend, monkeypatch):
    plain, fused = make_pair("lstm", 3, 33)
    x = torch.randn(4, 5, 3)
    exact = run(copy.deepcopy(plain).double(), x.double(), None)["output"]
    errors = {}
    for permitted in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", permitted)
        errors[permitted] = (run(fused, x, None)["output"] - exact).abs().max().item()
    assert errors[False] < 1e-6 < errors[True] < 1e-3
