"""The ops' CUDA side, run on CPU tensors with every launch emulated: numbers, buffers, checks.

The same sources, called by the same modules and autograd; only the launches and the GPU's own ATen
are played. What a GPU alone can tell is in test_gpu.py.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import test_batching
import test_numbers
import test_one_hot
import test_ops
import torch
from cases import CELLS, DTYPES, make_pair, random_state, run
from compiling import ROOT, setup_script
from emulator import build
from emulator import ops as emulated
from emulator.ops import instead_of_cpu, load
from torch.nn.utils.rnn import pack_padded_sequence

from fusedrnn import ops, reference

# By FUSEDRNN_PLAN. Small layers run in teams of one block, but for where there have to be several:
# those are given more units than a block has.
SEVERAL_BLOCKS = ("grid,units=8", "cluster")
BACKENDS = {"stepwise": DTYPES, "grid": DTYPES[1:], **dict.fromkeys(SEVERAL_BLOCKS, DTYPES[1:])}


def takes(backend: str, cell: str) -> bool:
    return backend == "stepwise" or cell != "lstm-proj"


# What one backend does not take, the planner gives another: see test_cuda_plan.py.
RUNS = pytest.mark.parametrize(
    "backend, cell", [(b, c) for b in BACKENDS for c in CELLS if takes(b, c)], indirect=["backend"]
)


@pytest.fixture
def backend(request, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_PLAN", request.param)
    if request.param in SEVERAL_BLOCKS:
        monkeypatch.setattr(test_ops, "HIDDEN", 9)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with instead_of_cpu(seed=1):
        yield request.param


@pytest.fixture
def stepwise(monkeypatch):
    """For what all backends share: the backend that takes everything."""
    monkeypatch.setenv("FUSEDRNN_PLAN", "stepwise")
    with instead_of_cpu(seed=1):
        yield


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
    hidden += 8 if backend in SEVERAL_BLOCKS else 0
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


@pytest.mark.usefixtures("filled", "stepwise")
@pytest.mark.parametrize("kind", ["padded", "lengths"])
@pytest.mark.parametrize("cell", ["gru", "lstm-proj"])
def test_members(cell, kind):
    """Gradients of weights by rows; the products are those of all backends."""
    full = test_ops.backward_arguments(cell=cell, kind=kind) | {"members": 2}
    *_, found = ops.backward(*full.values())
    for m in range(2):
        *_, expected = ops.backward(*test_batching.of_rows(full, m, 2).values())
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a[m], b)


@pytest.mark.usefixtures("filled", "stepwise")
def test_rows_of_the_input_may_lie_apart():
    """Every other row of a tensor, with lengths, whose gradients of weights read it."""
    full = test_ops.backward_arguments(cell="gru", kind="lengths")
    apart = full["x"].repeat_interleave(2, 1)[:, ::2]
    *states, dweights = ops.backward(*full.values())
    *again, others = ops.backward(*(full | {"x": apart}).values())
    for a, b in zip((*states, *dweights), (*again, *others), strict=True):
        assert torch.equal(a, b)


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
        mask, *[None] * 4, 0.5, *config,
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


@pytest.mark.parametrize("backend", list(BACKENDS)[1:], indirect=True)
def test_tf32_is_used_where_torch_permits_it(backend, monkeypatch):
    plain, fused = make_pair("lstm", 3, 33)
    x = torch.randn(4, 5, 3)
    exact = run(copy.deepcopy(plain).double(), x.double(), None)["output"]
    errors = {}
    for permitted in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", permitted)
        errors[permitted] = (run(fused, x, None)["output"] - exact).abs().max().item()
    assert errors[False] < 1e-6 < errors[True] < 1e-3


def plain_results(call, grads_out):
    """Outputs and gradients of the op's arguments by the plain implementation, and what of them
    has gradients."""
    rest = [v for name, v in call.items() if name != "save"]
    leaves = [call["x"], call["hx"], call["cx"], *call["weights"]]
    leaves = [t for t in leaves if t is not None and t.is_floating_point()]
    outputs = [t for t in reference.forward(*rest) if t.numel()]
    grads = torch.autograd.grad(outputs, leaves, grads_out[: len(outputs)])
    return [*outputs, *grads]


def fused_results(call, grads_out):
    y, hn, cn, *kept = load().forward(*call.values())  # kept: reserve, hs, cs
    leaves = [call["x"], call["hx"], call["cx"], *call["weights"]]
    needs = [t is not None and t.is_floating_point() for t in leaves]
    rest = [v for name, v in call.items() if name != "save"]
    given = [*grads_out, None][:3]
    dx, dhx, dcx, dw = load().backward(*given, None, None, y, *kept, needs, 0, *rest)
    grads = [g for g, need in zip([dx, dhx, dcx, *dw], needs, strict=True) if need]
    return [*(t for t in (y, hn, cn) if t.numel()), *grads]


def assert_near(ours, exact):
    assert len(ours) == len(exact)
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b.detach(), rtol=1e-11, atol=1e-12)


def random_gradients(cell, call):
    states = call["num_layers"] * 2
    width = call["proj_size"] or call["hidden_size"]
    shape = call["x"].shape[: 1 if call["batch_sizes"] is not None else 2]
    sizes = [(*shape, 2 * width), (states, test_ops.B, width)]
    if cell.startswith("lstm"):
        sizes.append((states, test_ops.B, call["hidden_size"]))
    return [torch.randn(size, dtype=torch.float64) for size in sizes]


@pytest.mark.usefixtures("filled", "stepwise")
@pytest.mark.parametrize("one_hot", [False, True], ids=["vectors", "integers"])
@pytest.mark.parametrize("kind", test_ops.KINDS)
@pytest.mark.parametrize("cell", CELLS)
def test_masks_lengths_and_integers(cell, kind, one_hot):
    """Against the plain implementation; what lies behind a length is NaN, and is not read."""
    call = test_ops.arguments(cell, kind=kind, mask=True, grad=True)
    shape = call["x"].shape[:-1]
    if one_hot:
        call["x"] = torch.randint(0, test_ops.INPUT, shape)
    grads_out = random_gradients(cell, call)
    exact = plain_results(call, grads_out)
    if kind == "lengths":
        behind = torch.arange(test_ops.T)[:, None] >= call["lengths"]
        call["x"] = call["x"].detach().clone()
        call["x"][behind] = -7 if one_hot else float("nan")
    with torch.no_grad():
        once = fused_results(call, grads_out)
        assert_near(once, exact)
        load().seed(2)  # another order of threads, the same bits
        for a, b in zip(once, fused_results(call, grads_out), strict=True):
            assert torch.equal(a, b)


@pytest.mark.slow  # more than 60 blocks of 256 threads
@pytest.mark.usefixtures("filled", "exact_products")
@pytest.mark.parametrize("backend", ["grid,engine=ffma_narrow,units=8,rows=2"], indirect=True)
def test_launches_take_rows_by_length(backend):
    """Of 70 slices 66 run at once, and the longest rows of all run together."""
    plain, fused = make_pair("gru", 3, 9)
    lengths = torch.randperm(140) // 8 % 3 + 1
    x = torch.randn(3, 140, 3)
    ours = run(fused, x, None, lengths=lengths)
    theirs = run(plain, pack_padded_sequence(x, lengths, enforce_sorted=False), None)
    behind = torch.arange(3)[:, None] >= lengths
    assert not ours["output"][behind].any() and not ours["grad x"][behind].any()
    torch.testing.assert_close(ours["h_n"], theirs["h_n"])
    with torch.no_grad():
        assert torch.equal(fused(x, lengths=lengths)[0], ours["output"])
        assert load().longest_way() == 0  # of the last launch, whose rows have one step
        fused(x, lengths=torch.full((140,), 3))
        assert load().longest_way() == 2


@pytest.mark.usefixtures("filled", "stepwise")
def test_sums_of_many_tokens_of_one_value():
    test_one_hot.test_many_of_one_value("gru")


@pytest.mark.usefixtures("filled", "stepwise")
@pytest.mark.parametrize("cell", CELLS)
def test_products_read_only_what_was_written(cell, monkeypatch):
    """Rows without a step too, though nothing depends on what comes out for them."""
    monkeypatch.setattr(emulated, "products_are_finite", True)
    call = test_ops.backward_arguments(cell=cell, kind="lengths", dtype=torch.bfloat16)
    load().backward(*call.values())
    assert emulated.products_are_finite


@pytest.mark.usefixtures("stepwise")
def test_values_that_cannot_be_looked_at():
    """Lengths are brought into their range; a token that is no index makes its row NaN."""
    call = test_ops.arguments("gru", kind="lengths")
    y, *_ = load().forward(*(call | {"lengths": torch.tensor([3, 0, 1, 3])}).values())
    for kind in (torch.int64, torch.int8):
        lengths = torch.tensor([99, -1, 1, 3]).to(kind)
        assert torch.equal(load().forward(*(call | {"lengths": lengths}).values())[0], y)
    call = test_ops.arguments("gru") | {"x": torch.zeros(test_ops.T, test_ops.B).long()}
    for value in (-1, test_ops.INPUT):
        call["x"][1, 2] = value
        y, *_ = load().forward(*call.values())
        assert y[:, [0, 1, 3]].isfinite().all()
        assert y[1:, 2, : test_ops.HIDDEN].isnan().all()


@pytest.mark.usefixtures("stepwise")
@pytest.mark.parametrize("steps, batch", [(0, 4), (3, 0)])
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_to_do(cell, steps, batch):
    call = test_ops.arguments(cell) | {"x": torch.randn(steps, batch, 2, dtype=torch.float64)}
    call["hx"] = call["hx"][:, :batch]
    call["cx"] = None if call["cx"] is None else call["cx"][:, :batch]
    y, hn, _, *kept = load().forward(*call.values())
    assert y.shape[:2] == (steps, batch)
    assert torch.equal(hn, call["hx"])
    del call["save"]
    needs = [True, True, call["cx"] is not None] + [True] * len(call["weights"])
    dhn = torch.randn_like(hn)
    dx, dhx, _, dw = load().backward(None, dhn, *[None] * 3, y, *kept, needs, 0, *call.values())
    assert dx.shape == call["x"].shape
    assert torch.equal(dhx, dhn)
    for grad, weight in zip(dw, call["weights"], strict=True):
        assert torch.equal(grad, torch.zeros_like(weight))


@pytest.mark.usefixtures("stepwise")
@pytest.mark.parametrize("cell", CELLS)
def test_inference_gives_the_training_output(cell):
    call = test_ops.arguments(cell, mask=True)
    trained = load().forward(*call.values())
    inferred = load().forward(*(call | {"save": False}).values())
    assert inferred[3].shape[0] == 0
    for a, b in zip(trained[:3], inferred[:3], strict=True):
        assert torch.equal(a, b)


ON_THE_DEVICE = ("overlong", "negative length")  # not looked at


@pytest.mark.usefixtures("stepwise")
@pytest.mark.parametrize("which", [name for name in test_ops.WRONG if name not in ON_THE_DEVICE])
def test_wrong_arguments(which):
    test_ops.test_wrong_arguments(which)


@pytest.mark.usefixtures("stepwise")
@pytest.mark.parametrize("which", test_ops.WRONG_BACKWARD)
def test_wrong_arguments_of_backward(which):
    test_ops.test_wrong_arguments_of_backward(which)


@pytest.mark.usefixtures("stepwise")
def test_an_unknown_plan(monkeypatch):
    monkeypatch.setenv("FUSEDRNN_PLAN", "fastest")
    with pytest.raises(RuntimeError, match="fusedrnn: FUSEDRNN_PLAN has 'fastest'"):
        load().forward(*test_ops.arguments().values())


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_a_failed_launch_names_the_plan(backend):
    call = test_ops.arguments(dtype=BACKENDS[backend][0])
    expected = load().forward(*call.values())
    for launches in (0, 1):
        load().fail_after(launches)
        name = backend.split(",")[0]
        with pytest.raises(RuntimeError, match=rf"fusedrnn: .* failed with the plan '{name}.*'"):
            load().forward(*call.values())
    load().fail_after(-1)
    assert torch.equal(load().forward(*call.values())[0], expected[0])


@pytest.fixture
def precision():
    """Sets torch's switches for float32: of recurrent layers, of products."""
    switches = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]

    def choose(*values):
        for switch, value in zip(switches, values, strict=True):
            switch.fp32_precision = value

    yield choose
    choose(*before)


@pytest.mark.usefixtures("stepwise")
def test_float32_where_tf32_is_not_permitted(precision):
    """ATen's products obey another switch than recurrent layers: then they are taken in float64."""
    call = test_ops.arguments("rnn", dtype=torch.float32)
    call["x"] = torch.randn(3, 4, 300)
    call["weights"] = [torch.randn(3, 300) if w.shape == (3, 2) else w for w in call["weights"]]

    def result(*switches):
        precision(*switches)
        return load().forward(*call.values())[0]

    plain = result("ieee", "ieee")
    assert torch.equal(result("tf32", "ieee"), plain)
    assert torch.equal(result("tf32", "tf32"), plain)  # on the CPU both are float32
    wide = result("ieee", "tf32")
    assert not torch.equal(wide, plain)
    torch.testing.assert_close(wide, plain)


# The second so large that it is split piece by piece, by rows and by depth.
@pytest.mark.usefixtures("stepwise")
@pytest.mark.parametrize(
    "inputs, hidden", [(1025, 64), pytest.param(4096, 16, marks=pytest.mark.slow)]
)
def test_large_products_where_tf32_is_permitted_to_recurrent_layers(precision, inputs, hidden):
    """Split into bfloat16: 16 bits are right, of TF32 10."""
    plain, fused = make_pair("rnn", inputs, hidden)
    with torch.no_grad():
        for layer in (plain, fused):
            layer.weight_ih_l0.mul_(0.1)
    x = torch.randn(1, 2100, inputs)
    exact = run(copy.deepcopy(plain).double(), x.double(), None)
    for switch, least, most in (("ieee", 0, 1e-6), ("tf32", 2e-6, 2e-5)):
        precision(switch, "ieee")
        found = run(fused, x, None)
        for name in ("output", "grad x", "grad weight_ih_l0"):
            error = (found[name] - exact[name]).norm() / exact[name].norm()
            assert least <= error <= most, (name, switch)


@pytest.mark.usefixtures("stepwise")
def test_a_split_product_keeps_what_is_not_finite(precision):
    _, fused = make_pair("rnn", 4096, 64)
    with torch.no_grad():
        fused.weight_ih_l0.mul_(0.1)[3, 5] = 0
        fused.weight_ih_l0[7, 9] = -float("inf")
        fused.weight_ih_l0[8, 9] = float("nan")
    x = torch.randn(1, 600, 4096)
    x[0, :5, 5] = torch.tensor([float("inf"), -float("inf"), float("nan"), 3e38, -1e-42])
    x[0, 6:8, 9] = torch.tensor([float("inf"), 0])
    precision("tf32", "ieee")
    with torch.no_grad():
        ours = fused(x)[0]
        precision("ieee", "ieee")
        torch.testing.assert_close(ours, fused(x)[0], rtol=1e-4, atol=1e-4, equal_nan=True)
    assert ours[0, 0].isfinite().sum() == 61


def addresses():
    """A program of its own, run under AddressSanitizer: every kind of call once."""
    import test_cuda_ensembles
    import test_cuda_tangents

    with instead_of_cpu("address", seed=1):
        for plan, test_ops.HIDDEN in (("", 3), *((plan, 9) for plan in SEVERAL_BLOCKS)):
            os.environ["FUSEDRNN_PLAN"] = plan
            for cell in CELLS:
                if plan and not takes(plan, cell):
                    continue
                for kind in test_ops.KINDS:
                    for dtype in (torch.float32, torch.bfloat16):
                        for changed in (False, True):
                            call = test_ops.backward_arguments(
                                cell=cell, kind=kind, mask=True, dtype=dtype, changed=changed
                            )
                            ops.backward(*call.values())
                            if not plan:
                                test_cuda_tangents.call_kernels(cell, kind, dtype, changed)
            test_cuda_ensembles.call_kernels("gru", torch.float32)
            for cell in () if plan else test_cuda_tangents.NORMED:
                test_cuda_tangents.call_kernels(cell, "lengths", torch.float32, True)
    print("no error")


@pytest.mark.slow  # it compiles all of the CUDA part with AddressSanitizer
def test_no_overrun():
    """The whole CUDA side: ATen's buffers are as long as they are, and what is read is written."""
    setup = setup_script()
    library = subprocess.run(
        [*setup.find_cxx(), "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip("this compiler has no libasan to preload")
    build("address", "op.so")
    env = {**os.environ, "LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", "import test_cuda_ops; test_cuda_ops.addresses()"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0 and done.stdout == "no error\n", done.stderr[-4000:]
