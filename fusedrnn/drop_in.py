"""What every public class of fusedrnn shares: how tools that know torch.nn's classes treat it."""

from __future__ import annotations

import warnings
from typing import Any

from torch import fx, nn

PUBLIC = "fusedrnn.modules"  # where the public classes are


class DropIn(nn.Module):
    """How torch.fx, torch.jit and `repr` treat our classes: as torch.nn's of the same names.

    Subclasses of ours are treated like subclasses of torch.nn's: their own forward counts.
    """

    def _is_public(self) -> bool:
        return type(self).__module__ == PUBLIC

    def only_ours(self) -> str | None:
        """What this module does that torch.nn's class does not, None if nothing."""
        return None

    def _is_leaf(self, input: Any) -> bool:
        """Whether torch.fx is tracing, and to record the call instead of looking into it."""
        return isinstance(input, fx.Proxy) and self._is_public()

    def _record(self, input: Any, hx: Any, **kwargs: Any) -> Any:
        """A Proxy in place of the results; `input` is one too."""
        path = input.tracer.path_of_module(self)
        return input.tracer.create_proxy("call_module", path, (input, hx), kwargs)

    def __repr__(self) -> str:
        """torch.nn's, with the package, so that the `repr` of a model shows what was swapped."""
        text = super().__repr__()
        return f"fusedrnn.{text}" if self._is_public() else text

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles, and leaves in the model: torch.nn's own class."""
        if not self._is_public():
            return self
        plain = getattr(nn, type(self).__name__)
        regularisers = self.only_ours()
        if regularisers:
            raise ValueError(
                f"torch.jit.script takes torch.nn's class, which has no {regularisers}"
            )
        warnings.warn(
            f"torch.jit.script puts torch.nn.{plain.__name__} in the place of fusedrnn's, also in "
            "the model that it is given: fusedrnn.swap undoes that",
            stacklevel=2,
        )
        twin = nn.Module.__new__(plain)
        twin.__dict__.update(self.__dict__)
        return twin
