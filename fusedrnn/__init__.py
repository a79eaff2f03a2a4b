"""RNN, GRU and LSTM stacks as fused kernels: drop-in for torch.nn's."""

from fusedrnn._version import __version__
from fusedrnn.cuda import cuda_kernels
from fusedrnn.inspect import explain, info
from fusedrnn.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from fusedrnn.quantization import dequantize, quantize
from fusedrnn.swap import swap, unswap

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "__version__",
    "cuda_kernels",
    "dequantize",
    "explain",
    "info",
    "quantize",
    "swap",
    "unswap",
]
