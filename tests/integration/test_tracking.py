"""What a run writes and passes on while it trains: training.jsonl, and experiment trackers."""

import json
import sys
from types import SimpleNamespace

import pytest

from cli_for_tests import FAST, make_workspace, run
from everalign.errors import InputError
from everalign.learning.options import TrainingOptions, check_trackers
from everalign.learning.tracking import Attempt, Tracker
from everalign.methods import ExperienceReplay
from learner_for_tests import FAST as LEARNER_FAST
from learner_for_tests import held_out, make_learner, save_model, task_rows

PLACE = ("version", "stage", "round", "step")


def lines(folder):
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def places(folder):
    return [tuple(line[name] for name in PLACE) for line in lines(folder)]


def learn(model, folder, **arguments):
    learner = make_learner(model, folder, ExperienceReplay(replay=0.3), "dpo", **arguments)
    for name in ("warm", "brief"):
        learner.learn(task_rows(name), name, held_out(name))
    return learner


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model", layers=2)


def test_each_logged_step_is_a_line_that_tells_where_it_is(model, tmp_path):
    learner = learn(model, tmp_path / "run")
    found = lines(tmp_path / "run")
    assert {line["task"] for line in found} == {"warm", "brief"}
    assert {line["version"] for line in found} == {"001-warm", "002-brief"}
    for line in found:
        assert {"loss", "accuracy", "margin", "learning_rate", "grad_norm", "tokens_per_second", "time"} <= line.keys()
        assert line["tokens_per_second"] > 0
    # The same steps and losses as in the versions' own curves.
    curves = [point for version in learner.run.versions for point in version.training]
    assert [(line["step"], line["loss"]) for line in found] == [(point.step, point.loss) for point in curves]


def test_a_stage_that_resumes_cuts_the_file_back_to_its_checkpoint(tmp_path):
    first, second = Attempt("001-a", "a", 1, 0, "sft"), Attempt("001-a", "a", 1, 1, "fpo")
    tracker = Tracker(tmp_path)
    for attempt, steps in ((first, (1, 5)), (second, (1, 5, 10))):
        tracker.figures(attempt, 0, {})
        for step in steps:
            tracker.figures(attempt, step, {"loss": 1 / step, "grad_norm": float("inf")})
    with (tmp_path / "training.jsonl").open("a") as file:
        file.write('{"task": "a", "st')  # a kill
    again = Tracker(tmp_path)
    assert again._total == 15
    again.figures(second, 7, {})
    assert places(tmp_path) == [("001-a", s, 1, n) for s, n in (("sft", 1), ("sft", 5), ("fpo", 1), ("fpo", 5))]
    assert lines(tmp_path)[0]["grad_norm"] is None
    again.figures(second, 10, {"loss": 0.1})
    assert again._total == 15
    # From the first step on, with other rows.
    Tracker(tmp_path).figures(first, 0, {})
    assert places(tmp_path) == []


def test_a_damaged_file_is_refused_before_anything_is_trained(model, tmp_path):
    learn(model, tmp_path / "run")
    path = tmp_path / "run" / "training.jsonl"
    path.write_text("{\n" + path.read_text())
    with pytest.raises(InputError, match=r"training.jsonl: line 1: damaged JSON .*delete the file"):
        make_learner(model, tmp_path / "run", ExperienceReplay(replay=0.3), "dpo", resume=True)


def test_an_interrupted_run_has_every_step_once(model, tmp_path):
    def stop(stage, step, measured):
        if stage == "dpo" and step >= 3 and measured:
            raise KeyboardInterrupt

    quick = TrainingOptions(**{**LEARNER_FAST, "epochs": 2.0, "checkpoint_steps": 2, "logging_steps": 1})
    with pytest.raises(KeyboardInterrupt):
        learn(model, tmp_path / "run", training=quick, figures=stop)
    assert max(line["step"] for line in lines(tmp_path / "run")) == 3
    learn(model, tmp_path / "run", training=quick, resume=True)
    learn(model, tmp_path / "whole", training=quick)
    assert places(tmp_path / "run") == places(tmp_path / "whole")
    assert len(set(places(tmp_path / "run"))) == len(places(tmp_path / "run"))
    losses = [[line["loss"] for line in lines(tmp_path / name)] for name in ("run", "whole")]
    assert losses[0] == pytest.approx(losses[1])


# ---- trackers ----


def test_a_tracker_that_is_not_known_or_not_installed_is_refused_before_a_model_is_loaded(
    tmp_path, capsys, monkeypatch
):
    with pytest.raises(InputError, match="there is no tracker 'tensorbord'; choose from tensorboard, wandb"):
        check_trackers(["tensorbord"])
    make_workspace(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("everalign.learning.options.find_spec", lambda name: None)
    arguments = ["--model", "nowhere", "--task", "warm=warm.jsonl", "--output", "run", *FAST]
    code, _, error = run(capsys, "learn", *arguments, "--log-to", "tensorboard,mlflow")
    assert code == 2
    assert "log_to tensorboard: the package is not installed: pip install tensorboard" in error


def test_tensorboard_gets_figures_scores_and_answers(model, tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learner = learn(model, tmp_path / "run", log_to=["tensorboard"], sample_answers=1)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("train/loss")]
    steps, offset = [], 0
    for line in lines(tmp_path / "run"):
        if line["version"] == "002-brief" and not offset:
            offset = steps[-1][0]
        steps.append((offset + line["step"], line["loss"]))
    assert [step for step, _ in logged] == [step for step, _ in steps]
    assert [value for _, value in logged] == pytest.approx([loss for _, loss in steps])
    assert {"train/accuracy", "train/margin", "train/tokens_per_second"} <= set(events.Tags()["scalars"])
    matrix = learner.scores.matrix
    kept = [event.value for event in events.Scalars("eval/accuracy/warm")]
    assert kept == pytest.approx([matrix[0][0], matrix[1][0]])
    for name in ("reward_accuracy", "margin", "kl_previous"):
        assert len(events.Scalars(f"eval/{name}/brief")) >= 1
    assert events.Scalars("eval/backward_transfer")[-1].value == pytest.approx(learner.scores.backward_transfer)
    [table] = events.Tensors("eval/scores after brief/text_summary")
    text = table.tensor_proto.string_val[0].decode()
    assert text.startswith("| after learning | warm | brief |")
    assert f"| brief | {100 * matrix[1][0]:.1f} | {100 * matrix[1][1]:.1f} |" in text
    assert any(tag.startswith("eval/answers after warm/warm") for tag in events.Tags()["tensors"])


def test_mlflow_gets_texts_as_artifacts(tmp_path, monkeypatch):
    """A stand-in for the package: its integration takes numbers alone."""
    kept, ended = {}, []
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(log_text=lambda text, name: kept.update({name: text})))
    monkeypatch.setattr("everalign.learning.tracking.check_trackers", lambda names: None)
    numbers = []

    class Callback:
        def on_train_begin(self, arguments, state, control, model):
            assert arguments.run_name == tmp_path.name

        def on_log(self, arguments, state, control, logs, model):
            numbers.append((state.global_step, logs))

        def on_train_end(self, *_, model):
            ended.append(True)

    monkeypatch.setattr("everalign.learning.tracking.get_reporting_integration_callbacks", lambda names: [Callback])
    tracker = Tracker(tmp_path, ["mlflow"])
    tracker.connect(SimpleNamespace)
    tracker.figures(Attempt("001-a", "a", 1, 0, "fpo"), 0, {})
    tracker.figures(Attempt("001-a", "a", 1, 0, "fpo"), 1, {"loss": 0.5})
    [service] = tracker._services
    service.write(1, {"eval_scores after a": "| a |"})
    assert numbers == [(1, {"loss": 0.5})]
    assert kept == {"scores after a.md": "| a |"}
