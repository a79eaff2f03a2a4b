"""What mypy accepts, with the types that it finds, without an Any in them."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from typing_extensions import assert_type

import fusedrnn
from fusedrnn.modules import AllStates

x, packed = torch.randn(5, 2, 3), pack_sequence([torch.randn(5, 3)])
h = torch.zeros(1, 2, 4)

lstm = fusedrnn.LSTM(3, 4, batch_first=False, device="cpu", dtype=torch.float32, zoneout=(0.1, 0.2))
assert_type(lstm(x), tuple[Tensor, tuple[Tensor, Tensor]])
assert_type(lstm(x, (h, h)), tuple[Tensor, tuple[Tensor, Tensor]])
assert_type(lstm(packed), tuple[PackedSequence, tuple[Tensor, Tensor]])
assert_type(lstm.forward(x), tuple[Tensor, tuple[Tensor, Tensor]])
states = lstm(x, return_all=True)[2]
assert_type(states, AllStates[Tensor, tuple[Tensor, ...]])
assert_type(states.h, tuple[Tensor, ...])
assert_type(states.c[0], Tensor)
assert_type(lstm(packed, return_all=True)[2].c[0], PackedSequence)

gru = fusedrnn.GRU(3, 4, device=torch.device("cpu"), layer_norm=True, recompute=True)
assert_type(gru(x, h), tuple[Tensor, Tensor])
assert_type(gru(x, lengths=[5, 2]), tuple[Tensor, Tensor])
assert_type(gru(x, lengths=np.array([5, 2])), tuple[Tensor, Tensor])
assert_type(gru(x, lengths=torch.tensor([5, 2])), tuple[Tensor, Tensor])
assert_type(gru(x, resets=torch.zeros(5, 2)), tuple[Tensor, Tensor])
assert_type(gru(x, resets=[[True, False]] * 5), tuple[Tensor, Tensor])
assert_type(gru(x, return_all=True), tuple[Tensor, Tensor, AllStates[Tensor, None]])
assert_type(gru(packed, return_all=True)[2].h[0], PackedSequence)

rnn = fusedrnn.RNN(3, 4, 1, "relu", recurrent_dropout=0.1)
assert_type(rnn(x), tuple[Tensor, Tensor])
assert_type(rnn(packed, torch.zeros(1, 1, 4)), tuple[PackedSequence, Tensor])


def either(given: Tensor | PackedSequence, all: bool) -> Tensor | PackedSequence:
    return rnn(given, return_all=all)[0]


assert_type(fusedrnn.RNNCell(3, 4, nonlinearity="relu")(x[0]), Tensor)
assert_type(fusedrnn.GRUCell(3, 4, dtype=torch.float32)(x[0], h[0]), Tensor)
assert_type(fusedrnn.LSTMCell(3, 4)(x[0], (h[0], h[0])), tuple[Tensor, Tensor])

# A layer of ours is one of torch.nn's, as an argument too.
layers: list[nn.RNNBase] = [lstm, gru, rnn]
torch_lstm: nn.LSTM = lstm


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = fusedrnn.LSTM(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


report = fusedrnn.swap(Tagger())
assert_type(report.model, Tagger)
assert_type(report.left[0].reason if report.left else "", str)
assert_type(fusedrnn.unswap(nn.GRU(3, 4)).model, nn.GRU)
assert_type(fusedrnn.explain(gru, x, lengths=[5, 2]), str)
assert_type(fusedrnn.explain(gru, x, members=3), str)
assert_type(fusedrnn.info(), dict[str, str])
