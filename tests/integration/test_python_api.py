"""What a person meets in Python: names at the top level, options by keyword, rows of any kind, reprs, progress."""

import csv
import sys
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import everalign
from corrections_for_tests import corrections
from everalign import Corrector, Learner, RewardModel, TrainingOptions
from everalign.errors import InputError
from everalign.learning.run_data import load_run
from everalign.methods import ExperienceReplay, LifeAlign, SequentialFineTuning
from everalign.notebook import default_progress
from learner_for_tests import FAST, held_out, save_model, task_rows
from models_for_tests import saved_model

SMALL = {"rank": 4, "alpha": 8.0, "targets": "q_proj,v_proj"}


def silent(_):
    """Takes what a learner logs."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model")))


def test_every_name_at_the_top_level_is_there():
    for name in everalign.__all__:
        assert getattr(everalign, name).__doc__, name
    assert {"InputError", "train_corrector", "train_reward_model", "RewardModel", "load_scored"} <= set(dir(everalign))


def test_names_and_options_by_keyword_or_dictionary(model, tmp_path):
    first = Learner(model, "er", "dpo", tmp_path / "a", replay=0.5, log=silent, epochs=2.0, **FAST, **SMALL)
    adapter = {**SMALL, "rank": 2}
    second = Learner(
        model, {"name": "er", "replay": 0.5}, "dpo", tmp_path / "b", training=FAST, adapter=adapter, rank=4, log=silent
    )
    assert first.method.settings() == second.method.settings() == ExperienceReplay(replay=0.5).settings()
    assert first.context.adapter == second.context.adapter
    assert (first.context.options.epochs, second.context.options.epochs) == (2.0, 1.0)
    assert repr(first).startswith(f"Learner({model!r}, ExperienceReplay(replay=0.5, capacity=3000)")
    assert repr(first).endswith("learned: no task yet)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "ex"}, "unknown method 'ex'"),
        ({"method": "er", "keep": 0.5}, "keep means nothing to the method 'er'"),
        ({"method": 3}, "method: must be a name such as 'er', or a method such as ExperienceReplay.*, found 3"),
        ({"method": ExperienceReplay(), "replay": 0.3}, "replay: give it to the method itself, ExperienceReplay"),
        ({"objective": "dpp"}, r"unknown objective 'dpp' \(did you mean 'dpo'\?\)"),
        ({"epoch": 2.0}, "'epoch' is not an option of a learner: did you mean 'epochs'?"),
        ({"epochs": -1.0}, "epochs must be a number above 0, found -1.0"),
        ({"training": {"epochs": 0.0}}, "epochs must be a number above 0"),
        ({"training": 3}, "training: must be TrainingOptions or a dictionary of its options, found int"),
        ({"tokenizer": object()}, "tokenizer: is for a model that is given as an object"),
        ({"model": 3}, "model: must be a folder, a name, or a causal language model of transformers, found int"),
    ],
)
def test_wrong_arguments_are_refused_before_the_model_is_loaded(arguments, message, tmp_path):
    with pytest.raises(InputError, match=message):
        Learner(**{"model": "nowhere/at/all", "output": tmp_path / "run", **arguments})


def test_a_method_by_its_class_and_reprs_of_methods():
    assert repr(everalign.make_method("seqft")) == repr(SequentialFineTuning()) == "SequentialFineTuning()"
    assert repr(LifeAlign(gamma=1.0)).startswith("LifeAlign(gamma=1.0, space='none'")


def test_a_loaded_model_is_kept_in_the_run_and_rows_come_as_they_are(model, tmp_path):
    rows = [row.to_json() for row in task_rows("warm")]
    with (tmp_path / "test.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(row.to_json() for row in held_out("warm"))
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    arguments = {"output": tmp_path / "run", "log": silent, "training": TrainingOptions(**FAST), **SMALL}
    learner = Learner(network, "seqft", "dpo", tokenizer=tokenizer, **arguments)
    learner.learn(rows, name="warm", test=str(tmp_path / "test.csv"))
    same = Learner(model, "seqft", "dpo", **{**arguments, "output": tmp_path / "same"})
    same.learn(task_rows("warm"), name="warm", test=held_out("warm"))
    assert learner.scores.matrix == same.scores.matrix
    assert load_run(tmp_path / "run").facts.model_fingerprint == load_run(tmp_path / "same").facts.model_fingerprint

    learner = Learner(network, "seqft", "dpo", resume=True, **arguments)
    pandas = pytest.importorskip("pandas")
    learner.learn(pandas.DataFrame([row.to_json() for row in task_rows("calm")]), name="calm")
    assert "learned: warm, calm" in repr(learner)
    assert repr(learner.run).endswith("current: 002-calm; learned: warm, calm)")
    assert (learner.export(tmp_path / "exported") / "config.json").exists()
    other = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "other", seed=1))
    with pytest.raises(InputError, match="was started with a different model"):
        Learner(other, "seqft", "dpo", resume=True, **arguments)


def test_a_corrector_given_something_else_says_what_to_do():
    with pytest.raises(InputError, match=r"loaded by Corrector.from_pretrained\('runs/corrector'\)"):
        Corrector("runs/corrector")
    with pytest.raises(InputError, match=r"loaded by Corrector.from_endpoint\(url, model"):
        Corrector("http://127.0.0.1:8000/v1")
    with pytest.raises(InputError, match=r"takes an engine, found int: load a folder with Corrector.from_pretrained"):
        Corrector(3)


def test_a_corrector_is_trained_and_loaded_in_one_call(tmp_path):
    rows = [row.to_json() for row in corrections(8)]
    corrector = Corrector.train(
        str(saved_model()), rows, tmp_path / "corrector", test=corrections(4, 100), epochs=1.0, batch_size=4
    )
    assert repr(corrector) == "Corrector(LocalEngine, template='everalign-1')"
    assert isinstance(corrector.correct("q?", "a").text, str)


def test_a_reward_model_is_trained_and_loaded_in_one_call(model, tmp_path):
    pairs = [row.to_json() for row in task_rows("warm")]
    reward = RewardModel.train(model, pairs, tmp_path / "reward", test=held_out("warm"), batch_size=4, max_length=64)
    assert len(reward.score(["q1?", "q2?"], ["yes", "no"])) == 2
    assert "max_length=64" in repr(reward)


def test_a_bar_in_notebooks_alone(monkeypatch):
    shown = []

    class Handle:
        """What `display` returns."""

        def update(self, text):
            shown.append(text)

    def display(text, display_id):
        shown.append(text)
        return Handle()

    default_progress()("fpo", 1, 2)
    kernel = SimpleNamespace(get_ipython=lambda: object())
    monkeypatch.setitem(sys.modules, "ipykernel", kernel)
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(HTML=str, display=display))
    progress = default_progress()
    progress("<fpo>", 1, 2)
    progress("<fpo>", 2, 2)
    assert shown == [f"&lt;fpo&gt; <progress value={n} max=2></progress> {n}/2" for n in (1, 2)]
