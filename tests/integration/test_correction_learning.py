"""Correctors that learn task after task: what is learned, replayed, judged and exported."""

import json

import pytest
import torch

from cli_for_tests import FAST as FAST_FLAGS
from cli_for_tests import run, write_rows
from everalign import CorrectionTaskOptions, Learner
from everalign.correction import NO_GUARDS, CorrectionOptions, Corrector, get_template, load_corrector_files
from everalign.correction.tokenization import CorrectionEncoder, prepare_corrections, tokenize_held_out
from everalign.data import CorrectionSet, PreferenceSet
from everalign.data.collate import collate
from everalign.data.records import Correction
from everalign.data.replay import ReplayBuffer
from everalign.data.tokenization import TokenizedRow
from everalign.errors import InputError
from everalign.learning.recipe import Recipe
from everalign.methods import METHODS, ExperienceReplay, LifeAlign, MultiTask
from everalign.modeling.loading import load_model, load_tokenizer
from everalign.modeling.trainable import FullModel
from everalign.training.objectives import make_objective
from learner_for_tests import adapter_weights, make_learner, same_weights, task_rows
from models_for_tests import saved_model
from tiers_for_tests import slow_but

OPTIONS = {"max_length": 200, "tokens_per_batch": 1200, "learning_rate": 5e-3, "epochs": 2.0}
TASKS = {"warm": "Gladly! ", "brief": "ok "}


def edits(name: str, count: int = 10, start: int = 0) -> CorrectionSet:
    """A task: its word before every answer; one answer in five is good as it is."""
    rows = []
    for i in range(start, start + count):
        answer = f"a{i}"
        correction = answer if i % 5 == 4 else TASKS[name] + answer
        rows.append({"question": f"{name} {i}?", "answer": answer, "correction": correction})
    return CorrectionSet.of(rows, f"{name}.jsonl")


def learner(output, method=None, **arguments):
    options = {**OPTIONS, **arguments.pop("options", {})}
    return make_learner(saved_model(), output, method, "correction", options=options, **arguments)


def tasks():
    return [(name, edits(name), edits(name, 10, 100)) for name in TASKS]


def encoder(objectives=()):
    return CorrectionEncoder(load_tokenizer(str(saved_model())), get_template("everalign-1"), objectives)


# ---- what is taught ----


def test_the_loss_is_the_cross_entropy_of_the_weighted_corrections():
    model = load_model(str(saved_model()))
    rows = [
        Correction("q1?", "no", "yes indeed", 2.0),
        Correction("q2?", "no", "no", 0.5),
    ]
    coded, groups, expected, tokens = encoder(), [], 0.0, 0
    for row in rows:
        prompt, target = coded.prompt(row.question, row.answer), coded.response(row.correction)
        groups.append(TokenizedRow(row.id, prompt, (target,), (row.weight,)))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum")
        expected += row.weight * loss.item()
        tokens += len(target)
    objective = make_objective("correction")
    batch = objective.collate(groups, shared=True)
    assert (objective.name, int(batch["count"])) == ("correction", tokens)
    loss, _ = objective.loss(FullModel(model), batch, batch["count"])
    assert loss.item() == pytest.approx(expected / tokens, rel=1e-4)
    assert batch.keys() >= collate(groups, True).keys()


def test_identity_rows_are_made_of_corrections_as_far_as_they_are_missing():
    rows = edits("warm", 20)  # 16 edits, 4 identities
    for share, made in ((0.0, 0), (0.25, 0), (0.5, 4), (1.0, 12)):
        learned, lines, _ = prepare_corrections(rows, encoder(), 200, share, seed=1)
        assert len(learned) == 20 + made
        assert sum(row.is_identity for row in learned) == 4 + made
        new = learned.items[20:]
        assert {row.answer for row in new} <= {row.correction for row in rows if not row.is_identity}
        assert len({row.id for row in new}) == made
        assert any(f"{made} corrections are learned as answers" in line for line in lines) == bool(made)
        # Pooled rows are prepared twice.
        assert prepare_corrections(learned, encoder(), 200, share, seed=1)[0] == learned


def test_rows_that_do_not_fit_are_left_out_and_counted():
    long = Correction("q?", "a", "x" * 150)
    learned, lines, _ = prepare_corrections(CorrectionSet.of([*edits("warm", 3), long]), encoder(), 190, 0.0, 0)
    assert len(learned) == 3
    assert "  1 of 4 rows are left out, too long for 190 tokens" in lines
    with pytest.raises(InputError, match="no correction fits max_length, 190 tokens"):
        prepare_corrections(CorrectionSet.of([long]), encoder(), 190, 0.0, 0)
    said = []
    assert len(tokenize_held_out([*edits("warm", 3), long], encoder(), 190, said.append)) == 3
    assert said[0] == "  1 of 4 held-out rows are left out, too long for 190 tokens"
    assert said[1].startswith("  warning: held-out: 1 of 4 rows are too long and left out: raise --max-length")
    assert len(said) == 2
    with pytest.raises(InputError, match="no held-out correction fits"):
        tokenize_held_out([long], encoder(), 190, said.append)


def test_held_out_rows_are_the_correction_over_the_answer_behind_the_template():
    coded = encoder(("kind",))
    (pair,) = tokenize_held_out([Correction("q?", "no", "yes", 3.0)], coded, 200, print)
    assert pair.prompt == coded.prompt("q?", "no")
    assert (pair.chosen, pair.rejected, pair.weight) == (coded.response("yes"), coded.response("no"), 3.0)


# ---- task after task ----


@pytest.mark.parametrize("method", slow_but(["lifealign", "mtl"], sorted(METHODS)))
def test_every_method_learns_corrections(method, tmp_path):
    learned = learner(tmp_path / "run", METHODS[method]())
    learned.learn_all(tasks())
    scores = learned.scores
    assert set(scores.tasks) == set(TASKS)
    assert scores.last is not None
    stages = [version.manifest.stages for version in learned.run.versions]
    assert all(stage[0].stage == "correction" and stage[0].reference is None for stage in stages)
    assert learned.run.facts.settings["template"] == "everalign-1"


def test_learning_raises_what_held_out_rows_are_scored_by(tmp_path):
    lines = []
    learned = learner(tmp_path / "run", LifeAlign(space="product"), lines=lines, options={"epochs": 10.0})
    test = edits("warm", 10, 100)
    after = learned.learn(edits("warm", 30), "warm", test)
    before = learned.run.zero_shot["warm"]
    assert after["warm"].margin > before.margin + 0.5
    assert after["warm"].accuracy >= before.accuracy
    assert after["warm"].pairs == 8
    assert "  warm.jsonl: 2 of 10 held-out rows change nothing and are left out" in lines


def test_earlier_corrections_are_replayed_and_survive_a_resume(tmp_path):
    whole = learner(tmp_path / "whole", ExperienceReplay(replay=0.5))
    whole.learn_all(tasks())
    first, second = (version.manifest.stages[0] for version in whole.run.versions)
    assert (first.rows, first.replayed, second.rows, second.replayed) == (10, 0, 15, 5)
    parts = learner(tmp_path / "parts", ExperienceReplay(replay=0.5))
    name, rows, test = tasks()[0]
    parts.learn(rows, name, test)
    parts = learner(tmp_path / "parts", ExperienceReplay(replay=0.5), resume=True)
    # The first task's held-out rows come from the run.
    parts.learn(tasks()[1][1], tasks()[1][0])
    assert same_weights(adapter_weights(tmp_path / "parts"), adapter_weights(tmp_path / "whole"))
    assert parts.run.versions[-1].scores["warm"] == whole.run.versions[-1].scores["warm"]


def test_the_buffer_holds_corrections_on_disk(tmp_path):
    buffer, rows = ReplayBuffer(), [*edits("warm", 4), Correction("q", "a", "b", 2.0)]
    buffer.add("warm", rows, 1.0)
    buffer.add("old", list(task_rows("warm", 2)), 1.0)
    buffer.to_jsonl(tmp_path / "replay.jsonl")
    again = ReplayBuffer.from_jsonl(tmp_path / "replay.jsonl")
    assert again.rows() == buffer.rows()
    assert {type(row).__name__ for row in again.rows()} == {"Correction", "Preference"}


def test_identity_rows_are_learned_and_told(tmp_path):
    lines = []
    options = CorrectionTaskOptions(template="everalign-1", objectives="kind, brief", identity=0.75)
    learned = learner(tmp_path / "run", ExperienceReplay(), lines=lines, correction=options)
    learned.learn(edits("warm"), "warm")
    assert learned.run.versions[0].manifest.stages[0].rows == 14
    assert learned.run.versions[0].manifest.train.rows == 10
    assert "  template everalign-1, objectives kind, brief" in lines
    assert "  4 corrections are learned as answers that stay as they are, too" in lines
    settings = learned.run.facts.settings
    assert (settings["objectives"], settings["identity"]) == ("kind,brief", 0.75)
    with pytest.raises(InputError, match=r"started with different settings \(identity"):
        learner(
            tmp_path / "run", ExperienceReplay(), correction=CorrectionTaskOptions(objectives="kind,brief"), resume=True
        )


def test_tasks_learned_together_are_pooled_once(tmp_path):
    learned = learner(tmp_path / "run", MultiTask(), correction=CorrectionTaskOptions(identity=0.5))
    learned.learn_all(tasks())
    (version,) = learned.run.versions
    assert version.manifest.stages[0].rows == 2 * (8 + 4)


# ---- what comes of it ----


def test_an_export_is_a_corrector(tmp_path, capsys):
    learned = learner(tmp_path / "run", LifeAlign(space="product"), correction=CorrectionTaskOptions(objectives="kind"))
    learned.learn_all(tasks())
    folder = learned.export(tmp_path / "corrector")
    files = load_corrector_files(folder)
    code, out, _ = run(capsys, "export", str(tmp_path / "run"), str(tmp_path / "again"), "--json")
    assert (code, json.loads(out)["corrector"]) == (0, True)
    assert load_corrector_files(tmp_path / "again").facts == files.facts
    assert load_corrector_files(learned.export(tmp_path / "first", "001-warm")).facts.rows == 10
    assert (files.template.id, files.objectives) == ("everalign-1", ("kind",))
    assert files.facts.rows == 20
    assert files.facts.held_out.keys() == set(TASKS)
    assert files.facts.settings["method"] == "lifealign"
    corrected = Corrector.from_pretrained(folder).correct(
        "warm 1?", "a1", CorrectionOptions(guards=NO_GUARDS, max_new_tokens=5)
    )
    assert corrected.forward_passes >= 1
    # What it learned goes on in the next run, behind the same template.
    again = make_learner(folder, tmp_path / "next", None, "correction", options=OPTIONS)
    assert again.run.facts.settings["objectives"] == "kind"
    with pytest.raises(InputError, match="was trained with the template 'everalign-1', not 'aligner-1'"):
        Learner(
            str(folder),
            objective="correction",
            output=tmp_path / "x",
            correction=CorrectionTaskOptions(template="aligner-1"),
        )


def test_other_exports_are_no_correctors(tmp_path):
    learned = make_learner(saved_model(), tmp_path / "run")
    learned.learn(task_rows("warm"), "warm")
    assert not (learned.export(tmp_path / "model") / "corrector.json").exists()


# ---- bad input ----


def test_rows_of_another_kind_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"warm.jsonl: the objective correction learns from corrections"):
        learner(tmp_path / "a").learn(task_rows("warm"), "warm")
    with pytest.raises(InputError, match=r"held-out rows of a corrector must be corrections"):
        learner(tmp_path / "b").learn(edits("warm"), "warm", task_rows("warm", 3, 50))
    for objective in ("dpo", "sft", "var"):
        with pytest.raises(InputError, match=f"warm.jsonl: the objective {objective} learns from"):
            make_learner(saved_model(), tmp_path / objective, objective=objective).learn(edits("warm"), "warm")
    with pytest.raises(InputError, match=r"warm.jsonl: no correction fits max_length, 60 tokens"):
        learner(tmp_path / "c", options={"max_length": 60}).learn(edits("warm"), "warm")
    with pytest.raises(InputError, match="training and the test set"):
        learner(tmp_path / "d").learn(edits("warm"), "warm", edits("warm", 3))
    same = CorrectionSet.of([Correction("q", "a", "a")], "same.jsonl")
    with pytest.raises(InputError, match=r"test set same.jsonl has no rows"):
        learner(tmp_path / "e").learn(edits("warm"), "warm", same)


@pytest.mark.parametrize(
    ("objective", "arguments", "message"),
    [
        ("dpo", {"correction": CorrectionTaskOptions()}, "the objective dpo teaches none: leave it out"),
        ("correction", {"correction": CorrectionTaskOptions(template="mine")}, "unknown template 'mine'"),
        (
            "correction",
            {"correction": CorrectionTaskOptions(template="aligner-1", objectives="kind")},
            "has no place for any",
        ),
        ("correction", {"correction": CorrectionTaskOptions(objectives="kind,,safe")}, r"objectives\[1\]"),
        ("correction", {"options": {"sft_epochs": 1.0}}, "with objective correction set epochs"),
        ("correction", {"reward": lambda: None}, "the objective correction learns from no rewards"),
        ("correction", {"method": LifeAlign(gamma=1.0, space="product")}, "gamma is the focusing exponent of fpo"),
    ],
)
def test_settings_that_would_be_ignored_or_cannot_be_are_refused(objective, arguments, message, tmp_path):
    with pytest.raises(InputError, match=message):
        make_learner(saved_model(), tmp_path / "run", objective=objective, **arguments)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), True])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(InputError, match="identity must be a number from 0 to 1"):
        CorrectionTaskOptions(identity=share)


# ---- recipes and the command line ----


def test_a_recipe_holds_what_a_corrector_reads():
    flags = {"model": "tiny", "output": "x", "objective": "correction", "template": "everalign-1", "identity": 0.2}
    recipe = Recipe.from_flags({**flags, "tasks": [{"name": "a", "train": "a.jsonl"}]})
    arguments = recipe.learner_arguments()
    assert arguments["correction"] == CorrectionTaskOptions(template="everalign-1", identity=0.2)
    complete = recipe.complete()
    assert complete["correction"] == {"template": "everalign-1", "objectives": None, "identity": 0.2}
    assert "beta" not in complete["training"]
    for given, message in (
        ({"objective": "fpo"}, "template is for the objective correction: leave it out"),
        ({"beta": 0.2}, "the objective correction has no margin and would ignore beta"),
        ({"temperature": 0.5}, "temperature is for rewards"),
    ):
        with pytest.raises(InputError, match=message):
            Recipe.from_flags({**flags, "tasks": [{"name": "a", "train": "a"}], **given}).learner_arguments()


def test_the_command_line_learns_corrections(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in TASKS:
        write_rows(tmp_path / f"{name}.jsonl", edits(name))
        write_rows(tmp_path / f"{name}.test.jsonl", edits(name, 6, 100))
    write_rows(tmp_path / "pairs.jsonl", PreferenceSet.of(task_rows("warm")))
    command = ["learn", "--model", str(saved_model()), "--output", "run", "--objective", "correction", *FAST_FLAGS]
    command += ["--max-length", "200", "--identity", "0.5", "--objectives", "kind"]
    given = [part for name in TASKS for part in ("--task", f"{name}={name}.jsonl,{name}.test.jsonl")]
    code, out, err = run(capsys, *command, *given, "--json")
    assert code == 0, err
    assert json.loads(out)["tasks"] == list(TASKS)
    assert "correction: 12 rows (0 replayed)" in err
    assert (tmp_path / "run" / "report.html").exists()
    code, _, err = run(capsys, *command, "--output", "other", "--task", "pairs=pairs.jsonl")
    assert code == 2
    assert "pairs.jsonl:1: field 'question': no such column; rename 'prompt'?" in err
