"""The replay buffer: how many rows, which ones, which go first, and what a file of them holds."""

import random

import pytest

from everalign.data.records import Preference
from everalign.data.replay import ReplayBuffer
from everalign.errors import InputError
from everalign.learning.options import MethodOptions


def task_rows(name, count):
    return [Preference(f"{name} {i}", "good", "bad") for i in range(count)]


@pytest.mark.parametrize(
    ("fraction", "count", "kept"), [(0.2, 14, 2), (0.2, 4, 0), (0.29, 100, 29), (1.0, 7, 7), (0.0, 50, 0)]
)
def test_the_share_is_rounded_down_and_drawn_without_replacement(fraction, count, kept):
    buffer, rows = ReplayBuffer(), task_rows("a", count)
    assert buffer.add("a", rows, fraction) == kept
    assert len(buffer) == len(set(buffer.ids())) == kept
    assert set(buffer.rows()) <= set(rows)


def test_default_share_and_capacity_are_those_of_the_method():
    buffer = ReplayBuffer()
    assert buffer.capacity == 3000
    assert buffer.add("a", task_rows("a", 100)) == 20


def test_the_draw_depends_on_seed_and_task_and_on_nothing_global():
    def positions(task, seed):
        buffer = ReplayBuffer()
        buffer.add(task, task_rows("same", 200), seed=seed)
        return buffer.ids()

    random.seed(1)
    state = random.getstate()
    first = positions("a", 0)
    assert random.getstate() == state
    random.seed(2)
    assert positions("a", 0) == first
    assert positions("a", 1) != first
    assert positions("b", 0) != first


def test_every_row_can_be_drawn_and_order_is_random():
    rows, drawn = task_rows("a", 20), set()
    for seed in range(60):
        buffer = ReplayBuffer()
        buffer.add("a", rows, seed=seed)
        drawn.update(buffer.ids())
    assert drawn == {row.id for row in rows}
    whole = ReplayBuffer()
    whole.add("a", rows, fraction=1.0)
    assert whole.ids() != [row.id for row in rows]


def test_the_oldest_rows_leave_first():
    buffer = ReplayBuffer(capacity=10)
    buffer.add("a", task_rows("a", 8), fraction=1.0)
    before = buffer.ids()
    buffer.add("b", task_rows("b", 5), fraction=1.0)
    assert buffer.ids()[:5] == before[3:]
    assert buffer.tasks() == {"a": 5, "b": 5}
    buffer.add("c", task_rows("c", 30), fraction=0.5)
    assert buffer.tasks() == {"c": 10}


def test_a_balanced_buffer_drops_rows_of_the_largest_task():
    buffer = ReplayBuffer(capacity=12)
    for name, count, sizes in [
        ("a", 30, {"a": 12}),
        ("b", 3, {"a": 9, "b": 3}),
        ("c", 30, {"a": 4, "b": 3, "c": 5}),
        ("d", 1, {"a": 4, "b": 3, "c": 4, "d": 1}),
    ]:
        before, rows = buffer, task_rows(name, count)
        buffer = before.balanced_with(name, rows, 1.0, seed=0)
        assert buffer.tasks() == sizes
        assert {*buffer.rows(exclude_task=name)} <= {*before.rows()}
        again = ReplayBuffer(30)
        again.add(name, rows, fraction=1.0)
        assert [row for row in buffer.rows() if row in rows] == again.rows()[count - sizes[name] :]
    small = ReplayBuffer(1)
    for name in "ab":
        small = small.balanced_with(name, task_rows(name, 4), 1.0, seed=0)
        assert small.tasks() == {name: 1}


def test_rows_without_one_task():
    buffer = ReplayBuffer()
    for name in "abc":
        buffer.add(name, task_rows(name, 10))
    assert [row.prompt[0] for row in buffer.rows(exclude_task="b")] == ["a", "a", "c", "c"]
    assert [row.prompt[0] for row in buffer.rows()] == ["a", "a", "b", "b", "c", "c"]
    assert buffer.tasks() == {"a": 2, "b": 2, "c": 2}


def test_a_file_holds_the_rows_themselves(tmp_path):
    chat = ({"role": "user", "content": "Grüße\n\u2028"},)
    buffer = ReplayBuffer()
    buffer.add("héllo", [Preference(chat, "good", "bad", weight=0.1)], fraction=1.0)
    buffer.add("b", task_rows("b", 10))
    path = tmp_path / "replay.jsonl"
    buffer.to_jsonl(path)
    again = ReplayBuffer.from_jsonl(path)
    assert again.rows() == buffer.rows()
    assert (again.tasks(), again.capacity) == (buffer.tasks(), 3000)
    again.add("c", task_rows("c", 10))
    buffer.add("c", task_rows("c", 10))
    assert again.ids() == buffer.ids()
    assert ReplayBuffer.from_jsonl(path, capacity=2).ids() == buffer.ids()[1:3]


def test_an_empty_buffer_is_an_empty_file(tmp_path):
    ReplayBuffer().to_jsonl(tmp_path / "replay.jsonl")
    assert len(ReplayBuffer.from_jsonl(tmp_path / "replay.jsonl")) == 0


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "p", "chosen": "a", "rejected": "b"}', ":1: field 'task'"),
        ('{"task": "t", "prompt": "p", "chosen": "a"}', ":1: field 'rejected'"),
        ("{", ":1: broken JSON"),
    ],
)
def test_damaged_files_are_refused(tmp_path, line, expected):
    path = tmp_path / "replay.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=expected):
        ReplayBuffer.from_jsonl(path)


def test_senseless_sizes_are_refused():
    with pytest.raises(InputError, match="replay capacity: must be at least 1, found 0") as error:
        ReplayBuffer(0)
    assert error.value.field == "capacity"
    with pytest.raises(InputError, match=r"^capacity must be"):
        MethodOptions(capacity=0)
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="replay fraction: must lie between 0 and 1"):
            ReplayBuffer().add("a", [], fraction)
