"""What is held in memory at most while something is computed, counted by tensors and not by the machine."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts tensors that exist at the same time, of those that operations have made inside the `with` block.

    Args:
        counted: which of them; views of counted ones and what is written in place count once.

    Attributes:
        most: the largest number of elements at any time, each as a half where it has two bytes.
    """

    def __init__(self, counted: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self._counted, self._known, self._now, self.most = counted, set(), 0.0, 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and self._counted(tensor):
                self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() / 4
        if key in self._known:
            return
        self._known.add(key)
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: float) -> None:
        self._known.discard(key)
        self._now -= size


class Operations(TorchDispatchMode):
    """Counts the operations inside the `with` block, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function._opname] += 1
        return function(*args, **(kwargs or {}))


def saved_bytes(compute: Callable[[], Tensor], parameters: Any) -> tuple[Tensor, int]:
    """Return what `compute` gives, and the bytes that are kept for its backward pass besides the parameters."""
    owned = {parameter.untyped_storage()._cdata for parameter in parameters}
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            found[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    return result, sum(size for size, _ in found.values())
