"""What mypy refuses: where it does not, the comment is unused, which is an error too."""

import torch
from torch import nn

import fusedrnn

x = torch.randn(5, 2, 3)
h = torch.zeros(1, 2, 4)

fusedrnn.LSTM("three", 4)  # type: ignore[arg-type]
fusedrnn.LSTM(3, hidden=4)  # type: ignore[call-arg]
fusedrnn.LSTM(3, 4, dtype="float32")  # type: ignore[arg-type]
fusedrnn.GRU(3, 4, zoneout=(0.1, 0.2))  # type: ignore[arg-type]
fusedrnn.GRU(3, 4, proj_size=2)  # type: ignore[call-arg]
fusedrnn.RNN(3, 4, layer_norm=True)  # type: ignore[call-arg]
fusedrnn.LSTMCell("three", 4)  # type: ignore[arg-type]
fusedrnn.LSTMCell(3, 4, device=3.5)  # type: ignore[arg-type]

lstm, gru = fusedrnn.LSTM(3, 4), fusedrnn.GRU(3, 4)
lstm("text")  # type: ignore[call-overload]
lstm(x, h)  # type: ignore[call-overload]
gru(x, (h, h))  # type: ignore[call-overload]
gru(x, lengths="52")  # type: ignore[arg-type]
gru(x, lengths=5)  # type: ignore[call-overload]
gru(x, length=[5, 2])  # type: ignore[call-overload]
gru(x, return_all=True)[2].c[0]  # type: ignore[index]
gru(x)[2]  # type: ignore[misc]
lstm(x)[1] + 1  # type: ignore[operator]
fusedrnn.GRUCell(3, 4)(x, (h, h))  # type: ignore[arg-type]

model = nn.Sequential(nn.LSTM(3, 4))
fusedrnn.swap(model).train()  # type: ignore[attr-defined]
fusedrnn.swap(model)(x)  # type: ignore[operator]
fusedrnn.swap("model")  # type: ignore[type-var]
fusedrnn.explain("model", x)  # type: ignore[arg-type]
