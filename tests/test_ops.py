"""The ops as torch sees them: schema, fake, autograd, and what they say of wrong arguments."""

import re

import pytest
import torch
from cases import CELLS, make_pair, random_state
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fusedrnn
from fusedrnn import calls, ops
from fusedrnn.node import Node

T, B, INPUT, HIDDEN, LAYERS = 3, 4, 2, 3, 2
TOKENS = 7
PACKED = torch.tensor([4, 2, 1])
LENGTHS = torch.tensor([3, 0, 1, 2])
MODES = {"rnn": "RNN_TANH", "relu": "RNN_RELU", "gru": "GRU", "lstm": "LSTM", "lstm-proj": "LSTM"}


def arguments(
    cell="lstm",
    kind="padded",
    bias=True,
    states=True,
    mask=False,
    dtype=torch.float64,
    grad=False,
    one_step=0,
    changed=False,
):
    """The forward op's arguments by name, `save` last.

    one_step: of so many rows, with resets and recurrent dropout; changed: with all that changes the
    recurrence, and all states.
    """
    _, module = make_pair(
        cell, INPUT, HIDDEN, num_layers=LAYERS, bidirectional=True, bias=bias, dtype=dtype
    )
    packed = kind == "packed"
    x = torch.randn(*(TOKENS,) if packed else (T, B), INPUT, dtype=dtype)
    hx, cx, *_ = (*random_state(module, B), None) if states else (None, None)
    config = module._config()
    width = config.directions * config.out_size
    found = {
        "x": x,
        "hx": hx,
        "cx": cx,
        "weights": [p.detach().clone() for p in module.parameters()],
        "batch_sizes": PACKED if packed else None,
        "lengths": LENGTHS if kind == "lengths" else None,
        "mask": torch.randint(0, 2, (LAYERS - 1, TOKENS if packed else T * B, width)).byte()
        if mask
        else None,
        "resets": None,
        "h_mask": None,
        "zone_h": None,
        "zone_c": None,
        "dropout": 0.5 if mask else 0.0,
        **config._asdict(),
        "save": True,
    }
    if one_step:
        hx, cx, *_ = *random_state(module, one_step), None
        resets = torch.arange(one_step).view(1, -1) % 3 == 1
        x = torch.randn(1, one_step, INPUT, dtype=dtype)
        masks = (torch.rand(2 * LAYERS, one_step, config.out_size) < 0.5).to(dtype) * 2
        found |= {"x": x, "hx": hx, "cx": cx, "resets": resets, "h_mask": masks}
    if changed:
        tokens, states = x.shape[:-1], 2 * LAYERS

        def zones(width):
            return torch.randint(0, 2, (states, tokens.numel(), width)).byte()

        wide = calls.compute_dtype(dtype)
        found |= {
            "resets": torch.rand(tokens) < 0.4,
            "h_mask": (torch.rand(states, B, config.out_size) < 0.5).to(wide) * 2,
            "zone_h": zones(config.out_size),
            "zone_c": zones(HIDDEN) if config.mode == "LSTM" else None,
            "zoneout_h": 0.5,
            "zoneout_c": 0.5 if config.mode == "LSTM" else 0.0,
            "all_states": True,
        }
    if grad:
        for t in (x, hx, cx, *found["weights"]):
            if t is not None:
                t.requires_grad_()
    return found


def backward_arguments(needs=None, changed=False, **kwargs):
    """The backward op's arguments by name, from a forward with the same."""
    call = arguments(changed=changed, **kwargs)
    with torch.no_grad():
        y, hn, cn, reserve, hs, cs = ops.forward(*call.values())
    del call["save"]
    grad_cn = torch.randn_like(cn) if call["mode"] == "LSTM" else None
    given = [t is not None for t in (call["x"], call["hx"], call["cx"], *call["weights"])]
    return {
        "grad_y": torch.randn_like(y),
        "grad_hn": torch.randn_like(hn),
        "grad_cn": grad_cn,
        "grad_hs": torch.randn_like(hs) if changed else None,
        "grad_cs": torch.randn_like(cs) if changed and grad_cn is not None else None,
        "y": y,
        "reserve": reserve,
        "hs": hs,
        "cs": cs,
        "needs": given if needs is None else [n and g for n, g in zip(needs, given, strict=True)],
        "members": 0,
        **call,
    }


KINDS = ["padded", "lengths", "packed"]
CALLS = {
    "padded": {"kind": "padded"},
    "no bias, float32": {"kind": "padded", "bias": False, "dtype": torch.float32},
    "lengths, mask": {"kind": "lengths", "mask": True},
    "packed, mask": {"kind": "packed", "mask": True},
    "packed, no states": {"kind": "packed", "states": False},
    "everything": {"kind": "lengths", "mask": True, "changed": True},
}


@pytest.fixture
def filled():
    """What is left unwritten becomes NaN or 255: seen in outputs, equal in the reserve's gaps."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("cell", CELLS)
def test_forward_passes_opcheck(cell, call):
    torch.library.opcheck(ops.forward, tuple(arguments(cell, **CALLS[call], grad=True).values()))


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("cell", CELLS)
def test_forward_without_reserve_passes_opcheck(cell):
    call = arguments(cell) | {"save": False}
    torch.library.opcheck(ops.forward, tuple(call.values()))
    assert ops.forward(*call.values())[3].shape[0] == 0


INFER = ["x", "hx", "cx", "weights", *calls.Config._fields[:6]]


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_infer_is_forward_of_a_plain_call(cell, integers, states):
    call = arguments(cell, states=states)
    if integers:
        call["x"] = torch.randint(INPUT, (T, B))
    few = [call[name] for name in INFER]
    save = not states
    torch.library.opcheck(ops.infer, (*few, save))
    full = ops.forward(*(call | {"save": True}).values())
    for results in (ops.infer(*few), ops.infer(*few, True)):
        assert (results[2] is None) == (call["mode"] != "LSTM")
        for ours, other in zip(results, full, strict=False):
            assert ours is None or torch.equal(ours, other)
    assert ops.infer(*few)[3] is None and results[3] is not None


@pytest.mark.parametrize("cell", CELLS)
def test_infer_has_derivatives_where_they_are_wanted(cell):
    """A user's own call."""
    call = arguments(cell, grad=True)
    few = [call[name] for name in INFER]
    leaves = [t for t in (*few[:3], *few[3]) if t is not None]
    results = [t for t in ops.infer(*few, True)[:3] if t is not None]
    found = torch.autograd.grad([t.sum() for t in results], leaves)
    full = torch.autograd.grad([t.sum() for t in ops.forward(*call.values())[:3]], leaves)
    for a, b in zip(found, full, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad(), forward_ad.dual_level():
        tangent = torch.randn_like(few[0])
        y, *_ = ops.infer(forward_ad.make_dual(few[0].detach(), tangent), *few[1:])
        assert forward_ad.unpack_dual(y).tangent.any()


def test_traced_integers_keep_their_gradient(tmp_path):
    layer = fusedrnn.GRU(INPUT, HIDDEN)
    tokens = torch.randint(INPUT, (T, B))
    traced = torch.jit.trace(layer, tokens)
    torch.jit.save(traced, tmp_path / "traced.pt")
    again = torch.jit.load(tmp_path / "traced.pt")
    assert torch.equal(again(tokens)[0], layer(tokens)[0])
    again(tokens)[0].sum().backward()
    assert all(p.grad is not None for p in again.parameters())
    with torch.no_grad():
        silent = torch.jit.trace(layer, tokens)
    assert "fusedrnn::forward" in str(traced.graph) and "fusedrnn::forward" in str(silent.graph)


def test_which_op_a_module_calls():
    """infer for a plain call, in eager mode."""
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    def op_of(*args, **kwargs):
        seen.clear()
        with Record():
            layer(*args, **kwargs)
        (found,) = [func for func in seen if func.namespace == "fusedrnn"]
        return found

    layer = fusedrnn.LSTM(INPUT, HIDDEN, LAYERS, dropout=0.5)
    x = torch.randn(T, B, INPUT)
    assert op_of(x) == ops.forward
    with torch.no_grad():
        assert op_of(x) == ops.forward  # dropout
        layer.eval()
        assert op_of(x) == op_of(x[:, 0]) == op_of(x[..., 0].long().clamp(0, 1)) == ops.infer
        assert op_of(x, random_state(layer, B)) == ops.infer
        assert op_of(x, lengths=LENGTHS) == op_of(x, return_all=True) == ops.forward
    assert op_of(x) == op_of(x.requires_grad_()) == ops.infer
    layer.zoneout = 0.1
    assert op_of(x) == ops.forward


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("cell", CELLS)
def test_backward_passes_opcheck(cell, call):
    torch.library.opcheck(
        ops.backward, tuple(backward_arguments(cell=cell, **CALLS[call]).values())
    )


@pytest.mark.parametrize("one_step", [0, 1, 33])
@pytest.mark.parametrize("cell", CELLS)
def test_backward_computes_what_is_asked_for(cell, one_step):
    full = backward_arguments(cell=cell, one_step=one_step)
    dx, dhx, dcx, dweights = ops.backward(*full.values())
    complete = [dx, dhx, dcx, *dweights]
    for i, asked in enumerate(full["needs"]):
        if not asked:
            continue
        needs = [j == i for j in range(len(complete))]
        dx, dhx, dcx, dweights = ops.backward(*(full | {"needs": needs}).values())
        for j, grad in enumerate([dx, dhx, dcx, *dweights]):
            if j == i:
                assert torch.equal(grad, complete[j])
            else:
                assert grad.numel() == 0


@pytest.mark.parametrize("kind", ["padded", "lengths", "packed"])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_backward_fills_the_reserve_that_forward_did_not(cell, kind):
    found = []
    for save in (True, False):
        call = arguments(cell=cell, kind=kind, mask=True, grad=True) | {"save": save}
        y, hn, _, reserve, *_ = ops.forward(*call.values())
        assert (reserve.numel() > 0) == save
        leaves = [t for t in (call["x"], call["hx"], *call["weights"]) if t.requires_grad]
        found.append(torch.autograd.grad(y.sum() + (hn * hn).sum(), leaves))
    for a, b in zip(*found, strict=True):
        assert a.any() and torch.equal(a, b)


def test_arguments_stay_as_they_were():
    call = backward_arguments(kind="lengths", mask=True)
    tensors = [t for v in call.values() for t in (v if isinstance(v, list) else [v])]
    tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
    before = [(t.clone(), t._version) for t in tensors]
    ops.backward(*call.values())
    for t, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(t, value)
        assert t._version == version


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", CELLS)
def test_strides_do_not_matter(cell, kind):
    def strided(value):
        if isinstance(value, list):
            return [strided(v) for v in value]
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        wide = value.new_zeros((*value.shape[:-1], 2 * value.shape[-1]))
        wide[..., ::2] = value
        return wide[..., ::2]

    call = arguments(cell, kind, mask=True)
    expected = ops.forward(*call.values())
    found = ops.forward(*(strided(v) for v in call.values()))
    for a, b in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(a, b)
    call = backward_arguments(cell=cell, kind=kind, mask=True)
    loose = {
        k: v if k in ("y", "reserve", "hs", "cs", "needs") else strided(v) for k, v in call.items()
    }
    flat = [(*r[:3], *r[3]) for r in (ops.backward(*c.values()) for c in (call, loose))]
    for a, b in zip(*flat, strict=True):
        assert torch.equal(a, b)


# What the ops say of wrong arguments: which, expected, got.


def other(index, tensor):
    """Replaces one of the weights."""
    return lambda c: {
        "weights": [tensor(w) if i == index else w for i, w in enumerate(c["weights"])]
    }


def zeros(*sizes, dtype=torch.float64):
    return torch.zeros(sizes, dtype=dtype)


# name -> (a call's variation, what is changed, the message)
WRONG = {
    "input 1-D": ({}, {"x": zeros(2)}, "input of 2 (packed) or 3 dimensions, got 1"),
    "input 4-D": ({}, {"x": zeros(1, 1, 1, 2)}, "input of 2 (packed) or 3 dimensions, got 4"),
    "input 2-D, not packed": ({}, {"x": zeros(7, 2)}, "input of 3 dimensions, got 2"),
    "input 3-D, packed": ({"kind": "packed"}, {"x": zeros(3, 4, 2)}, "2 dimensions, got 3"),
    "input width": ({}, {"x": zeros(3, 4, 5)}, "weight_ih of shape [12, 5], got [12, 2]"),
    "input integer, 3-D": (
        {},
        {"x": zeros(3, 4, 2, dtype=torch.int64)},
        "integer input of 1 (packed) or 2 dimensions, got 3",
    ),
    "input integer, packed": (
        {"kind": "packed"},
        {"x": zeros(7, 2, dtype=torch.int64)},
        "packed integer input has 1 dimension, got 2",
    ),
    "input bool": ({}, {"x": zeros(3, 4, 2, dtype=torch.bool)}, "expected float64, float32"),
    "input complex": (
        {},
        {"x": zeros(3, 4, 2, dtype=torch.cfloat)},
        "expected float64, float32, bfloat16 or float16, got",
    ),
    "input float32": (
        {},
        {"x": zeros(3, 4, 2, dtype=torch.float32)},
        "weight_ih has another dtype",
    ),
    "hx shape": ({}, {"hx": zeros(4, 5, 3)}, "hx of shape [4, 4, 3], got [4, 5, 3]"),
    "hx dims": ({}, {"hx": zeros(4, 3)}, "hx of shape [4, 4, 3], got [4, 3]"),
    "hx dtype": ({}, {"hx": zeros(4, 4, 3, dtype=torch.half)}, "hx has another dtype"),
    "hx layers": ({}, {"hx": zeros(2, 4, 3)}, "hx of shape [4, 4, 3], got [2, 4, 3]"),
    "cx shape": ({"cell": "lstm-proj"}, {"cx": zeros(4, 4, 2)}, "cx of shape [4, 4, 3]"),
    "cx dtype": ({}, {"cx": zeros(4, 4, 3, dtype=torch.float32)}, "cx has another dtype"),
    "cx of a GRU": ({"cell": "gru"}, {"cx": zeros(4, 4, 3)}, "only LSTM takes a cell state"),
    "too few weights": ({}, lambda c: {"weights": c["weights"][:-1]}, "4 x 4 weights, got 15"),
    "too many weights": ({}, lambda c: {"weights": c["weights"] * 2}, "4 x 4 weights, got 32"),
    "no weights": ({}, {"weights": []}, "4 x 4 weights, got 0"),
    "weight_ih shape": ({}, other(0, lambda w: w.T), "weight_ih of shape [12, 2], got [2, 12]"),
    "weight_hh shape": ({}, other(5, lambda w: w[1:]), "weight_hh of shape [12, 3], got [11, 3]"),
    "bias shape": ({}, other(3, lambda w: w[:, None]), "bias_hh of shape [12], got [12, 1]"),
    "weight_hr shape": (
        {"cell": "lstm-proj"},
        other(4, lambda w: w.T),
        "weight_hr of shape [2, 3], got [3, 2]",
    ),
    "weight dtype": ({}, other(2, torch.Tensor.float), "bias_ih has another dtype"),
    "hidden_size": ({}, {"hidden_size": 4}, "weight_ih of shape [16, 2], got [12, 2]"),
    "hidden_size 0": ({}, {"hidden_size": 0}, "must be positive"),
    "hidden_size < 0": ({}, {"hidden_size": -3}, "must be positive"),
    "num_layers 0": ({}, {"num_layers": 0}, "must be positive"),
    "num_layers < 0": ({}, {"num_layers": -1}, "must be positive"),
    "num_layers": ({}, {"num_layers": 3}, "6 x 4 weights, got 16"),
    "num_layers huge": ({}, {"num_layers": 2**62}, "overflow"),
    "hidden_size huge": ({}, {"hidden_size": 2**62}, "overflow"),
    "proj_size < 0": ({}, {"proj_size": -1}, "proj_size must lie in [0, hidden_size)"),
    "proj_size large": ({}, {"proj_size": 3}, "proj_size must lie in [0, hidden_size)"),
    "proj_size of a GRU": ({"cell": "gru"}, {"proj_size": 2}, "only LSTM takes proj_size"),
    "one direction": ({}, {"bidirectional": False}, "2 x 4 weights, got 16"),
    "no bias": ({}, {"bias": False}, "4 x 2 weights, got 16"),
    "mode": ({}, {"mode": "QRNN"}, "unknown mode QRNN"),
    "mode's case": ({}, {"mode": "lstm"}, "unknown mode lstm"),
    "lengths count": ({"kind": "lengths"}, {"lengths": LENGTHS[1:]}, "expected 4 lengths, got 3"),
    "lengths dims": (
        {"kind": "lengths"},
        {"lengths": LENGTHS[None]},
        "lengths of 1 dimension, got 2",
    ),
    "lengths float": ({"kind": "lengths"}, {"lengths": LENGTHS.float()}, "lengths of integers"),
    "lengths bool": ({"kind": "lengths"}, {"lengths": LENGTHS.bool()}, "lengths of integers"),
    "overlong": ({"kind": "lengths"}, {"lengths": LENGTHS + 1}, "lengths in [0, 3], got 4"),
    "negative length": ({"kind": "lengths"}, {"lengths": LENGTHS - 1}, "lengths in [0, 3], got -1"),
    "lengths and batch_sizes": ({"kind": "packed"}, {"lengths": LENGTHS}, "takes no lengths"),
    "batch_sizes empty": ({"kind": "packed"}, {"batch_sizes": PACKED[:0]}, "batch_sizes is empty"),
    "batch_sizes dims": (
        {"kind": "packed"},
        {"batch_sizes": PACKED[None]},
        "of 1 dimension, got 2",
    ),
    "batch_sizes float": ({"kind": "packed"}, {"batch_sizes": PACKED.double()}, "of integers"),
    "batch_sizes rise": ({"kind": "packed"}, {"batch_sizes": PACKED.flip(0)}, "not rise"),
    "batch_sizes 0": ({"kind": "packed"}, {"batch_sizes": torch.tensor([7, 0])}, "be positive"),
    "batch_sizes < 0": (
        {"kind": "packed"},
        {"batch_sizes": torch.tensor([8, -1])},
        "be positive|more",
    ),
    "batch_sizes low": ({"kind": "packed"}, {"batch_sizes": PACKED[:2]}, "add up to 6, not to 7"),
    "batch_sizes high": (
        {"kind": "packed"},
        {"batch_sizes": torch.tensor([4, 2, 2])},
        "add up to more than 7",
    ),
    "batch_sizes huge": (
        {"kind": "packed"},
        {"batch_sizes": torch.tensor([2**62, 2**62])},
        "add up to more than 7",
    ),
    "mask shape": (
        {"mask": True},
        {"mask": zeros(1, 5, 6).byte()},
        "mask of shape [1, 12, 6], got [1, 5, 6]",
    ),
    "mask dtype": ({"mask": True}, {"mask": zeros(1, 12, 6)}, "mask as uint8"),
    "dropout < 0": ({}, {"dropout": -0.1}, "dropout must lie in [0, 1]"),
    "dropout > 1": ({}, {"dropout": 1.5}, "dropout must lie in [0, 1]"),
    "dropout NaN": ({}, {"dropout": float("nan")}, "dropout must lie in [0, 1]"),
}
WRONG_BACKWARD = {
    "grad_y shape": (
        {},
        {"grad_y": zeros(3, 4, 5)},
        "the output of shape [3, 4, 6], got [3, 4, 5]",
    ),
    "grad_hn shape": ({}, {"grad_hn": zeros(4, 4, 4)}, "h_n of shape [4, 4, 3], got [4, 4, 4]"),
    "grad_cn shape": ({}, {"grad_cn": zeros(4, 4)}, "c_n of shape [4, 4, 3], got [4, 4]"),
    "y shape": ({}, {"y": zeros(3, 4, 5)}, "the output of shape [3, 4, 6], got [3, 4, 5]"),
    "y dtype": ({}, {"y": zeros(3, 4, 6, dtype=torch.half)}, "the output has another dtype"),
    "y strided": ({}, lambda c: {"y": c["y"].mT.contiguous().mT}, "as forward made it"),
    "reserve shape": ({}, lambda c: {"reserve": c["reserve"][1:]}, "the reserve of shape [12, "),
    "reserve empty": ({}, lambda c: {"reserve": c["reserve"][:0]}, "the reserve of shape [12, "),
    "reserve dtype": ({}, lambda c: {"reserve": c["reserve"].bool()}, "as forward made it"),
    "reserve strided": (
        {},
        lambda c: {"reserve": c["reserve"].T.contiguous().T},
        "as forward made",
    ),
    "too few needs": ({}, lambda c: {"needs": c["needs"][1:]}, "expected 19 needs, got 18"),
    "no needs": ({}, {"needs": []}, "expected 19 needs, got 0"),
    "input": ({}, {"x": zeros(3, 4, 5)}, "weight_ih of shape [12, 5], got [12, 2]"),
    "another T": ({}, {"x": zeros(2, 4, 2)}, "the output of shape [2, 4, 6], got [3, 4, 6]"),
}


def changed(call, change):
    return call | (change(call) if callable(change) else change)


@pytest.mark.parametrize("which", WRONG)
def test_wrong_arguments(which):
    variation, change, message = WRONG[which]
    for op, make in ((ops.forward, arguments), (ops.backward, backward_arguments)):
        call = changed(make(**variation), change)
        pattern = "|".join(map(re.escape, message.split("|")))
        with pytest.raises(RuntimeError, match=rf"fusedrnn: .*({pattern})"):
            op(*call.values())


@pytest.mark.parametrize("which", WRONG_BACKWARD)
def test_wrong_arguments_of_backward(which):
    variation, change, message = WRONG_BACKWARD[which]
    with pytest.raises(RuntimeError, match=f"fusedrnn: .*{re.escape(message)}"):
        ops.backward(*changed(backward_arguments(**variation), change).values())


TENSORS = ["x", "hx", "cx", "weights", "batch_sizes", "lengths", "mask", "grad_y", "y", "reserve"]


@pytest.mark.parametrize("name", TENSORS)
def test_meta_tensors_among_cpu_tensors(name):
    """They hold no numbers: an error, or results of the same kind, but never unwritten memory."""
    kind = {"batch_sizes": "packed", "lengths": "lengths"}.get(name, "padded")
    for op, make in ((ops.forward, arguments), (ops.backward, backward_arguments)):
        call = make(kind=kind, mask=name == "mask")
        if name not in call:
            continue
        value = call[name]
        if name == "weights":
            call[name] = [value[0], value[1].to("meta"), *value[2:]]
        else:
            call[name] = value.to("meta")
        try:
            y, *_ = op(*call.values())
        except (RuntimeError, NotImplementedError) as error:
            assert re.search("meta|device|CPU|forward made", str(error))
        else:
            assert y.device.type == "meta"


def test_all_meta_runs_the_fake():
    call = {
        k: [w.to("meta") for w in v]
        if isinstance(v, list)
        else v.to("meta")
        if isinstance(v, torch.Tensor)
        else v
        for k, v in arguments().items()
    }
    found = ops.forward(*call.values())
    assert {t.device.type for t in found} == {"meta"}
    real = ops.forward(*arguments().values())
    assert [t.shape for t in found] == [t.shape for t in real]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [2, 16])
def test_input_of_no_width(dtype, batch):
    """Modules refuse it, the op does not: products of no depth are what they are added to."""
    w_hh, b_ih, b_hh = torch.randn(64, 16), torch.randn(64), torch.randn(64)

    def states(width):
        weights = [t.to(dtype) for t in (torch.zeros(64, width), w_hh, b_ih, b_hh)]
        x = torch.zeros(4, batch, width, dtype=dtype)
        found = torch.ops.fusedrnn.infer(x, None, None, weights, "LSTM", 16, 0, 1, True, False)
        return found[:3]

    for none, zeros in zip(states(0), states(1), strict=True):
        assert torch.equal(none, zeros)


def test_backward_expects_all_states_that_forward_returned():
    call = arguments("lstm") | {"all_states": True, "save": True}
    y, _, _, reserve, _, cs = ops.forward(*call.values())
    needs = [True, False, False, *[True] * len(call["weights"])]
    del call["save"]
    rest = (needs, 0, *call.values())
    with pytest.raises(RuntimeError, match="expected hs of shape .*, got none"):
        ops.backward(torch.ones_like(y), *[None] * 4, y, reserve, None, cs, *rest)


def test_nodes_are_of_one_level():
    """From torch 2.14 on Function.apply looks at the class, and refuses transforms of torch.func
    to what has no setup_context.
    """
    nodes = Node.__subclasses__()
    assert {ops._Forward, ops._Backward} < set(nodes)
    assert not any(issubclass(node, torch.autograd.Function) for node in nodes)
