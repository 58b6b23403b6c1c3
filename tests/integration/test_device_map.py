"""A base model whose layers are elsewhere: the same losses, gradients and runs, and maps that cannot be used."""

import json

import pytest
import torch

from cli_for_tests import run as cli
from everalign.data.collate import collate
from everalign.errors import InputError
from everalign.learning.run_data import load_run
from everalign.modeling import base_weights
from everalign.modeling.loading import load_base, load_model
from everalign.modeling.policy import Policy
from everalign.modeling.runtime import recomputable_layers, recomputing
from learner_for_tests import adapter_weights, held_out, make_learner, save_model, task_rows
from models_for_tests import perturb, random_pairs, random_updates, saved_model

OFFLOADED = {"": "cpu", "model.layers.1": "disk"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture
def file(tmp_path):
    def write(places):
        (tmp_path / "map.json").write_text(json.dumps(places))
        return str(tmp_path / "map.json")

    return write


def gradients(policy, batch, again):
    with recomputing(recomputable_layers(policy) if again else []):
        sums = policy(batch)
        (sums * torch.arange(1.0, len(sums) + 1)).sum().backward()
    return sums.detach(), {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("again", [False, True])
def test_layers_on_disk_give_the_same_losses_and_gradients(file, again, monkeypatch):
    """With a long-term adapter too, and after a pass without gradients."""
    # Layers on disk keep peft's forward pass, which adds in another order than the fused one: so must those in memory.
    monkeypatch.setattr("everalign.modeling.policy.fuse", lambda layer: None)
    batch, found = collate(random_pairs(4, longest=20), shared=True), []
    for places in (None, file(OFFLOADED)):
        base = load_model(str(saved_model()), device_map=places)
        assert base_weights.is_offloaded(base) == (places is not None)
        policy = Policy(base, 4, 8.0)
        policy.write_long_term(random_updates(policy))
        perturb(policy).train()
        with policy.evaluating():
            policy(batch)
        found.append(gradients(policy, batch, again))
    (plain, of_plain), (offloaded, of_offloaded) = found
    torch.testing.assert_close(offloaded, plain, rtol=1e-6, atol=1e-6)
    assert of_offloaded.keys() == of_plain.keys()
    for name, gradient in of_plain.items():
        assert (of_offloaded[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_a_run_learns_goes_on_and_is_evaluated_with_layers_on_disk(model, file, tmp_path, capsys):
    learned = {}
    for name, places in (("plain", None), ("offloaded", file(OFFLOADED))):
        make_learner(model, tmp_path / name, options={"device_map": places}).learn(task_rows("warm"), "warm")
        learned[name] = adapter_weights(tmp_path / name)
    for name, weights in learned["plain"].items():
        torch.testing.assert_close(learned["offloaded"][name], weights, rtol=1e-4, atol=1e-6)
    assert (
        load_run(tmp_path / "offloaded").facts.model_fingerprint == load_run(tmp_path / "plain").facts.model_fingerprint
    )
    learner = make_learner(model, tmp_path / "offloaded", resume=True)
    assert learner.learn(task_rows("brief"), "brief", held_out("brief"))["brief"].accuracy > 0.9
    answers = []
    for more in ([], ["--device-map", file(OFFLOADED)]):
        arguments = ["--limit", "1", "--max-new-tokens", "4", "--json", *more]
        code, out, error = cli(capsys, "evaluate", str(tmp_path / "offloaded"), *arguments)
        assert code == 0, error
        answers.append(json.loads(out)["answers"])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("way", ["auto", "balanced"])
def test_a_model_that_fits_stays_in_one_piece(way):
    base, key = load_base(str(saved_model()), "fp32", device_map=way)
    assert not base_weights.is_offloaded(base)
    assert key == load_base(str(saved_model()), "fp32")[1]


def test_layers_are_spread_and_all_else_stays_with_the_first(monkeypatch):
    """As for two GPUs, of which the first is full with two layers."""
    whole = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    whole["model.rotary_emb"] = 1
    monkeypatch.setattr(base_weights, "get_balanced_memory", lambda *_, **__: {})
    monkeypatch.setattr(
        base_weights, "infer_auto_device_map", lambda *_, **__: {**whole, "model.rotary_emb": 1, "lm_head": 1}
    )
    found = base_weights.places("auto", lambda: load_model(str(saved_model())), None)
    assert found == {
        **{"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0},
        **{"model.layers.0": 0, "model.layers.1": 1},
    }


@pytest.mark.parametrize(
    ("places", "reason"),
    [
        ([], "must hold devices by the names of modules"),
        ({}, "must hold devices by the names of modules"),
        ({"": "gpu"}, "must be a device such as 0, cpu or disk, found 'gpu'"),
        ({"": 1.5}, "must be a device such as 0, cpu or disk, found 1.5"),
        ({"": "cpu", "model.layers.0": 97}, "there is no GPU 97, 0 are visible"),
        ({"model.embed_tokens": "cpu"}, "no place for model.layers.0: name it, or the module around it"),
        ({"": "disk"}, "model.embed_tokens would be on disk; embeddings, last norm and head"),
        ({"": "cpu", "model.norm": "disk"}, "model.norm is on disk: all that is no layer has to be on cpu"),
    ],
)
def test_a_map_that_cannot_be_used_is_refused(file, places, reason):
    if torch.cuda.is_available():
        pytest.skip("has GPUs")
    with pytest.raises(InputError) as caught:
        load_model(str(saved_model()), device_map=file(places))
    assert reason in str(caught.value)


def test_what_a_map_does_not_go_with_is_refused_before_loading(model, file, tmp_path, monkeypatch):
    def begin(**options):
        make_learner(tmp_path / "nowhere", tmp_path / "run", options=options)

    with pytest.raises(InputError, match=r"device_map: .*missing\.json: no such file"):
        begin(device_map=str(tmp_path / "missing.json"))
    with pytest.raises(InputError, match="flex attention keeps its mask on one device"):
        begin(device_map="auto", attention="flex")
    monkeypatch.setattr(base_weights, "world", lambda: 2)
    with pytest.raises(InputError, match="one process spreads a model over its devices, found 2 processes"):
        begin(device_map="auto")
    monkeypatch.undo()
    with pytest.raises(InputError, match="is merged on the CPU: write the merged model first"):
        base_weights.check_device_map("auto", "sdpa", "adapter")


def test_quantised_layers_off_the_gpu_are_refused(file):
    pytest.importorskip("bitsandbytes", reason="quantises: pip install everalign[quantize]")
    with pytest.raises(InputError, match="Some modules are dispatched on the CPU or the disk"):
        load_model(str(saved_model()), quantize="nf4", device_map=file(OFFLOADED))
