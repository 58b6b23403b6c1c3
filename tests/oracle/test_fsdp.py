"""Two processes that hold half of the base model's layers each learn what one does that holds all of them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from everalign.errors import EveralignError, InputError
from everalign.learning.run_data import load_run
from everalign.methods import make_method
from everalign.modeling.policy import Policy
from everalign.modeling.prompt_pool import PromptShape
from everalign.modeling.sharding import shard
from learner_for_tests import held_out, make_learner, save_answering_model, task_rows
from models_for_tests import random_model, random_policy
from two_processes_for_tests import OPTIONS, STAGES, exchange, join, rows_of, run_both, run_stages

CPU = torch.device("cpu")
# By method: the objective, and settings under which it computes things of its own, some of them with gradients.
RUNS = {
    "lifealign": ("fpo", {"replay": 0.5, "anchors": 0.1, "review": 0.25}),
    "er": ("snkl", {"replay": 0.5, "anchors": 0.1}),
    "gem": ("dpo", {"replay": 0.5, "refresh": 2}),
    "ewc": ("var", {"fisher_rows": 3}),
    "lifealign-rf": ("dpo", {"own_answers": 1.0}),  # answers of its own, not equally long
}


def run_method(model, output, name, fsdp):
    """Two tasks of five rows, two answers written after each by the main process alone; returns the learner."""
    objective, arguments = RUNS[name]
    learner = make_learner(
        model, output, make_method(name, **arguments), objective, options=OPTIONS, sample_answers=2, fsdp=fsdp
    )
    learner.learn_all([(task, rows_of(task, objective, 5), held_out(task, 5)) for task in ("warm", "brief")])
    return learner


def layer_bytes(policy):
    """Bytes of the layers' frozen weights: all of them, and those that this process holds."""
    parts = [part for name, part in policy.named_parameters() if ".layers." in name and ".lora_" not in name]
    local = [part.to_local() if isinstance(part, DTensor) else part for part in parts]
    # Storages, so that nothing whole is kept behind a small view.
    return sum(part.nbytes for part in parts), sum(part.untyped_storage().nbytes() for part in local)


def main(model, output, environment):
    join(environment)
    result = {"stages": run_stages(output / "stages", STAGES, lambda policy: shard(policy, CPU))}
    learners = [run_method(model, output / name, name, True) for name in RUNS]
    result |= {"bytes": layer_bytes(learners[-1].policy), "exchange": exchange()}
    try:
        learners[0].learn(task_rows("calm", 5), "calm")
    except EveralignError as error:
        result["older"] = str(error)
    torch.save(result, output / f"result.{environment['RANK']}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_answering_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(quick_processes, model, tmp_path_factory):
    """What two processes leave."""
    folder = tmp_path_factory.mktemp("two")
    run_both(quick_processes, main, model, folder)
    return folder


@pytest.fixture(scope="module")
def both(folder):
    return [torch.load(folder / f"result.{rank}") for rank in range(2)]


def norm_of_difference(found, expected):
    """‖found - expected‖ / ‖expected‖ over all tensors."""
    apart = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
    return (apart / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5


def updates(run, version):
    (file,) = (run / "versions" / version / "adapter").glob("*.safetensors")
    found = load_file(file)
    return {n: found[n.replace("lora_A", "lora_B")] @ found[n] for n in found if "lora_A" in n}


# ---- the same results ----


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_stages(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("name", STAGES)
def test_losses_and_gradients_are_those_of_one_process(both, alone, name):
    found, expected = both[0]["stages"][name], alone[name]
    # Adam makes whole steps of the smallest gradients, so that weights are no longer quite the same from then on.
    for step, (gradient, wanted) in enumerate(zip(found[1], expected[1], strict=True)):
        assert (gradient - wanted).norm() <= (1e-6 if step == 0 else 1e-5) * wanted.norm()
    for step, wanted in zip(found[2], expected[2], strict=True):
        assert step == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert all(torch.equal(value, both[1]["stages"][name][0][part]) for part, value in found[0].items())


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_with_the_adapter_of_one_process(folder, model, tmp_path, name):
    run_method(model, tmp_path / name, name, False)
    for version in ("001-warm", "002-brief"):
        one, two = (updates(run / name, version) for run in (tmp_path, folder))
        # Most end below 1e-6; Adam makes whole steps of the smallest gradients.
        assert norm_of_difference(two, one) <= 5e-6
    one, two = (load_run(run / name) for run in (tmp_path, folder))
    assert [version.answers for version in two.versions] == [version.answers for version in one.versions]
    facts = json.loads((folder / name / "run.json").read_text())["machine"]
    assert (facts["processes"], facts["fsdp"]) == (2, True)


def test_each_process_holds_half_of_the_layers(both):
    whole = layer_bytes(random_policy())
    assert whole[0] == whole[1]
    for result in both:
        total, local = result["bytes"]
        assert local == total / 2


def test_what_processes_tell_each_other_stays_the_same(both):
    assert both[0]["exchange"] == both[1]["exchange"]
    assert both[0]["exchange"]["error"] == ("InputError", "row 1 is bad")


def test_an_earlier_learner_is_refused(both):
    assert all("a later learner has taken over" in result["older"] for result in both)


# ---- what cannot be sharded ----


def test_what_cannot_be_sharded_is_refused():
    shared = random_policy()
    layers = shared.language_model.base_model.layers
    layers[1].mlp = layers[0].mlp
    with pytest.raises(InputError, match="of layer 1 is layer 0's too: this LlamaForCausalLM cannot be sharded"):
        shard(shared, CPU)
    unknown = random_policy()
    unknown.language_model.config.num_hidden_layers = 7
    with pytest.raises(InputError, match="the layers of this LlamaForCausalLM are not known"):
        shard(unknown, CPU)
    prompts = Policy(random_model(), 2, 4.0, prompts=PromptShape(2, 1, 1))
    with pytest.raises(InputError, match="the method l2p reads prompts one by one"):
        shard(prompts, CPU)
    quantised = random_policy()
    quantised.language_model.hf_quantizer = object()
    with pytest.raises(InputError, match="are quantised: leave fsdp out"):
        shard(quantised, CPU)


def test_one_process_cannot_shard(model, tmp_path):
    with pytest.raises(InputError, match="shares the base model between processes, found one"):
        make_learner(model, tmp_path / "run", fsdp=True)
