"""Labelled experts: each label's adapter is that of its tasks alone, whatever is learned for other labels."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from everalign.data import PreferenceSet
from everalign.errors import InputError
from everalign.learning.run_data import load_run
from everalign.learning.task_training import task_seed
from everalign.methods import LabelledExperts, SequentialFineTuning, SingleTask, make_method
from learner_for_tests import adapter_weights, held_out, make_learner, same_weights, save_model, swapped, task_rows

# Two customers, who want the opposite of each other, in turn.
LINE = (("a1", "acme", "warm"), ("b1", "globex", "warm"), ("a2", "acme", "brief"), ("b2", "globex", "brief"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def labelled(rows, label):
    return PreferenceSet(tuple(replace(row, label=label) for row in rows), rows.source)


def rows_of(label, kind, count=10):
    return labelled(task_rows(kind, count) if label == "acme" else swapped(kind, count), label)


def learn(model, output, line=LINE, method=None, tested=False, **arguments):
    learner = make_learner(model, output, method or LabelledExperts(), **arguments)
    learner.learn_all([(name, rows_of(label, kind), held_out(kind) if tested else None) for name, label, kind in line])
    return learner


def of_label(label):
    return [one for one in LINE if one[1] == label]


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return learn(model, tmp_path_factory.mktemp("experts") / "run", tested=True).run


@pytest.mark.parametrize("label", ["acme", "globex"])
def test_an_adapter_is_that_of_sequential_training_on_its_labels_tasks_alone(model, run, tmp_path, label):
    learn(model, tmp_path / "alone", of_label(label), SequentialFineTuning())
    for place, (name, _, _) in enumerate(of_label(label)):
        version = next(version for version in run.versions if version.task == name)
        weights = load_file(run.path / "versions" / version.id / "adapter" / "adapter_model.safetensors")
        assert same_weights(weights, adapter_weights(tmp_path / "alone", place))


def test_one_label_is_sequential_training(model, tmp_path):
    line = [(name, "acme", kind) for name, _, kind in LINE]
    learn(model, tmp_path / "experts", line)
    learn(model, tmp_path / "seqft", line, SequentialFineTuning())
    for place in range(len(LINE)):
        assert same_weights(adapter_weights(tmp_path / "experts", place), adapter_weights(tmp_path / "seqft", place))


def test_a_label_for_each_task_is_single_task_training(model, tmp_path):
    """STL draws its adapter by the first task's seed, experts by the run's: here the two are the same."""
    seed = -500 * pow(500_001, -1, 2**30) % 2**30
    assert task_seed(seed, 1) == seed
    learn(model, tmp_path / "experts", LINE[:2], seed=seed)
    for place, one in enumerate(LINE[:2]):
        learn(model, tmp_path / one[0], [one], SingleTask(), seed=seed)
        assert same_weights(adapter_weights(tmp_path / "experts", place), adapter_weights(tmp_path / one[0]))


def test_rows_without_labels_have_their_tasks_name_for_one(model, run, tmp_path):
    learner = make_learner(model, tmp_path / "run", LabelledExperts())
    for name, label, kind in LINE[:2]:
        learner.learn([replace(row, label=None) for row in rows_of(label, kind)], name)
    assert [version.manifest.label for version in learner.run.versions] == ["a1", "b1"]
    for place, version in enumerate(run.versions[:2]):
        weights = load_file(run.path / "versions" / version.id / "adapter" / "adapter_model.safetensors")
        assert same_weights(weights, adapter_weights(tmp_path / "run", place))


def test_what_another_label_learns_changes_no_score(model, run, tmp_path):
    first, second, third, fourth = (version.scores for version in run.versions)
    assert first["b1"] == run.zero_shot["b1"].model_copy(update={"kl_previous": first["b1"].kl_previous})
    assert first["a1"] == second["a1"].model_copy(update={"kl_previous": first["a1"].kl_previous})
    assert third["a1"] != first["a1"]  # the label's own second task may change it
    assert third["b1"] == second["b1"].model_copy(update={"kl_previous": third["b1"].kl_previous})
    assert third["b1"].kl_previous == pytest.approx(0, abs=1e-6)
    assert fourth["a2"] == third["a2"].model_copy(update={"kl_previous": fourth["a2"].kl_previous})
    learner = learn(model, tmp_path / "run", LINE[:2], tested=True)
    for metric in ("accuracy", "margin", "reward_accuracy"):
        assert learner.run.scores(metric).backward_transfer == 0.0
    assert learner.run.scores("margin").matrix[0] != learner.run.scores("margin").matrix[1]


def test_held_out_rows_are_scored_with_the_adapter_of_their_label(model, run, tmp_path):
    for label in ("acme", "globex"):
        alone = learn(model, tmp_path / label, of_label(label), SequentialFineTuning(), tested=True).run
        for name, _, _ in of_label(label):
            assert run.versions[-1].scores[name].margin == alone.versions[-1].scores[name].margin


def test_adapters_are_found_again_by_a_learner_that_resumes(model, run, tmp_path):
    learn(model, tmp_path / "run", LINE[:2], tested=True)
    learner = make_learner(model, tmp_path / "run", LabelledExperts(), resume=True)
    for name, label, kind in LINE[2:]:
        learner.learn(rows_of(label, kind), name, held_out(kind))
    for place, version in enumerate(run.versions):
        weights = load_file(run.path / "versions" / version.id / "adapter" / "adapter_model.safetensors")
        assert same_weights(weights, adapter_weights(tmp_path / "run", place))
    assert learner.run.versions[-1].scores == run.versions[-1].scores


def test_rolled_back_each_label_goes_on_from_where_it_was(model, run, tmp_path):
    learner = learn(model, tmp_path / "run", LINE[:3], tested=True)
    learner.rollback("001")
    learner.learn(rows_of("acme", "brief"), "a2", held_out("brief"))
    assert [version.id for version in learner.run.versions] == ["001-a1", "004-a2"]
    assert same_weights(adapter_weights(tmp_path / "run", 2), adapter_weights(tmp_path / "run"))
    # What was learned of the other label is gone.
    assert learner.run.versions[-1].scores["b1"].margin == learner.run.zero_shot["b1"].margin
    learner.rollback("003")
    assert [version.id for version in learner.run.versions] == ["001-a1", "002-b1", "003-a2"]
    learner.learn(rows_of("globex", "brief"), "b2", held_out("brief"))
    assert learner.run.versions[-1].scores["a2"].margin == run.versions[-1].scores["a2"].margin
    assert learner.run.versions[-1].scores["b2"].margin == run.versions[-1].scores["b2"].margin


def test_a_damaged_adapter_of_any_label_is_named(model, tmp_path):
    learn(model, tmp_path / "run", LINE[:2])
    (tmp_path / "run" / "versions" / "001-a1" / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"001-a1/adapter/adapter_model.safetensors: missing or changed"):
        make_learner(model, tmp_path / "run", LabelledExperts(), resume=True)


def test_the_gate_asks_only_the_labels_own_tasks(model, tmp_path):
    learner = learn(model, tmp_path / "run", LINE[:2], tested=True, gate=1.0)
    learner.learn(rows_of("acme", "brief"), "a2", held_out("brief"))
    compared = [set(version.manifest.gate.compared) for version in learner.run.versions]
    assert compared == [{"a1"}, {"b1"}, {"a1", "a2"}]


def test_the_base_model_answers_to_a_label_that_nothing_was_learned_of(model, tmp_path):
    learner = learn(model, tmp_path / "run", LINE[:2])
    ids = torch.arange(97, 113)[None]

    def logits():
        with torch.no_grad():
            return learner.policy.language_model(input_ids=ids).logits

    with learner.policy.as_base():
        base = logits()
    ours = logits()
    with learner.method.answering(learner.policy, "initech"):
        assert torch.equal(logits(), base)
    with learner.method.answering(learner.policy, "globex"):
        assert torch.equal(logits(), ours)
    with learner.method.answering(learner.policy, "acme"):
        assert not torch.equal(logits(), ours)
    assert torch.equal(logits(), ours)


# ---- what is refused ----


def test_labels_of_a_task_have_to_be_one(model, tmp_path):
    learner = make_learner(model, tmp_path / "run", LabelledExperts())
    mixed = PreferenceSet((*rows_of("acme", "warm"), *rows_of("globex", "brief")), "mixed.jsonl")
    with pytest.raises(InputError, match=r"task 'one': its rows have several labels \('acme', 'globex'\).*by_label"):
        learner.learn(mixed, "one")
    with pytest.raises(InputError, match=r"task 'one': its rows have several labels \('acme', 'globex'\)"):
        learner.learn(rows_of("acme", "warm"), "one", labelled(held_out("warm"), "globex"))
    some = PreferenceSet((*rows_of("acme", "warm"), *task_rows("brief")), "some.jsonl")
    with pytest.raises(InputError, match=r"some.jsonl: row 11: field 'label': is null, and other rows have one"):
        learner.learn(some, "one")
    assert not learner.run.all_versions


def test_a_task_and_its_test_rows_keep_their_label(model, tmp_path):
    learner = learn(model, tmp_path / "run", LINE[:1], tested=True)
    with pytest.raises(InputError, match="task 'a1' was learned with the label 'acme', not 'globex'"):
        learner.learn(labelled(rows_of("acme", "warm"), "globex"), "a1")
    learner.register_test("b1", labelled(held_out("brief"), "globex"))
    with pytest.raises(InputError, match="its test rows have the label 'globex' in this run, and 'acme' now"):
        learner.learn(rows_of("acme", "brief"), "b1", held_out("brief"))


def test_only_rows_of_the_same_label_can_leak(model, tmp_path):
    learner = make_learner(model, tmp_path / "run", LabelledExperts())
    rows = rows_of("acme", "warm")
    learner.learn(rows, "a1", labelled(held_out("warm"), "acme"))
    learner.learn(labelled(held_out("warm"), "globex"), "b1", labelled(rows, "globex"))
    with pytest.raises(InputError, match="5 rows are in both the training and the test set"):
        learner.learn(labelled(held_out("warm"), "acme"), "a2")


def test_other_methods_learn_rows_whatever_their_labels(model, tmp_path):
    mixed = PreferenceSet((*rows_of("acme", "warm"), *rows_of("globex", "brief")), "mixed.jsonl")
    bare = PreferenceSet(tuple(replace(row, label=None) for row in mixed), "mixed.jsonl")
    for name, rows in (("with", mixed), ("without", bare)):
        make_learner(model, tmp_path / name, SequentialFineTuning()).learn(rows, "one")
    assert same_weights(adapter_weights(tmp_path / "with"), adapter_weights(tmp_path / "without"))
    assert load_run(tmp_path / "with").versions[0].manifest.label is None


def test_the_method_takes_no_arguments():
    with pytest.raises(InputError, match="replay means nothing to the method 'experts'"):
        make_method("experts", replay=0.2)


# ---- export ----


def test_a_labels_adapter_is_exported_and_merged(model, run, tmp_path):
    learner = make_learner(model, run.path, LabelledExperts(), resume=True)
    folder = learner.export_adapter(tmp_path / "acme", label="acme")
    weights = load_file(run.path / "versions" / "003-a2" / "adapter" / "adapter_model.safetensors")
    assert same_weights(load_file(folder / "adapter_model.safetensors"), weights)
    card = (folder / "README.md").read_text()
    assert "for the label `acme` after 2 tasks" in card
    assert "| a1 |" in card
    assert "| b1 |" not in card
    assert f"--lora-modules acme={folder}" in card
    assert (learner.export(tmp_path / "merged", label="globex") / "config.json").exists()
    earlier = learner.export_adapter(tmp_path / "earlier", version="002", label="acme")
    weights = load_file(run.path / "versions" / "001-a1" / "adapter" / "adapter_model.safetensors")
    assert same_weights(load_file(earlier / "adapter_model.safetensors"), weights)


def test_an_export_needs_a_label_that_is_there(model, run, tmp_path):
    learner = make_learner(model, run.path, LabelledExperts(), resume=True)
    for export in (learner.export, learner.export_adapter):
        with pytest.raises(InputError, match="keeps an adapter for each label: name one with label: acme, globex"):
            export(tmp_path / "out")
        with pytest.raises(InputError, match="no adapter for the label 'initech': name one with label: acme, globex"):
            export(tmp_path / "out", label="initech")
        with pytest.raises(InputError, match=r"no adapter for the label 'globex': name one with label: acme$"):
            export(tmp_path / "out", version="001", label="globex")
    plain = make_learner(model, tmp_path / "run", SequentialFineTuning())
    plain.learn(task_rows("warm"), "warm")
    with pytest.raises(InputError, match="the method seqft keeps no adapter for each label: leave label out"):
        plain.export(tmp_path / "out", label="acme")
    assert not (tmp_path / "out").exists()


def test_a_label_that_is_no_models_name_is_served_by_the_folders(model, tmp_path):
    learner = make_learner(model, tmp_path / "run", LabelledExperts())
    learner.learn(labelled(task_rows("warm"), "Acme, Inc."), "one")
    folder = learner.export_adapter(tmp_path / "acme", label="Acme, Inc.")
    assert f"--lora-modules acme={folder}" in (folder / "README.md").read_text()


def test_exported_adapters_are_served_side_by_side_by_their_labels(model, run, tmp_path):
    """As an OpenAI-compatible server does it: one base model, an adapter by the name that a request asks for."""
    learner = make_learner(model, run.path, LabelledExperts(), resume=True)
    folders = {label: learner.export_adapter(tmp_path / label, label=label) for label in ("acme", "globex")}
    base = AutoModelForCausalLM.from_pretrained(model)
    served = PeftModel.from_pretrained(base, str(folders["acme"]), adapter_name="acme")
    served.load_adapter(str(folders["globex"]), adapter_name="globex")
    ids, found = torch.arange(97, 113)[None], {}
    with torch.no_grad():
        for label in folders:
            served.set_adapter(label)
            found[label] = served.eval()(input_ids=ids).logits
            with learner.method.answering(learner.policy, label):
                expected = learner.policy.language_model(input_ids=ids).logits
            torch.testing.assert_close(found[label], expected, rtol=1e-5, atol=1e-5)
    assert (found["acme"] - found["globex"]).abs().max() > 1e-3


def test_a_version_keeps_its_own_adapter_alone(run):
    for version in run.versions:
        folder = run.path / "versions" / version.id
        assert load_file(folder / "method.safetensors") == {}
        assert json.loads((folder / "manifest.json").read_text())["label"] in ("acme", "globex")
