"""The stepwise backend's CUDA kernels, run on the CPU, against the reference in float64."""

from __future__ import annotations

import bindings
import pytest
import torch
from cases import DTYPES
from emulator import run
from torch import Tensor

from fusedrnn import reference

CELLS = list(reference.STEPS)
GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "GRU": 3, "LSTM": 4}
# The slot that holds each gate: of W_ih, of W_hh; torch.nn's order where a cell is not named.
SLOTS = {"GRU": ((1, 2, 0), (1, 2, 3))}
SAVED = {"GRU": 4, "LSTM": 4}
SIZES = [(1, 1), (5, 33), (257, 5), (33, 257)]  # (batch, hidden): no multiple of a block's
NAN = float("nan")


def slots(mode: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return SLOTS.get(mode, (tuple(range(GATES[mode])),) * 2)


def number_of_slots(mode: str) -> int:
    return 1 + max(map(max, slots(mode)))


def compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def cell_params(kind, mode: str, dtype: torch.dtype, batch: int, hidden: int, **fields):
    return kind(
        cell=bindings.Cell[mode],
        dtype=bindings.DType[str(dtype).removeprefix("torch.")],
        batch=batch,
        hidden_size=hidden,
        c_stride=hidden,
        **fields,
    )


def assert_near(name: str, ours: Tensor, exact: Tensor, eps: float) -> None:
    """Errors up to `eps` of the largest value; NaN, which all results start as, fails."""
    error = (ours.double() - exact).abs().max().item()
    assert error <= eps * max(exact.abs().max().item(), 1e-300), f"{name}: {error:.3g}"


def test_all_cells_of_the_list_are_here():
    assert list(GATES) == CELLS == [cell.name for cell in bindings.Cell]


def test_a_half_rounds_like_torch():
    """Every kind of float16 and bfloat16 number, written by a projection, which only copies."""
    special = [0.0, -0.0, 1e-8, 3e-8, 6e-8, 6.1e-5, 65504, 65519, 65520, 1e30, 4e38, NAN]
    x = torch.cat([torch.tensor(special), torch.randn(500), torch.randn(500) * 1e-6])
    x = torch.cat([x, -x, x * 1e4])
    for dtype in (torch.bfloat16, torch.float16):
        h, y = torch.full_like(x, NAN), torch.full(x.shape, NAN, dtype=dtype)
        params = cell_params(bindings.CellForward, "LSTM", dtype, 1, len(x), steps=1)
        run("projection_forward", params, {"gates_x": x, "h": h, "y": y}).check()
        assert torch.equal(y.isnan(), x.isnan())
        assert torch.equal(y.nan_to_num(nan=1), x.to(dtype).nan_to_num(nan=1))
        # And back: a bias of the storage type on gates that are zero.
        params = cell_params(bindings.CellForward, "RNN_RELU", dtype, 1, len(x), steps=1)
        run("cell_forward", params, {"gates_x": torch.zeros_like(x), "b_ih": y, "h": h}).check()
        assert torch.equal(h.nan_to_num(nan=1), torch.relu(y.float()).nan_to_num(nan=1))


def check_one_step(
    mode: str, dtype: torch.dtype, batch: int, hidden: int, emulation: str = "plain", seed: int = -1
) -> None:
    """One step forward, and backward from what it saved; two rows in three run at it."""
    C, G, S = compute(dtype), GATES[mode], number_of_slots(mode)
    lstm = mode == "LSTM"
    lengths = torch.arange(batch) % 3 + 1
    runs = (lengths >= 2)[:, None]  # at step 1

    def random(*shape: int, like: torch.dtype = C) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(like)

    def poison(*shape: int, like: torch.dtype = C) -> Tensor:
        return torch.full(shape, NAN, dtype=like)

    # Views with a stride; h0 is what the storage type can hold, as h after a first step would be.
    gates_x = random(batch, G * hidden + 3)[:, : G * hidden]
    gates_h = random(batch, G * hidden + 1)[:, 1:]
    b_ih, b_hh = random(G * hidden, like=dtype), random(G * hidden, like=dtype)
    h0, c0 = random(batch, hidden, like=dtype), random(batch, hidden, like=dtype)
    h, c = h0.to(C, copy=True), c0.to(C, copy=True)
    y = poison(batch, 2, hidden, like=dtype)[:, 1]
    operand = random(batch, hidden, like=dtype)
    rest = operand.clone()
    saved, saved_c = poison(batch, SAVED.get(mode, 0), hidden, like=dtype), poison(batch, hidden)
    params = cell_params(
        bindings.CellForward, mode, dtype, batch, hidden, step=1, steps=3,
        gates_x_stride=gates_x.stride(0), gates_h_stride=gates_h.stride(0), y_stride=y.stride(0),
    )  # fmt: skip
    arrays = {"lengths": lengths, "gates_x": gates_x, "gates_h": gates_h, "b_ih": b_ih}
    arrays |= {"b_hh": b_hh, "h": h, "c": c if lstm else None, "operand": operand, "y": y}
    arrays |= {"saved": saved, "saved_c": saved_c if lstm else None}
    run("cell_forward", params, arrays, emulation, seed).check()

    leaves = [t.double().requires_grad_() for t in (gates_x, gates_h, h0, c0)]
    gx, gh, ref_h0, ref_c0 = leaves
    exact_h, exact_c = reference.STEPS[mode](
        gx + b_ih.double(), gh + b_hh.double(), ref_h0, ref_c0 if lstm else None
    )
    exact_h.retain_grad()
    few = 8 * torch.finfo(C).eps
    rounded = torch.finfo(dtype).eps + few
    assert_near("h", h, torch.where(runs, exact_h, h0.double()), few)
    assert_near("y", y, torch.where(runs, exact_h, 0), rounded)
    assert_near("operand", operand, torch.where(runs, exact_h, rest.double()), rounded)
    if lstm:
        assert_near("c", c, torch.where(runs, exact_c, c0.double()), few)

    dy = random(batch, hidden + 2)[:, 2:]
    dh_product = random(batch, hidden)
    dh, dc = random(batch, hidden), random(batch, hidden)
    later = (lengths >= 3)[:, None]  # at step 2, whose product dh_product is
    total = dh + torch.where(later, dh_product, 0)
    loss = ((total + dy).double() * exact_h).sum()
    if lstm:
        loss = loss + (dc.double() * exact_c).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)

    rest_dc = dc.clone()
    dgates = poison(batch, S, hidden, like=dtype)
    hidden_out = poison(batch, hidden, like=dtype) if lstm else None
    params = cell_params(
        bindings.CellBackward, mode, dtype, batch, hidden, step=1, steps=3,
        h_stride=y.stride(0), dy_stride=dy.stride(0),
    )  # fmt: skip
    h_prev = torch.zeros(batch, 2, hidden, dtype=dtype)[:, 0].copy_(h0)
    arrays = {"lengths": lengths, "saved": saved, "h": y, "h_prev": h_prev, "c": saved_c}
    arrays |= {"c_prev": c0.to(C), "dy": dy, "dh_product": dh_product, "dh": dh, "dc": dc}
    arrays |= {"dgates": dgates, "hidden": hidden_out}
    # What this cell does not read may be absent.
    if mode not in ("RNN_TANH", "RNN_RELU"):
        del arrays["h"]
    if not lstm:
        arrays = {k: v for k, v in arrays.items() if k not in ("c", "c_prev", "dc")}
    run("cell_backward", params, arrays, emulation, seed).check()

    x_slots, h_slots = slots(mode)
    near = 6 * torch.finfo(dtype).eps if SAVED.get(mode, 0) or mode == "RNN_TANH" else rounded
    for name, grad, at in (("gates_x", grads[0], x_slots), ("gates_h", grads[1], h_slots)):
        found = dgates[:, list(at)].reshape(batch, -1)
        assert_near(f"grad {name}", found, torch.where(runs, grad, 0), near + few)
    direct = grads[2] if grads[2] is not None else torch.zeros_like(exact_h)
    assert_near("dh", dh, torch.where(runs, direct, total.double()), near + few)
    if lstm:
        assert_near("dc", dc, torch.where(runs, grads[3], rest_dc.double()), near + few)
        assert_near("hidden", hidden_out, torch.where(runs, exact_h, 0), near + few)


@pytest.mark.parametrize("batch, hidden", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", CELLS)
def test_one_step(mode, dtype, batch, hidden):
    check_one_step(mode, dtype, batch, hidden, seed=batch + hidden)


@pytest.mark.parametrize("emulation", ["address", "thread"])
@pytest.mark.parametrize("mode", CELLS)
def test_no_overrun_and_no_race(mode, emulation):
    for dtype in (torch.float32, torch.bfloat16):
        check_one_step(mode, dtype, 5, 33, emulation, seed=1)


class Layer:
    """The stepwise protocol of cell_step.h in float64: a layer forward and backward."""

    def __init__(self, mode, x, h0, c0, weights, lengths, reverse, packed):
        self.mode, self.weights, self.lengths, self.reverse = mode, weights, lengths, reverse
        self.h0, self.c0, self.x = h0, c0, x
        self.steps, self.batch, _ = x.shape
        self.hidden = weights[0].shape[0] // GATES[mode]
        self.projected = len(weights) > 4
        self.out, self.packed = h0.shape[1], packed
        order = range(self.steps)
        # Rows that exist at a step: all of them, or, packed, the longer ones, which come first.
        self.rows = [int((lengths > t).sum()) if packed else self.batch for t in order]
        self.order = list(reversed(order) if reverse else order)

    def run(self, launch, kind, step, batch, arrays, width, **strides):
        params = cell_params(
            kind, self.mode, torch.float64, batch, width,
            step=step, steps=self.steps, reverse=self.reverse, **strides,
        )  # fmt: skip
        run(launch, params, {"lengths": self.lengths, **arrays}, seed=step + 1).check()

    def forward(self) -> tuple[Tensor, Tensor, Tensor | None]:
        w_ih, w_hh, b_ih, b_hh, *w_hr = self.weights
        T, B, H, P = self.steps, self.batch, self.hidden, self.out
        G = GATES[self.mode] * H

        def nan(*shape):
            return torch.full(shape, NAN, dtype=torch.float64)

        h, c = self.h0.clone(), None if self.c0 is None else self.c0.clone()
        self.y = nan(T, B, P)
        self.saved, self.saved_c = nan(T, B, SAVED.get(self.mode, 0) * H), nan(T, B, H)
        self.before: dict[int, Tensor] = {}
        gates_x = self.x @ w_ih.T
        for t in self.order:
            n = self.rows[t]
            self.before[t] = h.clone()
            operand = nan(B, H)
            arrays = {"gates_x": gates_x[t], "gates_h": h @ w_hh.T, "b_ih": b_ih, "b_hh": b_hh}
            arrays |= {"c": c, "saved": self.saved[t], "saved_c": self.saved_c[t]}
            arrays |= {"operand": operand} if w_hr else {"h": h, "y": self.y[t]}
            strides = {"gates_x_stride": G, "gates_h_stride": G, "y_stride": P}
            self.run("cell_forward", bindings.CellForward, t, n, arrays, H, **strides)
            if w_hr:
                arrays = {"gates_x": operand @ w_hr[0].T, "h": h, "y": self.y[t]}
                strides = {"gates_x_stride": P, "y_stride": P}
                self.run("projection_forward", bindings.CellForward, t, n, arrays, P, **strides)
        return self.y, h, c

    def backward(self, dy: Tensor, dhn: Tensor, dcn: Tensor | None) -> dict[str, Tensor]:
        w_ih, w_hh, _, _, *w_hr = self.weights
        T, B, H, P = self.steps, self.batch, self.hidden, self.out
        dh, dc = dhn.clone(), None if dcn is None else dcn.clone()
        S = number_of_slots(self.mode)
        # Rows that do not exist are not written: they count for nothing.
        dgates = torch.zeros(T, B, S, H, dtype=torch.float64)
        dproj = torch.zeros(T, B, P, dtype=torch.float64)
        hidden = torch.zeros(T, B, H, dtype=torch.float64)
        product = None
        x_slots, h_slots = map(list, slots(self.mode))
        for t in reversed(self.order):
            n = self.rows[t]
            before = t + 1 if self.reverse else t - 1
            inside = 0 <= before < T
            if w_hr:
                arrays = {"dh": dh, "dh_product": product, "dy": dy[t], "dgates": dproj[t]}
                strides = {"dy_stride": P, "h_stride": P}
                self.run("projection_backward", bindings.CellBackward, t, n, arrays, P, **strides)
                arrays = {"dy": dproj[t] @ w_hr[0], "hidden": hidden[t]}
                strides = {"dy_stride": H}
            else:
                arrays = {"dh": dh, "dh_product": product, "dy": dy[t], "h": self.y[t]}
                arrays["h_prev"] = self.y[before] if inside else None
                strides = {"dy_stride": P, "h_stride": P}
            arrays |= {"saved": self.saved[t], "dc": dc, "dgates": dgates[t], "h0": self.h0}
            if dc is not None:
                arrays |= {"c": self.saved_c[t], "c0": self.c0}
                arrays["c_prev"] = self.saved_c[before] if inside else None
            self.run("cell_backward", bindings.CellBackward, t, n, arrays, H, **strides)
            product = dh.new_full((B, P), NAN) if product is None else product
            product[:n] = dgates[t][:n, h_slots].reshape(n, -1) @ w_hh
        end = self.steps if self.reverse else -1
        last = "projection_backward" if w_hr else "cell_backward"
        # Of packed rows each kept the product of its own last step.
        arrays = {"dh": dh, "dh_product": product} | ({"lengths": None} if self.packed else {})
        self.run(last, bindings.CellBackward, end, B, arrays, P)

        dgates_x = dgates[:, :, x_slots].reshape(T, B, -1)
        dgates_h = dgates[:, :, h_slots].reshape(T, B, -1)
        before = torch.stack([self.before[t] for t in range(T)])
        grads = {"x": dgates_x @ w_ih, "h0": dh, "c0": dc}
        grads["w_ih"] = torch.einsum("tbg,tbi->gi", dgates_x, self.x)
        grads["w_hh"] = torch.einsum("tbg,tbi->gi", dgates_h, before)
        grads["b_ih"], grads["b_hh"] = dgates_x.sum((0, 1)), dgates_h.sum((0, 1))
        if w_hr:
            grads["w_hr"] = torch.einsum("tbp,tbh->ph", dproj, hidden)
        return grads


@pytest.mark.parametrize("rows", ["full", "lengths", "packed"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("mode, proj", [*((mode, 0) for mode in CELLS), ("LSTM", 2)])
def test_a_layer(mode, proj, reverse, rows):
    T, B, H, inputs = 4, 5, 6, 3
    lengths = {"full": None, "lengths": [2, 0, 4, 1, 3], "packed": [4, 4, 3, 2, 1]}[rows]
    lengths = None if lengths is None else torch.tensor(lengths)
    P, G = proj or H, GATES[mode] * H

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    names = ["w_ih", "w_hh", "b_ih", "b_hh", "w_hr"]
    weights = [random(G, inputs), random(G, P), random(G), random(G)] + [random(P, H)] * bool(proj)
    x, h0, c0 = random(T, B, inputs), random(B, P), random(B, H) if mode == "LSTM" else None
    leaves = {"x": x, "h0": h0, "c0": c0, **dict(zip(names, weights, strict=False))}
    leaves = {k: v.clone().requires_grad_() for k, v in leaves.items() if v is not None}
    exact = reference.layer(
        reference.STEPS[mode], leaves["x"], leaves["h0"], leaves.get("c0"),
        [leaves[name] for name in names if name in leaves], True, lengths, None,
        reference.Regularisers(None, 0.0, 0.0), reverse,
    )  # fmt: skip
    results = [r for r in exact[:3] if r is not None]
    grads_out = [torch.randn_like(r) for r in results]
    exact_grads = dict(
        zip(leaves, torch.autograd.grad(results, list(leaves.values()), grads_out), strict=True)
    )

    layer = Layer(mode, x, h0, c0, weights, lengths, reverse, rows == "packed")
    ours = [r for r in layer.forward() if r is not None]
    if rows == "packed":  # what is not there is not written
        ours[0] = torch.where((torch.arange(T)[:, None] < lengths)[..., None], ours[0], 0)
    for name, a, b in zip(("y", "h_n", "c_n"), ours, results, strict=False):
        assert_near(name, a, b, 1e-13)
    dhn, dcn = grads_out[1], grads_out[2] if mode == "LSTM" else None
    grads = layer.backward(grads_out[0], dhn, dcn)
    for name, grad in exact_grads.items():
        assert_near(f"grad {name}", grads[name], grad, 1e-13)


def test_nothing_to_do_is_no_launch():
    for batch, hidden in ((0, 5), (5, 0)):
        params = cell_params(bindings.CellForward, "GRU", torch.float32, batch, hidden, steps=1)
        run("cell_forward", params, {}).check()
