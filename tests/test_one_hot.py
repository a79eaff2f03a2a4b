"""Integer input: one-hot vectors' results, at none of their cost."""

import copy

import pytest
import torch
from cases import AUTOCAST_LSTM, CELLS, DTYPES, make_pair, random_state
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_as_exact_as_torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn
from fusedrnn import ops, reference

T, B, WIDTH = 5, 4, 6


def results(module, x, states, lengths=None, seed=2):
    """As cases.run, but without a gradient of the input, and with packed output for lengths."""
    kwargs = {} if lengths is None else {"lengths": lengths}
    y, state = module(x, states if module.mode == "LSTM" or states is None else states[0], **kwargs)
    if lengths is not None:
        assert not any(y[n:, b].any() for b, n in enumerate(lengths))
        y = pack_padded_sequence(y[: max(lengths)], lengths, enforce_sorted=False)
    found = {"output": y.data if isinstance(y, PackedSequence) else y}
    found |= dict(zip(("h_n", "c_n"), state if module.mode == "LSTM" else (state,), strict=False))
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64)
    for r in found.values():
        loss = loss + (r.double() * torch.randn(r.shape, generator=generator).double()).sum()
    leaves = {f"h_{i}": s for i, s in enumerate(states or ()) if s.requires_grad}
    leaves |= dict(module.named_parameters())
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found |= {f"grad {name}": g for name, g in zip(leaves, grads, strict=True)}
    return {name: r.detach() for name, r in found.items()}


def widened(x, width, dtype):
    """The one-hot vectors that `x` stands for."""
    if isinstance(x, PackedSequence):
        return x._replace(data=one_hot(x.data.long(), width).to(dtype))
    return one_hot(x.long(), width).to(dtype)


@given(
    cell=st.sampled_from(list(CELLS)),
    dtype=st.sampled_from(DTYPES),
    integers=st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]),
    kind=st.sampled_from(["padded", "batch_first", "unbatched", "lengths", "packed"]),
    steps=st.integers(1, 40),
    batch=st.integers(1, 12),
    width=st.integers(1, 100),
    hidden=st.sampled_from([1, 5, 33, 70]),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    threads=st.integers(1, 3),
)
def test_is_one_hot(
    cell, dtype, integers, kind, steps, batch, width, hidden, layers, bidirectional, bias, threads
):
    """By the rule of tolerances.py against torch.nn, and forward to the bit against ourselves.

    Not of so few tokens that the weights are not packed for vectors, for integers they always are.
    """
    options = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias, "dtype": dtype}
    plain, fused = make_pair(cell, width, hidden, **options, batch_first=kind == "batch_first")
    batch = 1 if kind == "unbatched" else batch
    x = torch.randint(0, width, (steps, batch)).to(integers)
    lengths = torch.randint(1, steps + 1, (batch,))
    states = random_state(plain, batch)
    given_x = peer_x = x
    if kind == "batch_first":
        given_x = peer_x = x.t()
    elif kind == "unbatched":
        given_x, peer_x, states = x[:, 0], x[:, 0], tuple(s[:, 0] for s in states)
    elif kind in ("packed", "lengths"):
        peer_x = given_x = pack_padded_sequence(x, lengths, enforce_sorted=False)
    if kind == "lengths":
        given_x = x.clone()
        for b, n in enumerate(lengths):
            given_x[n:, b] = 100 + width if width < 20 else 0  # behind a length anything may stand
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = results(fused, given_x, states, lengths if kind == "lengths" else None)
        same = results(fused, widened(peer_x, width, dtype), states)
    finally:
        torch.set_num_threads(before)
    theirs = results(plain, widened(peer_x, width, dtype), states)
    wide = copy.deepcopy(plain).double()
    exact_states = tuple(s.double() for s in states)
    exact = results(wide, widened(peer_x, width, torch.float64), exact_states)
    tokens = len(peer_x.data) if isinstance(peer_x, PackedSequence) else peer_x.numel()
    if tokens > 8:
        for name in ("output", "h_n"):
            assert torch.equal(ours[name], same[name]), name
    noise = [
        results(wide_moved(wide, dtype), widened(peer_x, width, torch.float64), exact_states)
        for _ in range(2)
    ]
    # Columns of values that do not occur are 0, and would pass for many exact elements.
    values = (peer_x.data if isinstance(peer_x, PackedSequence) else peer_x).long().unique()
    # Relu's slopes jump, for us and torch.nn at other places: judged by our own one-hot vectors,
    # which meet the same.
    peer = same if cell == "relu" and tokens > 8 else theirs
    for found in (ours, peer, exact, *noise):
        for name in found.keys() & {"grad weight_ih_l0", "grad weight_ih_l0_reverse"}:
            kept = found[name][:, values]
            assert kept.count_nonzero() == found[name].count_nonzero()
            found[name] = kept
    # All numbers of a single unit share its roundings: many are as good as few.
    luck = cell == "relu" or hidden == 1
    assert_as_exact_as_torch(ours, peer, exact, noise, luck=luck)


def wide_moved(module, dtype):
    """`module` with its weights moved by an epsilon of `dtype`."""
    moved = copy.deepcopy(module)
    with torch.no_grad():
        for p in moved.parameters():
            p.mul_(1 + torch.finfo(dtype).eps * (2 * torch.rand_like(p) - 1))
    return moved


@pytest.mark.parametrize("cell", CELLS)
def test_many_of_one_value(cell):
    """Sums over thousands of tokens of a value are as exact as torch.nn's products."""
    plain, fused = make_pair(cell, 3, 17)
    x = (torch.rand(200, 32) < 0.01).long() + 1
    theirs, ours = (results(plain, one_hot(x, 3).float(), None), results(fused, x, None))
    exact = results(copy.deepcopy(plain).double(), one_hot(x, 3).double(), None)
    assert_as_exact_as_torch(ours, theirs, exact, luck=cell == "relu")
    assert not ours["grad weight_ih_l0"][:, 0].any()


@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_for_any_threads(cell):
    _, fused = make_pair(cell, 50, 70, num_layers=2, bidirectional=True)
    x, found = torch.randint(0, 50, (30, 9)), []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(results(fused, x, None))
    torch.set_num_threads(before)
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(other[name], value), name


def as_function(module, x, **kwargs):
    names = [name for name, _ in module.named_parameters()]

    def call(*parameters):
        y, state = functional_call(module, dict(zip(names, parameters, strict=True)), (x,), kwargs)
        y = y.data if isinstance(y, PackedSequence) else y
        return (y, *(state if module.mode == "LSTM" else (state,)))

    return call, [p.detach().clone().requires_grad_() for p in module.parameters()]


@pytest.mark.parametrize("kind", ["padded", "lengths", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_derivatives(cell, kind):
    _, fused = make_pair(cell, 3, 2, num_layers=2, bidirectional=True, dtype=torch.float64)
    x, lengths, kwargs = torch.randint(0, 3, (3, 2)), torch.tensor([2, 3]), {}
    if kind == "packed":
        x = pack_padded_sequence(x, lengths, enforce_sorted=False)
    elif kind == "lengths":
        kwargs = {"lengths": lengths}
    call, inputs = as_function(fused, x, **kwargs)
    assert gradcheck(call, inputs, fast_mode=True, check_forward_ad=kind == "padded")
    assert gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
def test_per_sample_gradients(cell):
    _, fused = make_pair(cell, WIDTH, 3, dtype=torch.float64)
    parameters, x = dict(fused.named_parameters()), torch.randint(0, WIDTH, (3, T, 2))

    def loss(parameters, one):
        return functional_call(fused, parameters, (one,))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, one in enumerate(x):
        expected = torch.autograd.grad(loss(parameters, one), list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][i], gradient, msg=name)


@pytest.mark.parametrize("cell", CELLS)
def test_reference(cell):
    _, fused = make_pair(cell, WIDTH, 5, num_layers=2, bidirectional=True, dtype=torch.float64)
    x, lengths = torch.randint(0, WIDTH, (T, B)), torch.tensor([5, 0, 2, 4])
    rest = (None, None, list(fused.parameters()), None, lengths, *[None] * 5, 0.0, *fused._config())
    found = reference.forward(x, *rest)
    expected = reference.forward(one_hot(x, WIDTH).double(), *rest)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell, packed):
    _, fused = make_pair(cell, WIDTH, 3, num_layers=2, bidirectional=True, dtype=torch.float64)
    weights = [p.detach().requires_grad_() for p in fused.parameters()]
    x = torch.randint(0, WIDTH, (7,) if packed else (T, B))
    sizes = torch.tensor([4, 2, 1]) if packed else None
    call = (x, None, None, weights, sizes, *[None] * 6, 0.0, *fused._config())
    torch.library.opcheck(ops.forward, (*call, True))
    call = (*call[:3], [w.detach() for w in weights], *call[4:])
    y, _, _, *made = (t.detach() for t in ops.forward(*call, True))
    needs = [False, not packed, False, *[True] * len(weights)]
    given = (torch.randn_like(y), *[None] * 4, y, *made, needs, 0)
    torch.library.opcheck(ops.backward, (*given, *call))


def test_compiles():
    _, fused = make_pair("gru", WIDTH, 3)
    x = torch.randint(0, WIDTH, (T, B))
    compiled = torch.compile(fused, backend="aot_eager")
    assert torch.equal(compiled(x)[0], fused(x)[0])


@pytest.mark.parametrize("cell", CELLS)
def test_autocast(cell):
    plain, fused = make_pair(cell, WIDTH, 5)
    x = torch.randint(0, WIDTH, (T, B))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, _ = fused(x)
        if cell != "lstm" or AUTOCAST_LSTM:
            assert ours.dtype == plain(one_hot(x, WIDTH).float())[0].dtype
    assert torch.equal(ours, fused_autocast(fused, one_hot(x, WIDTH).float()))


def fused_autocast(fused, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return fused(x)[0]


@pytest.mark.parametrize("kind", ["padded", "packed", "lengths", "unbatched"])
@pytest.mark.parametrize("wrong", [-1, WIDTH, 2**62])
@pytest.mark.parametrize("cell", CELLS)
def test_out_of_range(cell, wrong, kind):
    """What torch.nn.Embedding raises."""
    _, fused = make_pair(cell, WIDTH, 3)
    x, kwargs = torch.zeros(T, B, dtype=torch.int64), {}
    x[1, 2] = wrong
    if kind == "packed":
        x = pack_padded_sequence(x, torch.tensor([5, 4, 3, 1]))
    elif kind == "lengths":
        kwargs = {"lengths": torch.tensor([1, 2, 2, 0])}
    elif kind == "unbatched":
        x = x[:, 2]
    for save in (True, False):
        with torch.set_grad_enabled(save), pytest.raises(IndexError, match=f"index {wrong} is out"):
            fused(x, **kwargs)
    with pytest.raises(IndexError):
        torch.nn.Embedding(WIDTH, 3)(torch.tensor(wrong))


def test_wrong_integers():
    _, fused = make_pair("gru", WIDTH, 3)
    for shape in [(T, B, WIDTH), (T, B, 1)]:
        with pytest.raises(ValueError, match="input dtype .* does not match weight dtype"):
            fused(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match="Expected input to be 2D or 3D, got"):
        fused(torch.tensor(3))
    with pytest.raises(ValueError, match="does not match weight dtype"):
        fused(torch.zeros(T, B, dtype=torch.bool))
    x = torch.zeros(T, B, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="For batched 3-D input, hx should also be 3-D"):
        fused(x, torch.zeros(1, 3))
    with pytest.raises(RuntimeError, match="does not match input dtype"):
        fused(x, torch.zeros(1, B, 3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
        fused(x[:0])


def test_empty_batch():
    _, fused = make_pair("lstm", WIDTH, 3)
    y, (h, _) = fused(torch.zeros(T, 0, dtype=torch.int64))
    assert y.shape == (T, 0, 3)
    y.sum().backward()
    assert h.shape == (1, 0, 3)
    assert not fused.weight_ih_l0.grad.any()


def test_explain():
    _, fused = make_pair("lstm", WIDTH, 3)
    assert "gathered" in fusedrnn.explain(fused, torch.zeros(T, B, dtype=torch.int64))
    assert "gathered" not in fusedrnn.explain(fused, torch.zeros(T, B, WIDTH))
    assert f"{B} rows" in fusedrnn.explain(fused, torch.zeros(T, B, dtype=torch.int64))
