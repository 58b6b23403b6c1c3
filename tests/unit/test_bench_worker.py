"""Which failures of a run are results, and which stop the bench: only training that diverges would do so again."""

import json
from pathlib import Path

import pytest
import yaml

from everalign.bench import worker
from everalign.bench.data import load_rows
from everalign.bench.recipe import Bench
from everalign.bench.records import Records, plan
from everalign.errors import DivergedError, EveralignError


@pytest.fixture
def bench(tmp_path):
    content = {
        "models": ["tiny"],
        "tasks": {"a": {"train": "demo:careful", "test": "demo:careful", "limit": 4}},
        "seeds": [0],
        "contenders": {"er": {"method": "er", "objective": "dpo"}, "plain": {"method": "none"}},
    }
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump(content))
    return Bench.read(path)


def execute(bench, folder: Path, contender: str) -> Path:
    rows, records = load_rows(bench, "validation"), Records(folder)
    (run,) = plan(bench, "validation", rows, {"tiny": {contender: {}}}, [contender])
    place = worker.Place(
        *(folder / "runs" / run.name, records.path(run), records.answers(run), folder / "log", folder / "cache"),
        *("code", False),
    )
    worker.execute(run, place, lambda *_: None, lambda _: None)
    return place.record


def raising(error):
    def fail(*_):
        raise error

    return fail


def test_training_that_diverges_is_recorded(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "_learned", raising(DivergedError("step 3: the loss became nan")))
    record = execute(bench, tmp_path, "er")
    assert json.loads(record.read_text())["failed"] == "step 3: the loss became nan"


@pytest.mark.parametrize(
    ("contender", "error"),
    [("er", EveralignError("the disk is full")), ("plain", DivergedError("NaN with this instruction"))],
)
def test_what_may_not_happen_again_is_no_result(bench, tmp_path, monkeypatch, contender, error):
    for name in ("_learned", "load_base"):
        monkeypatch.setattr(worker, name, raising(error))
    with pytest.raises(type(error), match=str(error)):
        execute(bench, tmp_path, contender)
    assert not (tmp_path / "records").exists()


def test_passes_over_rows_are_no_stages_of_a_run():
    said = []
    progress, figures = worker._by_stage(lambda *place: said.append(place))
    progress("evaluating the base model", 8, 8)
    for _ in ("first", "second"):
        figures("fpo", 0, {})
        progress("fpo", 1, 2)
        figures("fpo", 1, {"loss": 0.5})
        progress("fpo", 2, 2)
        progress("evaluating a", 8, 8)
    assert said == [("fpo 1", 1, 2), ("fpo 1", 2, 2), ("fpo 2", 1, 2), ("fpo 2", 2, 2)]
