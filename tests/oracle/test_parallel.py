"""Many weights at a time: the same results in the same order, and torch's settings as they were."""

import threading

import pytest
import torch

from everalign.memory import LowRankUpdate, MemoryBank, consolidate_into, for_each_weight


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def consolidated(seed):
    generator = torch.Generator().manual_seed(seed)
    bank, memory = MemoryBank(8), None
    for _ in range(4):
        update = LowRankUpdate(torch.randn(30, 4, generator=generator), torch.randn(4, 20, generator=generator))
        _, memory, _ = consolidate_into(memory, update, bank, rank_cap=5)
    return memory.dense()


def test_results_are_those_of_one_weight_after_the_other(two_threads):
    found = for_each_weight(consolidated, range(12))
    torch.set_num_threads(1)
    for seed, matrix in enumerate(found):
        assert torch.equal(matrix, consolidated(seed))


def test_weights_are_computed_at_the_same_time(two_threads):
    meeting = threading.Barrier(2, timeout=20)
    assert for_each_weight(lambda item: (meeting.wait() >= 0, torch.get_num_threads()), [0, 1]) == [(True, 1)] * 2


def test_an_error_is_raised_and_the_threads_come_back(two_threads):
    with pytest.raises(ZeroDivisionError):
        for_each_weight(lambda item: 1 // item, [1, 0])
    assert torch.get_num_threads() == 2
