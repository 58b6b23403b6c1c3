"""What keeps a few from teaching everybody: agreement between keys, and a bound on what comes from one key.

A key's users are not counted one by one: whoever has the key can name as many as they like.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

CONTRADICTORY = "contradictory"
OUTVOTED = "outvoted"

Item = TypeVar("Item")
Group = TypeVar("Group", bound=Hashable)


def agreed(
    items: Sequence[Item],
    vote: Callable[[Item], tuple[Hashable, Hashable] | None],
    key: Callable[[Item], str],
    least: float,
) -> tuple[list[Item], list[tuple[Item, str]]]:
    """Keep what agrees with the majority of the keys that judged the same.

    Every key has one vote on a subject, which is that of its own majority.

    Args:
        items: all that are known.
        vote: the subject, and what is said of it; None for an item that says nothing, which is kept.
        key: whose item it is.
        least: share of the votes that a majority needs.

    Returns:
        Those kept, and the others with the reason: contradictory where there is no such majority, else outvoted.
    """
    votes: dict[Hashable, dict[str, list[Hashable]]] = defaultdict(lambda: defaultdict(list))
    cast = [vote(item) for item in items]
    for item, said in zip(items, cast, strict=True):
        if said is not None:
            votes[said[0]][key(item)].append(said[1])
    verdicts = {subject: _verdict(keys.values(), least) for subject, keys in votes.items()}
    kept: list[Item] = []
    left: list[tuple[Item, str]] = []
    for item, said in zip(items, cast, strict=True):
        verdict = None if said is None else verdicts[said[0]]
        if said is None or said[1] == verdict:
            kept.append(item)
        else:
            left.append((item, CONTRADICTORY if verdict is None else OUTVOTED))
    return kept, left


def most_of_each(sizes: Iterable[int], share: float) -> int:
    """Return the most members that each of several groups may have so that none has more than `share` of all kept.

    With `most`, a group of size n keeps min(n, most) of its members; the others then count for less, too. 0 where no
    number will do, because there are too few groups.
    """
    counts = sorted(sizes)
    for most in range(counts[-1] if counts else 0, 0, -1):
        if most <= share * sum(min(count, most) for count in counts):
            return most
    return 0


def first_of_each(
    items: Sequence[Item], group: Callable[[Item], Group], most: Callable[[Group], int]
) -> tuple[list[Item], list[Item]]:
    """Return the first items of every group, at most so many of each, in their order; and the others."""
    seen: Counter[Group] = Counter()
    kept: list[Item] = []
    left: list[Item] = []
    for item in items:
        name = group(item)
        seen[name] += 1
        (kept if seen[name] <= most(name) else left).append(item)
    return kept, left


def _verdict(keys: Iterable[Sequence[Hashable]], least: float) -> Hashable | None:
    found = [_majority(votes, least) for votes in keys]
    return _majority([vote for vote in found if vote is not None], least)


def _majority(votes: Sequence[Hashable], least: float) -> Hashable | None:
    """What most say, where these are at least a share of all and no tie."""
    first, second = [*Counter(votes).most_common(2), (None, 0), (None, 0)][:2]
    return first[0] if first[1] > second[1] and first[1] >= least * len(votes) else None
