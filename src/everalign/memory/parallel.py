"""Small matrix algebra of many weights at once: a processor for each weight, where one weight cannot use them all."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def for_each_weight(work: Callable[[Item], Result], weights: Sequence[Item]) -> list[Result]:
    """Return `work` of every item, in their order, as many at a time as torch has threads.

    Decompositions of small matrices run on one processor whatever torch is told, so that the others would wait. Every
    item is computed with one thread: results do not depend on the number of processors.

    Args:
        work: takes no lock and shares nothing that it writes with its other calls; its first error is raised.
        weights: the items.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max_workers=threads) as pool:
            return list(pool.map(work, weights))
    finally:
        torch.set_num_threads(threads)
