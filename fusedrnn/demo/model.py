"""The language model: one-hot characters, a recurrent layer, a linear layer on its hidden states.

Shapes: T steps, batch B, V tokens in the vocabulary, H hidden units.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fusedrnn.demo.text import Vocabulary

State = Tensor | tuple[Tensor, Tensor] | None  # None is zeros; an LSTM's is (h, c)

CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn": ("RNN", {"nonlinearity": "tanh"}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
}


class CharModel(nn.Module):
    """Predicts the next character at every step.

    With ``integers`` the layer, which must be fusedrnn's, is given the characters' numbers.
    """

    one_hot: Tensor

    def __init__(self, rnn: nn.RNNBase, integers: bool = False) -> None:
        super().__init__()
        self.integers = integers
        vocabulary = rnn.input_size
        self.rnn = rnn
        self.linear = nn.Linear(rnn.hidden_size, vocabulary)
        # A row lookup in the identity is one operation, and follows the model's device and dtype.
        self.register_buffer("one_hot", torch.eye(vocabulary), persistent=False)

    def forward(self, tokens: Tensor, state: State = None) -> tuple[Tensor, State]:
        """tokens (T, B) int64 -> logits (T*B, V) and the state after the last step."""
        hidden, state = self.rnn(tokens if self.integers else self.one_hot[tokens], state)
        return self.linear(hidden.flatten(0, 1)), state


def build(
    library: ModuleType,
    cell: str,
    vocabulary: int,
    hidden: int,
    layers: int,
    dropout: float,
    integers: bool = False,
) -> CharModel:
    """A model whose recurrent layer is ``library``'s: torch.nn or fusedrnn."""
    name, extra = CELLS[cell]
    layer = getattr(library, name)
    rnn = layer(vocabulary, hidden, num_layers=layers, dropout=dropout, **extra)
    return CharModel(rnn, integers)


def detach(state: State) -> State:
    """The state cut from its past, so that gradients stop at the batch's first step."""
    if isinstance(state, tuple):
        h, c = state
        return h.detach(), c.detach()
    return None if state is None else state.detach()


@torch.no_grad()
def generate(
    model: CharModel,
    vocabulary: Vocabulary,
    prefix: str,
    count: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """``prefix`` and ``count`` characters, drawn one by one from what the model expects.

    Its logits are divided by ``temperature``; at 0 the likeliest character is taken.
    """
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    tokens = vocabulary.encode(prefix).to(model.one_hot.device)[:, None]  # (T, 1)
    state: State = None
    drawn: list[int] = []
    for _ in range(count):
        logits, state = model(tokens, state)
        last = logits[-1].double().cpu()  # drawn alike on every device
        if temperature:
            chances = (last / temperature).softmax(0)
            drawn.append(int(torch.multinomial(chances, 1, generator=generator)))
        else:
            drawn.append(int(last.argmax()))
        tokens = tokens.new_tensor([drawn[-1:]])
    model.train(was_training)
    return prefix + vocabulary.decode(drawn)
