"""RNN, GRU and LSTM stacks as fused kernels: drop-in for torch.nn's."""

import torch  # noqa: F401  (the extension's symbols come from its libraries)

from fusedrnn import _C  # noqa: F401  (registers the ops)
from fusedrnn._version import __version__
from fusedrnn.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell", "__version__"]
