"""Methods in files: what is refused, what names a run, and what the project's own controls take away."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from everalign.data import PreferenceSet
from everalign.data.tokenization import TokenizedRow
from everalign.errors import InputError
from everalign.memory import LowRankUpdate
from everalign.methods import ExperienceReplay, LifeAlign, Task, make_method

CONTROLS = f"{Path(__file__).parents[2] / 'bench' / 'controls.py'}:"
MINE = "from everalign.methods import ExperienceReplay\nclass Mine(ExperienceReplay):\n    {}\n"


def test_a_method_in_a_file_is_named_by_its_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.py"
    file.write_text(MINE.format("pass"))
    method = make_method("mine.py:Mine", replay=0.5)
    assert isinstance(method, ExperienceReplay)
    assert method.settings() == ExperienceReplay(replay=0.5).settings()
    assert method.name.startswith("mine.py:Mine ")
    assert make_method("mine.py:Mine").name == method.name
    file.write_text(MINE.format("x = 1"))
    assert make_method("mine.py:Mine").name != method.name
    assert ExperienceReplay.name == "er"
    with pytest.raises(InputError, match=r"keep means nothing to the method 'mine\.py:Mine'"):
        make_method("mine.py:Mine", keep=0.5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.py:Mine", None, r"gone\.py:Mine: gone\.py: no such file in /"),
        ("a.py:Mine", "class Mine(:\n", r"a\.py:1: invalid syntax"),
        ("a.py:Mine", "import nothing_like_it\n", "cannot be loaded: ModuleNotFoundError: No module"),
        ("a.py:Other", MINE.format("pass"), "has no class Other of a method; it has Mine"),
        (
            "a.py:LifeAlign",
            "from everalign.methods import LifeAlign\n",
            "has no class LifeAlign of a method; it has none",
        ),
        ("a.py:path", "from os import path\n", "has no class path of a method; it has none"),
        ("a.py:Mine", MINE.format("regime = 'joint'"), "must learn its tasks in sequence, and this one is joint"),
    ],
)
def test_what_is_no_method_is_refused(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "a.py").write_text(content)
    with pytest.raises(InputError, match=message):
        make_method(name)


def test_the_norm_matched_update_has_the_norm_of_the_consolidated_one():
    torch.manual_seed(0)
    control, whole = make_method(f"{CONTROLS}NormMatchedShrink", energy=0.8), LifeAlign(energy=0.8, space="product")
    memories, banks = [None, None], [control.new_bank(), control.new_bank()]
    for _ in range(3):
        update = LowRankUpdate(torch.randn(12, 4), torch.randn(4, 10))
        before = memories[0]
        for i, method in enumerate((control, whole)):
            result, memories[i], _ = method.refine(memories[i], update, banks[i])
        added = memories[0].dense() - (0 if before is None else before.dense())
        assert added.norm() == pytest.approx(result.norm, rel=1e-4)
        assert torch.allclose(added / added.norm(), update.dense() / update.norm(), atol=1e-4)


def test_swapped_replay_exchanges_the_labels_of_earlier_tasks_alone():
    rows = PreferenceSet.of([{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(10)])
    method = make_method(f"{CONTROLS}SwappedReplay", replay=0.5)
    method.end_task(None, Task("first", rows, 1, 7))
    plain = ExperienceReplay(replay=0.5)
    plain.end_task(None, Task("first", rows, 1, 7))
    second = Task("second", rows, 2, 8)
    assert [(row.prompt, row.rejected, row.chosen) for row in method.rows(second)] == [
        (row.prompt, row.chosen, row.rejected) for row in plain.rows(second)
    ]
    assert len(method.rows(second)) == 5
    assert method.own_rows(second) == rows


def test_permuted_anchors_are_those_of_other_pairs_per_token():
    method, plain = make_method(f"{CONTROLS}PermutedAnchors", anchors=0.1), ExperienceReplay(anchors=0.1)
    rows = [TokenizedRow.pair(str(i), [1], [2] * (i + 1), [3] * (2 * i + 1), 1.0) for i in range(9)]
    kept = {"anchors": -torch.arange(1.0, 17.0), "anchor_sizes": torch.full((8,), 2)}
    stage = SimpleNamespace(rows=rows, own=1, replayed=8, learned=9, objective=SimpleNamespace(first_is_best=True))
    found = []
    for one in (method, plain):
        one.load_state_dict(kept)
        found.append(one.begin_stage(stage).values)
    permuted, own = ([value / torch.tensor([len(r) for r in row.responses]) for value, row in
                      zip(values["anchor"], rows, strict=True)] for values in found)  # fmt: skip
    assert torch.equal(permuted[0], own[0])
    pairs = [[tuple(round(x, 4) for x in pair.tolist()) for pair in values[1:]] for values in (permuted, own)]
    assert sorted(pairs[0]) == sorted(pairs[1])
    assert pairs[0] != pairs[1]
    assert all(torch.equal(*signs) for signs in zip(*(values["anchor_sign"] for values in found), strict=True))
    assert [torch.equal(a, b) for a, b in zip(method.begin_stage(stage).values["anchor"], found[0]["anchor"],
            strict=True)] == [True] * 9  # fmt: skip
    with pytest.raises(InputError, match="there would be none to permute"):
        make_method(f"{CONTROLS}PermutedAnchors", anchors=0.0)
