"""Files that version 0.1.0 wrote (`tests/kept`) are read, served, resumed and learned on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli_for_tests import run
from everalign.correction import NO_GUARDS, CorrectionOptions, Corrector
from everalign.evaluation.scorers import RewardModel
from everalign.learning.run_data import load_run
from everalign.serving.corrector_reload import CorrectorReloader
from everalign.serving.gateway import make_corrections
from everalign.serving.settings import GatewaySettings, UpstreamSettings
from everalign.serving.store import FeedbackStore
from everalign.training import stage
from upstream_for_tests import HTTP, Script, UpstreamServer, serving

KEPT = Path(__file__).parents[1] / "kept"
EXPECTED = json.loads((KEPT / "expected.json").read_text())
STORE = "sqlite:///feedback.db"


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A copy of the files, as the working directory: the runs name their model and data relative to it."""
    shutil.copytree(KEPT, tmp_path / "kept")
    monkeypatch.chdir(tmp_path / "kept")


def run_json(capsys, *arguments):
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def adapter(folder, version):
    return load_file(Path(folder, "versions", version, "adapter", "adapter_model.safetensors"))


@pytest.mark.parametrize("name", EXPECTED["versions"])
def test_a_run_is_listed_with_its_scores(kept, capsys, name):
    listed = run_json(capsys, "versions", name)
    assert [version["version"] for version in listed["versions"]] == EXPECTED["versions"][name]
    assert listed["current"] == EXPECTED["versions"][name][-1]
    if name in EXPECTED["scores"]:
        assert load_run(Path(name)).scores("accuracy").matrix == EXPECTED["scores"][name]


def test_runs_are_reported_side_by_side(kept, capsys):
    run_json(capsys, "report", "run", "rated", "learned", "--output", "report.html")
    assert "brief" in Path("report.html").read_text()


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(kept, capsys, monkeypatch):
    """It continues from the checkpoint within the stage."""
    look, found = stage.latest_checkpoint, []
    monkeypatch.setattr(stage, "latest_checkpoint", lambda *given: found.append(look(*given)) or found[-1])
    run_json(capsys, "learn", "--output", "killed", "--resume")
    assert [path and path.name for path in found] == ["checkpoint-2"]
    assert [version.id for version in load_run(Path("killed")).versions] == ["001-warm", "002-brief"]
    found, expected = adapter("killed", "002-brief"), adapter("run", "002-brief")
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "data"), [("run", "warm"), ("rated", "scored"), ("correcting", "corrections")])
def test_a_finished_run_learns_another_task(kept, capsys, name, data):
    """Its memory, its replayed rows and its held-out rows are read, and scored again."""
    done = run_json(capsys, "learn", "--output", name, "--resume", "--task", f"more=data/{data}.jsonl")
    names = [version["version"] for version in done["versions"]]
    assert names == [*EXPECTED["versions"][name], f"{len(names):03d}-more"]


def test_a_run_is_rolled_back_and_exported(kept, capsys):
    assert run_json(capsys, "rollback", "run")["current"] == "001-warm"
    assert run_json(capsys, "export", "run", "merged")["version"] == "001-warm"
    assert run_json(capsys, "export", "run", "adapter", "--adapter")["version"] == "001-warm"
    assert run_json(capsys, "rollback", "run", "002-brief")["current"] == "002-brief"


def test_a_corrector_gives_the_same_corrections(kept):
    corrector = Corrector.from_pretrained("corrector")
    free = CorrectionOptions(guards=NO_GUARDS, max_new_tokens=12)
    assert [corrector.correct(f"q{i}?", f"no {i}", free).text for i in range(4)] == EXPECTED["corrections"]


def test_a_run_of_corrections_is_served_with_the_store_of_before(kept):
    reloader = CorrectorReloader(Path("correcting"), Corrector.from_pretrained)
    corrector, version = reloader.load()
    with UpstreamServer(lambda _: Script("no 5")) as upstream, FeedbackStore.open(STORE) as store:
        settings = GatewaySettings(upstreams=(UpstreamSettings("default", upstream.url),))
        corrections = make_corrections(settings, corrector, version)
        with serving(upstream, store=store, corrections=corrections, reloader=reloader) as served:
            body = {"model": "small", "messages": [{"role": "user", "content": "q5?"}], "store": True}
            reply = HTTP.post(f"{served.url}/chat/completions", json=body)
            assert (reply.status_code, reply.headers["x-everalign-corrector"]) == (200, "001-edited")
            given = HTTP.post(f"{served.url}/feedback", json={"id": reply.json()["id"], "rating": 1})
            assert given.status_code in (200, 201)
        assert store.stats().exchanges == 21


def test_a_store_is_opened_exported_and_learned_on(kept, capsys):
    stats = run_json(capsys, "feedback", "stats", "--store", STORE)
    assert (stats["exchanges"], stats["feedback"], stats["outcomes"]) == (20, 19, {"applied": 20})
    assert 0 < stats["waiting"] < 19
    exported = run_json(capsys, "feedback", "export", "--store", STORE, "--as", "corrections", "--output", "rows.jsonl")
    assert exported["rows"] > 0
    options = ["--minimum", "1", "--key-share", "1", "--gate", "0.99"]
    code, out, err = run(capsys, "learn", "--from-feedback", STORE, "--output", "learned", *options, "--json")
    assert code in (0, 4), err
    assert [version["version"] for version in json.loads(out)["versions"]] == ["001-feedback-1", "002-feedback-2"]


def test_a_reward_model_gives_the_same_rewards(kept):
    found = RewardModel.from_folder("reward").score(["q1?", "q2?"], ["yes", "no"])
    assert found == pytest.approx(EXPECTED["rewards"], abs=1e-5)


def test_a_killed_scoring_goes_on(kept, capsys):
    scored = run_json(
        capsys, "reward", "score", "--model", "reward", "--data", "data/answers.jsonl", "--output", "scored.jsonl"
    )
    assert (scored["rows"], scored["resumed"]) == (6, 2)
    assert not list(Path().glob("*.partial"))


def test_a_judge_is_not_asked_again(kept, capsys):
    """Nothing listens at its address, so that every score comes from the cache."""
    judge = ["--model", "http://127.0.0.1:9/v1#judge", "--cache", "judge"]
    scored = run_json(capsys, "reward", "score", *judge, "--data", "data/answers.jsonl", "--output", "judged.jsonl")
    assert (scored["answers"], scored["requests"]) == (18, 0)
