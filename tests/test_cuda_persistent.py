"""The persistent backends' CUDA kernels, run on the CPU, against the reference in float64."""

from __future__ import annotations

import math

import bindings
import pytest
import torch
from emulator import run
from test_cuda_cells import CELLS, GATES, NAN, SAVED, assert_near, number_of_slots, slots
from torch import Tensor

from fusedrnn import reference

NAMES = ["w_ih", "w_hh", "b_ih", "b_hh"]
# (engine, dtype) -> how far one product may be off, relative to its largest value
KINDS = {
    ("ffma", torch.float32): 2e-6,
    ("ffma_narrow", torch.float32): 2e-6,
    ("tf32", torch.float32): 2e-3,
    ("half", torch.bfloat16): 2e-2,
    ("half", torch.float16): 3e-3,
}


def random(*shape: int, like: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(like)


def poison(*shape: int, like: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, NAN, dtype=like)


def missing(*shape: int, like: torch.dtype = torch.float32) -> Tensor:
    """NaN too: what a place has until the one value comes that it waits for."""
    return torch.full(shape, -1, dtype=torch.int32 if like.itemsize == 4 else torch.int16).view(
        like
    )


class Stack:
    """Layers of one launch: `layers` chained ones, or one layer in both directions."""

    def __init__(
        self,
        mode: str,
        engine: str,
        dtype: torch.dtype,
        team: str,
        sizes: tuple[int, int, int],
        units: int,
        rows: int,
        stages: int = 1,
        bidirectional: bool = False,
        lengths: list[int] | None = None,
        packed: bool = False,
        dropout: float = 0.0,
        states: bool = True,
        order: list[int] | None = None,
        emulation: str = "plain",
        seed: int = -1,
    ):
        self.mode, self.engine, self.dtype = mode, engine, dtype
        self.cluster = team == "cluster"
        self.T, self.B, self.H = T, B, H = sizes
        if team == "alone":
            units = -(-H // 8) * 8
        self.units, self.rows, self.stages = units, rows, stages
        self.bidirectional, self.packed, self.dropout = bidirectional, packed, dropout
        self.emulation, self.seed = emulation, seed
        self.ways: list[int] = []  # of the launches
        self.lstm = mode == "LSTM"
        self.lengths = None if lengths is None else torch.tensor(lengths)
        self.order = None if order is None else torch.tensor(order)
        scale = 1 / math.sqrt(H)
        G = GATES[mode] * H
        inputs = 3 if not bidirectional else 2
        self.x = random(T, B, inputs, like=dtype)
        self.weights = [
            [
                random(G, inputs if i == 0 or bidirectional else H, like=dtype) * scale,
                random(G, H, like=dtype) * scale,
                random(G, like=dtype) * 0.1,
                random(G, like=dtype) * 0.1,
            ]
            for i in range(stages)
        ]
        self.h0 = [random(B, H, like=dtype) if states else None for _ in range(stages)]
        self.c0 = [random(B, H, like=dtype) if states and self.lstm else None for _ in self.h0]
        self.mask = None
        if dropout:
            self.mask = (torch.rand(stages, T, B, H) > dropout).to(torch.uint8)
        valid = torch.ones(T, B, dtype=torch.bool)
        if self.lengths is not None:
            valid = torch.arange(T)[:, None] < self.lengths
        self.valid = valid
        self.offsets = None
        if packed:
            self.offsets = torch.cat([torch.zeros(1, dtype=torch.long), valid.sum(1)[:-1]]).cumsum(
                0
            )

    # ---- tokens: padded tensors as the kernels have them, and back ----

    def tokens(self, padded: Tensor) -> Tensor:
        return padded[self.valid] if self.packed else padded.flatten(0, 1)

    def padded(self, tokens: Tensor) -> Tensor:
        if not self.packed:
            return tokens.unflatten(0, (self.T, self.B))
        return tokens.new_zeros(self.T, self.B, *tokens.shape[1:]).index_put((self.valid,), tokens)

    def launch(self, direction: str, stages: list[dict]) -> None:
        division = {
            "cell": bindings.Cell[self.mode],
            "engine": bindings.Engine[self.engine],
            "cluster": self.cluster,
            "hidden_size": self.H,
            "chained": not self.bidirectional and self.stages > 1,
        }
        shape = getattr(bindings, f"{direction}_shape")
        params = getattr(bindings, f"Persistent{direction.title()}")(
            **division,
            shape=shape(**division, units=self.units, rows=self.rows),
            dtype=bindings.DType[str(self.dtype).removeprefix("torch.")],
            stages=self.stages,
            batch=self.B,
            steps=self.T,
            mask_scale=1 / (1 - self.dropout),
            c_stride=self.H,
            slices=-(-self.B // self.rows),
        )
        arrays: dict = {"lengths": self.lengths, "offsets": self.offsets, "order": self.order}
        for i, fields in enumerate(stages):
            for name, value in fields.items():
                if isinstance(value, Tensor):
                    arrays[i, name] = value
                elif value is not None:
                    setattr(params.stage[i], name, value)
        result = run(f"planned_{direction}", params, arrays, self.emulation, self.seed)
        result.check()
        self.ways.append(result.way)

    def reverse(self, stage: int) -> bool:
        return self.bidirectional and stage == 1

    def forward(self) -> None:
        H, B, n = self.H, self.B, len(self.tokens(self.x))
        width = 2 * H if self.bidirectional else H
        outputs = [missing(n, width + 3, like=self.dtype) for _ in range(self.stages)]
        if self.bidirectional:
            outputs = outputs[:1] * 2
        self.y = [
            o[:, H * self.reverse(i) : H * self.reverse(i) + H] for i, o in enumerate(outputs)
        ]
        self.hn = [poison(B, H, like=self.dtype) for _ in range(self.stages)]
        self.cn = [poison(B, H, like=self.dtype) if self.lstm else None for _ in self.hn]
        self.saved = [
            poison(n, SAVED.get(self.mode, 0), H, like=self.dtype) for _ in range(self.stages)
        ]
        self.saved_c = [poison(n, H) if self.lstm else None for _ in self.saved]
        stages = []
        for i, (w_ih, w_hh, b_ih, b_hh) in enumerate(self.weights):
            chained = i > 0 and not self.bidirectional
            gates_x = (
                (self.tokens(self.x).double() @ w_ih.double().T).float() if not chained else None
            )
            stages.append(
                {
                    "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh,
                    "gates_x": gates_x, "w_ih": w_ih if chained else None,
                    "mask": self.tokens(self.mask[i])
                    if chained and self.mask is not None else None,
                    "h0": self.h0[i], "c0": self.c0[i], "hn": self.hn[i], "cn": self.cn[i],
                    "y": self.y[i], "saved": self.saved[i], "saved_c": self.saved_c[i],
                    "y_stride": width + 3, "reverse": self.reverse(i),
                }
            )  # fmt: skip
        self.launch("forward", stages)

    def backward(self, dy: list[Tensor | None], dhn: list[Tensor], dcn: list[Tensor]) -> list[dict]:
        H, n = self.H, len(self.tokens(self.x))
        S = number_of_slots(self.mode)
        order = list(range(self.stages)) if self.bidirectional else list(range(self.stages))[::-1]
        dh, dc = [torch.full_like(d, NAN) for d in dhn], [torch.full_like(d, NAN) for d in dcn]
        dgates = [poison(n, S, H, like=self.dtype) for _ in order]
        dx = [missing(n, H) for _ in order]
        stages = []
        for i in order:
            chained = i < self.stages - 1 and not self.bidirectional
            feeds = i > 0 and not self.bidirectional
            given = dy[i]
            stages.append(
                {
                    "w_hh": self.weights[i][1], "saved": self.saved[i], "saved_c": self.saved_c[i],
                    "y": self.y[i], "h0": self.h0[i], "c0": self.c0[i],
                    "dy": None if given is None else self.tokens(given),
                    "above": dx[i + 1] if chained else None,
                    "above_mask": self.tokens(self.mask[i + 1])
                    if chained and self.mask is not None else None,
                    "w_ih": self.weights[i][0] if feeds else None, "dx": dx[i] if feeds else None,
                    "dgates": dgates[i], "dhn": dhn[i], "dcn": dcn[i],
                    "dh0": dh[i], "dc0": dc[i] if self.lstm else None,
                    "y_stride": self.y[i].stride(0), "dy_stride": H, "reverse": self.reverse(i),
                }
            )  # fmt: skip
        self.launch("backward", stages)
        self.dgates = dgates
        x_slots, h_slots = map(list, slots(self.mode))
        grads = []
        for i in range(self.stages):
            gates = self.padded(dgates[i]).double()
            by_x, by_h = gates[:, :, x_slots].flatten(2), gates[:, :, h_slots].flatten(2)
            grads.append(
                {"x": by_x @ self.weights[i][0].double(), "b_ih": by_x.sum((0, 1)),
                 "b_hh": by_h.sum((0, 1)), "h0": dh[i], "c0": dc[i] if self.lstm else None}
            )  # fmt: skip
        return grads


def check(mode: str, engine: str, dtype: torch.dtype, team: str, *args, **kwargs) -> Stack:
    torch.manual_seed(0)
    stack = Stack(mode, engine, dtype, team, *args, **kwargs)
    few = KINDS[engine, dtype]
    exact: list[tuple] = []
    leaves: list[dict] = []
    x = stack.x.double().requires_grad_()
    for i, weights in enumerate(stack.weights):
        own = {name: w.double().requires_grad_() for name, w in zip(NAMES, weights, strict=True)}
        zeros = torch.zeros(stack.B, stack.H, dtype=torch.float64)
        h0, c0 = stack.h0[i], stack.c0[i]
        own["h0"] = (zeros if h0 is None else h0.double()).clone().requires_grad_()
        own["c0"] = (zeros if c0 is None else c0.double()).clone().requires_grad_()
        chained = i > 0 and not stack.bidirectional
        if chained:
            x = exact[-1][0]
            if stack.mask is not None:
                x = x * stack.mask[i] / (1 - stack.dropout)
        own["x"] = x
        exact.append(
            reference.layer(
                reference.STEPS[mode], x, own["h0"], own["c0"] if stack.lstm else None,
                [own[name] for name in NAMES], True, stack.lengths, None,
                reference.Regularisers(None, 0.0, 0.0), stack.reverse(i),
            )[:3]
        )  # fmt: skip
        leaves.append(own)

    stack.forward()
    for i, (y, h, c) in enumerate(exact):
        found = stack.padded(stack.y[i])
        assert_near(f"y of {i}", found, y, few)
        assert_near(f"h_n of {i}", stack.hn[i], h, few)
        if c is not None:
            assert_near(f"c_n of {i}", stack.cn[i], c, few)

    last = range(stack.stages) if stack.bidirectional else [stack.stages - 1]
    dy = [random(stack.T, stack.B, stack.H) if i in last else None for i in range(stack.stages)]
    dhn = [random(stack.B, stack.H) for _ in exact]
    dcn = [random(stack.B, stack.H) for _ in exact]
    loss = torch.zeros((), dtype=torch.float64)
    for i, (y, h, c) in enumerate(exact):
        given = dy[i]
        loss = loss + (h * dhn[i]).sum()
        if given is not None:
            loss = loss + (y * given).sum()
        if c is not None:
            loss = loss + (c * dcn[i]).sum()
    grads = stack.backward(dy, dhn, dcn)
    for i, own in enumerate(leaves):
        names = [n for n in ("h0", "c0", "b_ih", "b_hh", "x") if stack.lstm or n != "c0"]
        if stack.bidirectional:
            names.remove("x")  # the sum of both
        expected = torch.autograd.grad(loss, [own[n] for n in names], retain_graph=True)
        for name, value in zip(names, expected, strict=True):
            assert_near(f"grad {name} of {i}", grads[i][name], value, 4 * few)
    return stack


# Alone: a block has all units.
TEAMS = pytest.mark.parametrize("team", ["cluster", "grid", "alone"])


@TEAMS
@pytest.mark.parametrize("engine, dtype", KINDS, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize("mode", CELLS)
def test_a_layer(mode, engine, dtype, team):
    """Units that are no multiple of a block's, rows of the batch that are not of a tile."""
    check(mode, engine, dtype, team, (3, 5, 21), 8, 8 if engine != "ffma_narrow" else 2, seed=1)


@TEAMS
@pytest.mark.parametrize("mode", CELLS)
def test_layers_in_a_chain(mode, team):
    check(mode, "ffma", torch.float32, team, (4, 9, 10), 4, 8, stages=3, dropout=0.3, seed=2)


@TEAMS
@pytest.mark.parametrize("rows", ["full", "lengths", "packed"])
@pytest.mark.parametrize("mode", CELLS)
def test_both_directions(mode, rows, team):
    lengths = {"full": None, "lengths": [2, 0, 4, 1, 3], "packed": [4, 4, 3, 2, 1]}[rows]
    check(
        mode, "ffma_narrow", torch.float32, team, (5, 5, 6), 4, 2, stages=2, bidirectional=True,
        lengths=lengths, packed=rows == "packed", states=rows != "full", seed=3,
    )  # fmt: skip


@TEAMS
@pytest.mark.parametrize("packed", [False, True], ids=["lengths", "packed"])
def test_a_chain_of_rows_that_end(packed, team):
    lengths = [3, 3, 2, 2, 1] if packed else [0, 3, 1, 2, 2]
    check(
        "LSTM", "half", torch.bfloat16, team, (4, 5, 10), 8, 8, stages=2, lengths=lengths,
        packed=packed, seed=4,
    )  # fmt: skip


@TEAMS
def test_slices_take_rows_in_an_order(team):
    """Of the batch, whose results stay where they are; a chain, whose stages take the same rows."""
    lengths, order = [1, 6, 0, 2, 7, 2, 3], [4, 1, 6, 3, 5, 0, 2]
    check(
        "LSTM", "ffma_narrow", torch.float32, team, (7, 7, 10), 8, 2, stages=2, lengths=lengths,
        order=order, seed=6,
    )  # fmt: skip


@TEAMS
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_layers_overlap(layers, team):
    """Blocks wait for each other as often as T + L - 1 steps take, and not T * L.

    Backward a layer hands down sums that its own team has to exchange first: two waits a layer.
    A team of one block waits for the layer below alone.
    """
    T = 7
    stack = check("GRU", "ffma", torch.float32, team, (T, 3, 8), 4, 8, stages=layers, seed=8)
    if team == "alone":
        assert stack.ways == [layers - 1, layers - 1]
    else:
        begin = 1 if team == "cluster" else 0
        assert stack.ways == [begin + T + layers - 2, begin + T + 2 * (layers - 1)]


@pytest.mark.parametrize("emulation", ["address", "thread"])
@TEAMS
@pytest.mark.parametrize("engine, dtype", KINDS, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize(
    "mode", [m if m == "GRU" else pytest.param(m, marks=pytest.mark.slow) for m in CELLS]
)
def test_no_overrun_and_no_race(mode, engine, dtype, team, emulation):
    rows = 2 if engine == "ffma_narrow" else 8
    check(
        mode, engine, dtype, team, (3, 3, 10), 8, rows, stages=2, dropout=0.5,
        lengths=[1, 3, 2], emulation=emulation, seed=5,
    )  # fmt: skip


@pytest.mark.parametrize("team", ["cluster", "grid"])
@pytest.mark.parametrize("hidden, units, rows, batch", [(33, 16, 16, 33), (257, 24, 8, 1)])
def test_odd_sizes(hidden, units, rows, batch, team):
    check("LSTM", "ffma", torch.float32, team, (2, batch, hidden), units, rows, seed=6)
    check("LSTM", "half", torch.bfloat16, team, (2, batch, hidden), units, rows, seed=6)


@pytest.mark.parametrize("engine, dtype", KINDS, ids=lambda v: str(v).removeprefix("torch."))
def test_weights_in_registers(engine, dtype):
    """What a warp has in registers, what it reads beside, and an odd number of rows of tiles."""
    rows = 2 if engine == "ffma_narrow" else 8
    division = {"cell": bindings.Cell.LSTM, "engine": bindings.Engine[engine], "cluster": False}
    for shape in (bindings.forward_shape, bindings.backward_shape):
        made = shape(**division, hidden_size=257, units=24, rows=rows, chained=False)
        assert made.kept == {"ffma": 0, "half": 4}.get(engine, 8)
    check("LSTM", engine, dtype, "grid", (2, 1, 257), 24, rows, seed=7)


@TEAMS
@pytest.mark.parametrize("engine, dtype", [("tf32", torch.float32), ("half", torch.bfloat16)])
def test_fewer_rows_than_tensor_cores_take(engine, dtype, team):
    check("LSTM", engine, dtype, team, (3, 5, 33), 24, 2, seed=8)
    check("GRU", engine, dtype, team, (3, 5, 33), 8, 4, stages=2, lengths=[1, 3, 2, 0, 3], seed=8)


@pytest.mark.parametrize("hidden, batch", [(1, 9), (5, 33), (31, 5)])
@pytest.mark.parametrize("mode", CELLS)
def test_odd_sizes_of_a_block(mode, hidden, batch):
    check(mode, "ffma", torch.float32, "alone", (4, batch, hidden), 0, 8, seed=6)
    check(mode, "half", torch.bfloat16, "alone", (4, batch, hidden), 0, 8, seed=6)


@pytest.mark.parametrize("engine, dtype", [("ffma", torch.float32), ("half", torch.bfloat16)])
def test_a_state_that_looks_like_a_missing_value(engine, dtype):
    """The NaN that stands for what has not come is stored as another one: no block waits for it."""
    stack = Stack("RNN_TANH", engine, dtype, "grid", (3, 2, 12), 8, 8, stages=2)
    stack.h0[0] = missing(2, 12, like=dtype)
    stack.forward()
    assert stack.hn[0].isnan().all() and stack.hn[1].isnan().all()


def test_a_cluster_of_one_block_is_refused():
    """Its blocks would store by st.async, which is undefined there."""
    for kind in ("forward", "backward"):
        stack = Stack("GRU", "ffma", torch.float32, "alone", (2, 3, 8), 0, 8)
        if kind == "backward":
            stack.forward()
        stack.cluster = True
        states = [torch.zeros(3, 8)]
        with pytest.raises(AssertionError, match="error=1, status=0"):
            stack.forward() if kind == "forward" else stack.backward([None], states, states)
