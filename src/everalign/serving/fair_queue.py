"""A queue that several keys share: each has its turn, and the one that has most waiting is the one to give way."""

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """What waits."""

    @property
    def key(self) -> str:
        """Whose it is."""
        ...

    @property
    def gone(self) -> bool:
        """Whether nobody waits for it any more."""
        ...


_Item = TypeVar("_Item", bound=Waiting)


class FairQueue(Generic[_Item]):
    """Items in order within a key, and keys in turn.

    Args:
        most: items that wait.
    """

    def __init__(self, most: int) -> None:
        self._most, self._size = most, 0
        self._keys: OrderedDict[str, deque[_Item]] = OrderedDict()

    def __len__(self) -> int:
        return self._size

    def put(self, item: _Item) -> _Item | None:
        """Add an item, and return the one that has no place: None, another key's newest, or the item itself."""
        if self._size >= self._most:
            self._forget()
        given_way = None
        if self._size >= self._most:
            most = max(self._keys.values(), key=len)
            if len(most) <= len(self._keys.get(item.key, ())) + 1:
                return item
            given_way = most.pop()
            self._size -= 1
        self._keys.setdefault(item.key, deque()).append(item)
        self._size += 1
        return given_way

    def put_back(self, item: _Item) -> None:
        """Put an item that was taken to the front of its key."""
        self._keys.setdefault(item.key, deque()).appendleft(item)
        self._keys.move_to_end(item.key, last=False)
        self._size += 1

    def take(self, may: Callable[[_Item], bool]) -> _Item | None:
        """Return the first item of the next key that may be taken; None where there is none."""
        for key in tuple(self._keys):
            waiting = self._keys[key]
            while waiting and waiting[0].gone:
                waiting.popleft()
                self._size -= 1
            if not waiting:
                del self._keys[key]
            elif may(waiting[0]):
                self._size -= 1
                item = waiting.popleft()
                self._keys.move_to_end(key)
                return item
        return None

    def _forget(self) -> None:
        for key, waiting in tuple(self._keys.items()):
            self._keys[key] = deque(item for item in waiting if not item.gone)
            if not self._keys[key]:
                del self._keys[key]
        self._size = sum(len(waiting) for waiting in self._keys.values())
