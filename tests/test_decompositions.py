"""run_decompositions() leaves nothing of ours; torch.export and Inductor keep the ops."""

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fusedrnn
from fusedrnn import decompositions

DYNAMIC = {0: Dim("T", min=2), 1: Dim("B", min=2)}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Model(nn.Module):
    """Each option of a call on some layer."""

    def __init__(self):
        super().__init__()
        self.lstm = fusedrnn.LSTM(3, 5, 2, bidirectional=True, proj_size=2, zoneout=(0.1, 0.2))
        self.gru = fusedrnn.GRU(4, 3, layer_norm=True)
        self.rnn = fusedrnn.RNN(7, 3, nonlinearity="relu", bias=False)

    def forward(self, x, tokens, lengths, resets):
        x, states, everything = self.lstm(x, lengths=lengths, resets=resets, return_all=True)
        return x, states, everything, self.gru(x), self.rnn(tokens, lengths=lengths)


def inputs_of(steps, batch):
    lengths = torch.tensor([steps, 0, 2][:batch])
    resets = torch.rand(steps, batch) < 0.3
    return torch.randn(steps, batch, 3), torch.randint(7, (steps, batch)), lengths, resets


def ours(program):
    return [str(n.target) for n in program.graph.nodes if "fusedrnn" in str(n.target)]


def assert_decomposed(model, inputs, shapes, more=()):
    program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    assert ours(program)
    decomposed = program.run_decompositions()
    assert not ours(decomposed)
    for given in (inputs, *more):
        found, expected = decomposed.module()(*given), model(*given)
        for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            if a is None and b is None:
                continue
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return {n.target for n in decomposed.graph.nodes if n.op == "call_function"}


def test_any_number_of_steps():
    layer = fusedrnn.LSTM(3, 4, bidirectional=True).eval()
    x, longer = torch.randn(5, 3, 3), torch.randn(9, 2, 3)
    targets = assert_decomposed(layer, (x,), (DYNAMIC,), [(longer,)])
    assert torch.ops.higher_order.scan in targets


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_option(dynamic):
    shapes = [DYNAMIC, DYNAMIC, {0: DYNAMIC[1]}, DYNAMIC] if dynamic else None
    more = [inputs_of(9, 2)] if dynamic else []
    targets = assert_decomposed(Model().eval(), inputs_of(5, 3), shapes, more)
    assert (torch.ops.higher_order.scan in targets) == dynamic


def trains_without_ours(layer, x, state):
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.code))
        return graph

    table = torch._decomp.core_aten_decompositions()
    backend = aot_autograd(fw_compiler=keep, decompositions=table)
    data = x.data if isinstance(x, PackedSequence) else x
    leaves, results = [data, *layer.parameters()], []
    for call in (layer, torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)):
        y, (h, c) = call(x, state)
        y = y.data if isinstance(y, PackedSequence) else y
        results += torch.autograd.grad(y.square().sum() + h.sum() + c.prod(), leaves)
    assert len(graphs) == 2 and "fusedrnn" not in "".join(graphs)
    for a, b in zip(results[: len(leaves)], results[len(leaves) :], strict=True):
        torch.testing.assert_close(a, b)


def test_training_in_a_backend_that_knows_only_aten():
    h, c = torch.randn(2, 2, 2, 4)
    x = torch.randn(4, 2, 3, requires_grad=True)
    trains_without_ours(fusedrnn.LSTM(3, 4, bidirectional=True), x, (h, c))


@pytest.mark.slow
def test_packed_input():
    layer = fusedrnn.LSTM(3, 4, 2, bidirectional=True)
    h, c = torch.randn(2, 4, 3, 4)
    x = pack_padded_sequence(torch.randn(5, 3, 3), [2, 5, 3], enforce_sorted=False)
    for states in ((h, c), None):
        assert_decomposed(layer, (x, states), None)
    x = pack_padded_sequence(torch.randn(5, 3, 3, requires_grad=True), [5, 3, 2])
    trains_without_ours(layer, x, (h, c))


def test_the_ops_can_be_kept():
    program = torch.export.export(fusedrnn.GRU(3, 4), (torch.randn(5, 2, 3),))
    assert ours(program.run_decompositions({}))
    table = torch.export.default_decompositions()
    for op in decompositions.TABLE:
        del table[op]
    assert ours(program.run_decompositions(table))


def test_inductor_keeps_the_ops():
    from torch._inductor.decomposition import decompositions as table

    assert not [op for op in table if "fusedrnn" in str(op)]
