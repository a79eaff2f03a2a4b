"""What only a GPU can tell: its numbers, its streams, its graphs, and that nothing waits for it.

The same kernels are tested without one in test_cuda_ops.py, and so are wrong arguments.
"""

from __future__ import annotations

import copy

import pytest
import test_numbers
import test_ops
import test_recurrence
import torch
from cases import CELLS, DTYPES, make_pair, random_state, run
from tolerances import assert_as_exact_as_torch
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn import cuda, families, ops, reference

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, params=["the plan's", "stepwise"])
def backend(request, monkeypatch):
    """Stepwise takes everything; the planner's choice is a persistent backend where one fits."""
    if request.param == "stepwise":
        monkeypatch.setenv("FUSEDRNN_PLAN", "stepwise")
    else:
        monkeypatch.delenv("FUSEDRNN_PLAN", raising=False)
    return request.param


@pytest.fixture(autouse=True)
def true_float32():
    """Without TF32, which torch permits to recurrent layers unless told otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def kernels():
    """A module that falls back to torch.nn would pass most of what follows."""
    reason = cuda.missing(torch.device("cuda", torch.cuda.current_device()))
    if reason:
        pytest.skip(reason)


# T, B, input_size, hidden_size, layers, bidirectional, bias, batch_first, states
SHAPES = [
    (1, 1, 1, 1, 1, False, True, False, True),
    (5, 3, 4, 5, 2, True, True, True, False),
    (7, 33, 1, 33, 1, True, False, False, True),
    (3, 5, 33, 257, 3, False, True, False, True),
    (35, 32, 28, 256, 2, False, True, False, False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s[:5])))
@pytest.mark.parametrize("cell", CELLS)
def test_matches_torch(cell, shape, dtype):
    """Judged by torch.nn on the CPU in the same dtype."""
    T, B, inputs, hidden, layers, bidirectional, bias, batch_first, states = shape
    plain, fused = make_pair(
        cell, inputs, hidden, num_layers=layers, bidirectional=bidirectional, bias=bias,
        batch_first=batch_first, dtype=dtype,
    )  # fmt: skip
    x = torch.randn(*(B, T) if batch_first else (T, B), inputs).to(dtype)
    test_numbers.compare(plain, fused.cuda(), x, random_state(plain, B) if states else None)


@pytest.mark.parametrize("backend", ["grid", "cluster"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "lstm-proj"])
def test_forced_backends(cell, dtype, backend, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_PLAN", backend)
    if backend == "cluster" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need sm_90")
    plain, fused = make_pair(cell, 28, 257, num_layers=2, dtype=dtype)
    test_numbers.compare(plain, fused.cuda(), torch.randn(9, 33, 28).to(dtype), None)


@pytest.mark.parametrize(
    "backend, hidden", [("grid", 128), ("cluster", 128), ("grid", 32)], indirect=["backend"]
)
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "lstm-proj"])
def test_layers_in_one_launch(cell, backend, hidden, monkeypatch):
    """Clusters that wait for each other's flags need a launch that is cooperative as well.

    With 32 units a block runs a layer alone.
    """
    monkeypatch.setenv("FUSEDRNN_PLAN", f"{backend},layers=2")
    if backend == "cluster" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need sm_90")
    plain, fused = make_pair(cell, 28, hidden, num_layers=2)
    test_numbers.compare(plain, fused.cuda(), torch.randn(35, 16, 28), None)


@pytest.mark.parametrize("backend", ["the plan's"], indirect=True)
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])  # the slope of relu jumps
def test_tf32_where_torch_permits_it(cell, backend):
    """Ten bits of a product's operands: far from float32, and no further."""
    plain, fused = make_pair(cell, 28, 256, num_layers=2)
    x = torch.randn(35, 32, 28)
    exact = run(copy.deepcopy(plain).double(), x.double(), None)
    fused = fused.cuda()
    for permitted, few in ((False, 1e-4), (True, 2e-2)):
        torch.backends.cudnn.allow_tf32 = permitted
        found = run(fused, x, None)
        for name, true in exact.items():
            error = (found[name].double() - true).square().mean().sqrt()
            assert error <= few * true.square().mean().sqrt(), (name, permitted)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", CELLS)
def test_packed(cell, dtype):
    plain, fused = make_pair(cell, 6, 9, num_layers=2, bidirectional=True, dtype=dtype)
    lengths = torch.tensor([2, 11, 1, 11, 3])
    packed = pack_padded_sequence(torch.randn(11, 5, 6).to(dtype), lengths, enforce_sorted=False)
    test_numbers.compare(plain, fused.cuda(), packed, random_state(plain, 5))


def on_gpu(call):
    def move(value):
        if isinstance(value, list):
            return [move(v) for v in value]
        return value.cuda() if isinstance(value, torch.Tensor) else value

    return {k: v if k == "batch_sizes" else move(v) for k, v in call.items()}


@pytest.mark.parametrize("call", test_ops.CALLS)
@pytest.mark.parametrize("cell", CELLS)
def test_passes_opcheck(cell, call):
    variation = test_ops.CALLS[call]
    forward = on_gpu(test_ops.arguments(cell, **variation))
    for t in (forward["x"], forward["hx"], forward["cx"], *forward["weights"]):
        if t is not None:
            t.requires_grad_()
    torch.library.opcheck(ops.forward, tuple(forward.values()))
    backward = on_gpu(test_ops.backward_arguments(cell=cell, **variation))
    torch.library.opcheck(ops.backward, tuple(backward.values()))


@pytest.mark.parametrize("cell", CELLS)
def test_lengths_and_integers(cell):
    """As on the CPU, also where what lies behind a length is NaN, or no index."""
    lengths = torch.tensor([0, 7, 3, 1, 7])
    _, fused = make_pair(cell, 6, 9, num_layers=2, bidirectional=True, dtype=torch.float64)
    gpu = copy.deepcopy(fused).cuda()
    x = torch.randn(7, 5, 6, dtype=torch.float64)
    behind = torch.arange(7)[:, None] >= lengths
    x[behind] = float("nan")
    states = random_state(fused, 5)
    exact = run(fused, x, states, lengths=lengths)
    for where in (lengths, lengths.cuda()):
        ours = run(gpu, x, states, lengths=where)
        assert_as_exact_as_torch(ours, exact, exact)
    tokens = torch.randint(0, 6, (7, 5)).masked_fill(behind, -1)
    y, _ = fused(tokens, lengths=lengths)
    ours, _ = gpu(tokens.cuda(), lengths=lengths)
    torch.testing.assert_close(ours.cpu(), y, rtol=1e-11, atol=1e-12)
    outside, _ = gpu(x.cuda(), lengths=lengths.cuda() * 5 - 1)
    inside, _ = gpu(x.cuda(), lengths=(lengths * 5 - 1).clamp(0, 7))
    assert torch.equal(outside.isnan(), inside.isnan())
    assert torch.equal(outside.nan_to_num(), inside.nan_to_num())


@pytest.mark.parametrize(
    "cell, call",
    [(c, n) for n, call in test_recurrence.CALLS.items() for c in CELLS if call.takes(c)],
)
def test_what_changes_the_recurrence(cell, call):
    test_recurrence.assert_near_float64(
        cell, test_recurrence.CALLS[call], torch.float32, hidden=70, device="cuda"
    )


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_very_long(cell):
    """More steps than a grid has rows; judged by the CPU's kernels in the same dtype."""
    _, fused = make_pair(cell, 2, 3)
    x = torch.randn(70_000, 2, 2)
    exact = run(copy.deepcopy(fused).double(), x.double(), None)
    theirs, ours = run(fused, x, None), run(copy.deepcopy(fused).cuda(), x, None)
    assert_as_exact_as_torch(ours, theirs, exact)


def test_more_elements_than_31_bits_count():
    """Gates of one direction have over 2^31 elements; rows of the batch know nothing of others."""
    free, _ = torch.cuda.mem_get_info()
    if free < 60 << 30:
        pytest.skip(f"needs 60 GiB of free GPU memory, there are {free >> 30}")
    _, fused = make_pair("lstm", 1, 4)
    fused = fused.cuda()
    x = torch.randn(2, 70_000_000, 1, device="cuda")
    with torch.no_grad():
        y, _ = fused(x)
        last, _ = fused(x[:, -1000:])
    torch.testing.assert_close(y[:, -1000:], last)


def result_bits(module, x, states):
    return list(run(module, x, states).values())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", CELLS)
def test_fifty_times_the_same_bits(cell, dtype):
    _, fused = make_pair(cell, 19, 67, num_layers=2, bidirectional=True, dtype=dtype)
    x, states = torch.randn(13, 33, 19).to(dtype), random_state(fused, 33)
    fused = fused.cuda()
    first = result_bits(fused, x, states)
    for _ in range(49):
        assert all(map(torch.equal, first, result_bits(fused, x, states)))


def step(module, x):
    """Output and all gradients, on the current stream, without a wait."""
    y, _ = module(x)
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("backend", ["the plan's"], indirect=True)
@pytest.mark.parametrize("family", families.cuda_families(), ids=lambda f: f.name)
def test_small_case(family, backend):
    """The check at first use, of every family that this GPU has."""
    device = torch.device("cuda", torch.cuda.current_device())
    if not families.runs_on(family, cuda.spec(device)):
        pytest.skip("this GPU has no such kernels")
    assert families.problem(family, cuda.OPS, device) is None


@pytest.mark.parametrize("backend", ["the plan's"], indirect=True)
def test_verified_at_first_use(backend, monkeypatch):
    """What passes its check runs, without a warning; a stepwise plan is torch.nn's."""
    monkeypatch.setenv(cuda.SWITCH, "verified")
    plain, fused = make_pair("gru", 28, 64)
    fused = fused.cuda()
    test_numbers.compare(plain, fused, torch.randn(9, 8, 28), None)
    x = torch.randn(9, 8, 28, device="cuda")
    families_of = {s.state for s in cuda.standings(x.device).values()}
    assert families_of == {"right"}
    assert "fused CUDA kernels" in fusedrnn.explain(fused, x)
    assert "torch.nn's own kernels" in fusedrnn.explain(fused.double(), x.double())


def test_two_streams_at_once():
    modules = [
        fusedrnn.LSTM(64, 128, 2).cuda(),
        fusedrnn.GRU(64, 128, 2, bidirectional=True).cuda(),
    ]
    inputs = [torch.randn(50, 16, 64, device="cuda", requires_grad=True) for _ in modules]
    alone = [step(m, x) for m, x in zip(modules, inputs, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in modules]
    together: list[list] = [[], []]
    for _ in range(5):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                together[i].append(step(modules[i], inputs[i]))
    torch.cuda.synchronize()
    for expected, repeats in zip(alone, together, strict=True):
        for found in repeats:
            assert all(map(torch.equal, expected, found))


@pytest.mark.parametrize("kind", ["padded", "lengths", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_graph_capture(cell, kind):
    """A captured forward and backward, replayed on other values, has the bits of an eager one."""
    _, fused = make_pair(cell, 8, 16, num_layers=2, bidirectional=True)
    fused = fused.cuda()
    lengths = torch.tensor([9, 9, 5, 2, 1])
    batch_sizes = torch.tensor([int((lengths > t).sum()) for t in range(9)])
    shape = (int(lengths.sum()), 8) if kind == "packed" else (9, 5, 8)
    x = torch.randn(shape, device="cuda", requires_grad=True)
    on_device = lengths.cuda()

    def once():
        if kind == "packed":
            y, _ = fused(torch.nn.utils.rnn.PackedSequence(x, batch_sizes))
            y = y.data
        else:
            y, _ = fused(x, **({"lengths": on_device} if kind == "lengths" else {}))
        return [y, *torch.autograd.grad(y.square().sum(), [x, *fused.parameters()])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = once()
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
        graph.replay()
        assert all(map(torch.equal, captured, once()))


@pytest.mark.parametrize("kind", ["padded", "lengths", "packed", "integers"])
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_waits_for_the_gpu(cell, kind):
    _, fused = make_pair(cell, 8, 16, num_layers=2, bidirectional=True, dropout=0.5)
    fused = fused.cuda()
    lengths = torch.tensor([9, 9, 5, 2, 1])
    batch_sizes = torch.tensor([int((lengths > t).sum()) for t in range(9)])
    vectors = (int(lengths.sum()), 8) if kind == "packed" else (9, 5, 8)
    x = torch.randn(vectors, device="cuda")
    tokens, on_device = torch.randint(0, 8, (9, 5), device="cuda"), lengths.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        if kind == "packed":
            y = fused(torch.nn.utils.rnn.PackedSequence(x, batch_sizes))[0].data
        elif kind == "integers":
            y, _ = fused(tokens, lengths=on_device)
        else:
            y, _ = fused(x, lengths=on_device if kind == "lengths" else None)
        y.square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    for cell in CELLS:
        plain, fused = make_pair(cell, 6, 9, num_layers=2, bidirectional=True)
        assert torch.cuda.current_device() == 0
        test_numbers.compare(plain, fused.to("cuda:1"), torch.randn(5, 3, 6), None)
        assert torch.cuda.current_device() == 0


def test_tensors_on_different_devices():
    call = on_gpu(test_ops.backward_arguments())
    for name in ("x", "hx", "cx", "grad_y", "grad_hn", "y", "reserve"):
        with pytest.raises(RuntimeError, match="device|forward made them|CUDA tensors"):
            ops.backward(*(call | {name: call[name].cpu()}).values())
    weights = [w.cpu() if i == 3 else w for i, w in enumerate(call["weights"])]
    with pytest.raises(RuntimeError, match="device"):
        ops.backward(*(call | {"weights": weights}).values())


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", CELLS)
def test_autocast(cell, low):
    """torch.nn's dtypes, and the numbers of the same module in the low dtype."""
    plain, fused = make_pair(cell, 6, 9, num_layers=2, bidirectional=True)
    plain, fused = plain.cuda(), fused.cuda()
    x = torch.randn(5, 3, 6, device="cuda")
    with torch.autocast("cuda", low):
        theirs, ours = plain(x), fused(x)
    flat = [torch.utils._pytree.tree_leaves(r) for r in (theirs, ours)]
    assert [t.dtype for t in flat[0]] == [t.dtype for t in flat[1]]
    ours[0].float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in fused.parameters())
    direct, _ = copy.deepcopy(fused).to(low)(x.to(low))
    assert torch.equal(direct, ours[0])


def test_dropout():
    """Masks are drawn on the device: the seed repeats them, and they keep what they should."""
    fused = fusedrnn.RNN(4, 512, num_layers=2, dropout=0.25, nonlinearity="relu").cuda()
    with torch.no_grad():
        for p in fused.parameters():
            p.zero_()
        fused.bias_ih_l0.fill_(1)  # layer 0 puts out 1
        fused.weight_ih_l1.copy_(torch.eye(512))  # layer 1 what comes through the mask
    x = torch.zeros(50, 8, 4, device="cuda")
    outputs = []
    for seed in (1, 1, 2):
        torch.cuda.manual_seed(seed)
        outputs.append(fused(x)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    kept = outputs[0] != 0
    assert abs(kept.float().mean().item() - 0.75) < 0.01
    torch.testing.assert_close(outputs[0][kept], torch.full_like(outputs[0][kept], 1 / 0.75))


@pytest.mark.parametrize("backend", ["stepwise"], indirect=True)  # cuDNN has none
@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives(cell, backend):
    _, fused = make_pair(cell, 2, 3, num_layers=2, dtype=torch.float64)
    fused = fused.cuda()
    x = torch.randn(3, 2, 2, dtype=torch.float64, device="cuda", requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fused(x)[0], x)
    assert torch.autograd.gradgradcheck(lambda x: fused(x)[0], x)


@pytest.mark.parametrize("backend", ["stepwise"], indirect=True)
@pytest.mark.parametrize("cell", CELLS)
def test_derivatives_run_in_kernels(cell, backend, monkeypatch):
    """Forward mode, a Hessian times a vector, a gradient penalty; judged by the CPU's kernels."""
    _, fused = make_pair(cell, 28, 33, num_layers=2, bidirectional=True, dtype=torch.float64)
    x, v = torch.randn(2, 9, 5, 28, dtype=torch.float64)
    monkeypatch.setattr(reference, "forward", None)

    def derivatives(module, x, v):
        def loss(x):
            return module(x)[0].sin().sum()

        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        penalty = torch.autograd.grad(dx.square().sum(), [leaf, *module.parameters()])
        product = torch.func.jvp(torch.func.grad(loss), (x,), (v,))
        found = (*torch.func.jvp(loss, (x,), (v,)), *product, *penalty)
        return [t.detach().cpu() for t in found]

    expected = derivatives(fused, x, v)
    found = derivatives(fused.cuda(), x.cuda(), v.cuda())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cell", CELLS)
def test_torch_compile(cell):
    _, fused = make_pair(cell, 6, 9, num_layers=2)
    fused = fused.cuda()
    compiled = torch.compile(fused, fullgraph=True)
    x = torch.randn(5, 3, 6, device="cuda", requires_grad=True)
    for a, b in zip(step(fused, x), step(compiled, x), strict=True):
        torch.testing.assert_close(a, b)


def test_float32_where_tf32_is_not_permitted():
    """Products of torch.mm may be TF32 then, the layer's may not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        plain, fused = make_pair("lstm", 64, 256)
        test_numbers.compare(plain, fused.cuda(), torch.randn(5, 16, 64), None)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_large_products_where_tf32_is_permitted_to_recurrent_layers():
    """On tensor cores, but 16 bits are right, of TF32 10. One step has no product with W_hh."""
    plain, fused = make_pair("rnn", 1024, 64)
    x = torch.randn(1, 2580, 1024)
    exact = run(copy.deepcopy(plain).double(), x.double(), None)
    fused = fused.cuda()
    for permitted, least, most in ((False, 0, 1e-6), (True, 2e-6, 2e-5)):
        torch.backends.cudnn.allow_tf32 = permitted
        assert ("bfloat16" in fusedrnn.explain(fused, x.cuda())) == permitted
        found = run(fused, x, None)
        for name in ("output", "grad x", "grad weight_ih_l0"):
            error = (found[name].double() - exact[name]).norm() / exact[name].norm()
            assert least <= error <= most, (name, permitted)


def test_out_of_memory_leaves_the_module_usable():
    _, fused = make_pair("gru", 4, 8)
    fused = fused.cuda()
    x = torch.randn(5, 3, 4, device="cuda")
    expected, _ = fused(x)
    rows = torch.cuda.get_device_properties(0).total_memory // 64
    with pytest.raises(RuntimeError):
        fused(x[:1, :1].expand(2, rows, 4))
    assert torch.equal(fused(x)[0], expected)


def test_nan_and_infinity_pass():
    plain, fused = make_pair("lstm", 3, 4)
    for poison in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(5, 2, 3)
        x[2, 1, 0] = poison
        with torch.no_grad():
            theirs, ours = plain(x)[0], fused.cuda()(x.cuda())[0]
        torch.testing.assert_close(ours.cpu(), theirs, equal_nan=True)


def test_explain_names_the_backend(backend):
    text = fusedrnn.explain(fusedrnn.LSTM(4, 8).cuda(), torch.randn(5, 3, 4, device="cuda"))
    assert "CUDA kernels" in text
    assert backend != "stepwise" or "stepwise" in text
    layer = fusedrnn.LSTM(4, 8, recurrent_dropout=0.5).cuda()
    text = fusedrnn.explain(layer, torch.randn(5, 3, 4, device="cuda"))
    assert "CUDA kernels" in text and "recurrent_dropout in the kernels" in text
    layer = fusedrnn.LSTM(4, 8, layer_norm=True).cuda()
    text = fusedrnn.explain(layer, torch.randn(5, 3, 4, device="cuda"))
    assert "CUDA kernels, forward stepwise" in text and "layer_norm in the kernels" in text


def test_the_plain_implementation_runs_there():
    call = on_gpu(test_ops.arguments(kind="lengths", mask=True))
    del call["save"]
    y, *_ = reference.forward(*call.values())
    ours, *_ = ops.forward(*call.values(), False)
    torch.testing.assert_close(ours, y)
