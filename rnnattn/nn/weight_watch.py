"""`WeightWatch`: notices that the weights of a module are not those that something was derived from any more.

Writes that torch counts, and other tensors or other memory in a parameter's place, are seen at once. Writes
behind torch's back (`p.data.mul_()`, a numpy view) leave no trace but the numbers: each check compares one
part in `PARTS` of all bytes with what 64 bits tell of them as they were. It takes the parts from all over, so
that a write to a whole matrix is seen within a few checks, and one to a single number within `PARTS`.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from rnnattn.backends.cpp import weight_watch

PARTS = 256


class WeightWatch:
    """Watches parameters of a module, which it holds weakly: once the module is gone, so is its watch.

    A copy by `copy.deepcopy` watches the module's copy where that was made in the same go, else the same
    module; what is unpickled watches nothing.
    """

    def __init__(self, module: nn.Module | None, names: list[str]) -> None:
        """module: None to watch nothing. names: the direct parameters of the module to watch."""
        self._names = names
        self._owner = type(module).__name__
        self._module: weakref.ref[nn.Module] | None = None
        if module is None:
            return
        # It keeps the parameters' memory, which is to go with the module.
        self._watch = watch = [weight_watch(names, [module.get_parameter(name) for name in names], PARTS)]
        self._module = weakref.ref(module, lambda _: watch.clear())

    def check(self) -> None:
        """Raises RuntimeError where a change is seen."""
        module = None if self._module is None else self._module()
        if module is None:
            return
        change = self._watch[0].check(module._parameters)
        if change is not None:
            name, what = change
            raise RuntimeError(
                f"{self._owner}: weights changed after prepare_inference() ({name} {what}); call it again"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightWatch:
        module = None if self._module is None else self._module()
        if module is not None:
            for _ in range(self._watch[0].parts):
                self.check()  # a change up to now must not pass for the copy's own weights
            module = memo.get(id(module), module)
        return WeightWatch(module, self._names)

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightWatch, (None, self._names)
