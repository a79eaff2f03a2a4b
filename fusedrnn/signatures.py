"""The types of the public interface.

`Call` tells type checkers what a call of a layer returns, which depends on its arguments. Nothing
of it exists at run time, where `fused.Fused.forward` takes every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, Literal, Protocol, TypeAlias, TypeVar, overload

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import NamedTuple  # typing's takes no Generic before Python 3.11


class HasArray(Protocol):
    """An array of NumPy, and what converts itself to one."""

    @property
    def __array__(self) -> object: ...


# What `lengths` and `resets` may be.
Lengths: TypeAlias = Tensor | HasArray | Sequence[int]
Flags: TypeAlias = Sequence[float] | Sequence[Sequence[float]]  # bools too
Resets: TypeAlias = Tensor | PackedSequence | HasArray | Flags

Steps = TypeVar("Steps", Tensor, PackedSequence)
Cells = TypeVar("Cells")


class AllStates(NamedTuple, Generic[Steps, Cells]):
    """The states of every layer at every step.

    `h[l]` has the shape of the output, with zeros past a length; `h[-1]` is the output. `c[l]` of
    an LSTM has hidden_size in place of proj_size; `c` is None for other layers. The directions are
    concatenated as in the output. For packed input each is a PackedSequence.

    Its parameters are the types of an output and of `c`, such as `AllStates[Tensor, None]`.
    """

    h: tuple[Steps, ...]
    c: Cells


Pair: TypeAlias = tuple[Tensor, Tensor]
# What the forward of any layer takes and returns.
Input: TypeAlias = Tensor | PackedSequence
States: TypeAlias = Tensor | Pair
AnyStates: TypeAlias = (
    AllStates[Tensor, None]
    | AllStates[Tensor, tuple[Tensor, ...]]
    | AllStates[PackedSequence, None]
    | AllStates[PackedSequence, tuple[PackedSequence, ...]]
)
Results: TypeAlias = tuple[Input, States] | tuple[Input, States, AnyStates]

if TYPE_CHECKING:
    from fusedrnn.fused import Fused
    from fusedrnn.single_step import SingleStep

    State = TypeVar("State")
    TensorCells = TypeVar("TensorCells")
    PackedCells = TypeVar("PackedCells")

    class Call(Fused, Generic[State, TensorCells, PackedCells]):
        """`State` is the type of hx; the others are those of `c` in `AllStates`."""

        @overload  # type: ignore[no-overload-impl, override]  # one state or two, never either
        def forward(
            self,
            input: Tensor,
            hx: State | None = None,
            *,
            lengths: Lengths | None = None,
            resets: Resets | None = None,
            return_all: Literal[False] = False,
        ) -> tuple[Tensor, State]: ...
        @overload
        def forward(
            self,
            input: Tensor,
            hx: State | None = None,
            *,
            lengths: Lengths | None = None,
            resets: Resets | None = None,
            return_all: Literal[True],
        ) -> tuple[Tensor, State, AllStates[Tensor, TensorCells]]: ...
        @overload
        def forward(
            self,
            input: Tensor,
            hx: State | None = None,
            *,
            lengths: Lengths | None = None,
            resets: Resets | None = None,
            return_all: bool,
        ) -> tuple[Tensor, State] | tuple[Tensor, State, AllStates[Tensor, TensorCells]]: ...
        @overload
        def forward(
            self,
            input: PackedSequence,
            hx: State | None = None,
            *,
            resets: Resets | None = None,
            return_all: Literal[False] = False,
        ) -> tuple[PackedSequence, State]: ...
        @overload
        def forward(
            self,
            input: PackedSequence,
            hx: State | None = None,
            *,
            resets: Resets | None = None,
            return_all: Literal[True],
        ) -> tuple[PackedSequence, State, AllStates[PackedSequence, PackedCells]]: ...
        @overload
        def forward(
            self,
            input: PackedSequence,
            hx: State | None = None,
            *,
            resets: Resets | None = None,
            return_all: bool,
        ) -> (
            tuple[PackedSequence, State]
            | tuple[PackedSequence, State, AllStates[PackedSequence, PackedCells]]
        ): ...

        __call__ = forward

    OneState: TypeAlias = Call[Tensor, None, None]
    TwoStates: TypeAlias = Call[Pair, tuple[Tensor, ...], tuple[PackedSequence, ...]]

    class Step(SingleStep, Generic[State]):
        """The call of a cell."""

        def forward(  # type: ignore[override]
            self, input: Tensor, hx: State | None = None
        ) -> State: ...

        __call__ = forward

    OneStateCell: TypeAlias = Step[Tensor]
    TwoStatesCell: TypeAlias = Step[Pair]
