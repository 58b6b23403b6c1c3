"""Every family's response-only head against the model's own logits; loading from a folder and learning with it."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM

from everalign import AdapterOptions, Learner, PreferenceSet, TrainingOptions
from everalign.data.batches import pad_pairs
from everalign.modeling.policy import Policy
from models_for_tests import (
    FAMILIES,
    PAD,
    SCALED,
    logits_of,
    perturb,
    random_model,
    random_pairs,
    random_policy,
    saved_model,
)

PAIRS = random_pairs(3, seed=5)
BATCH = pad_pairs(PAIRS, PAD)
INPUTS = (BATCH["input_ids"], BATCH["attention_mask"], BATCH["response_mask"])


def whole_log_probs(policy):
    """Sums of the response tokens' log-probabilities from the whole model's logits, token by token in fp64."""
    log_probs = F.log_softmax(logits_of(policy, PAIRS).double(), dim=-1)
    sums = []
    for row, (prompt, response) in enumerate(
        [(p.prompt, p.chosen) for p in PAIRS] + [(p.prompt, p.rejected) for p in PAIRS]
    ):
        start = len(prompt)
        sums.append(sum(log_probs[row, start + i - 1, token] for i, token in enumerate(response)))
    return torch.stack(sums)


@pytest.fixture(scope="module", params=FAMILIES + SCALED)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def policy(family):
    return perturb(random_policy(family)).eval()


def test_the_head_is_apart_but_where_logits_are_scaled(policy, family):
    assert policy.head.separate == (family in FAMILIES)


def test_response_only_head_equals_the_whole_model(policy):
    with torch.no_grad():
        sums, lengths = policy(*INPUTS)
    assert lengths.tolist() == [len(p.chosen) for p in PAIRS] + [len(p.rejected) for p in PAIRS]
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), whole_log_probs(policy), rtol=0, atol=1e-5)


def test_the_whole_model_path_gives_the_same(policy, monkeypatch):
    expected = whole_log_probs(policy)
    monkeypatch.setattr(policy.head, "separate", False)
    with torch.no_grad():
        sums, _ = policy(*INPUTS)
        logits = policy.response_logits(*INPUTS)
    torch.testing.assert_close(sums.double(), expected, rtol=0, atol=1e-5)
    predicts = BATCH["response_mask"][:, 1:]
    torch.testing.assert_close(logits, logits_of(policy, PAIRS)[:, :-1][predicts], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES, scope="module")
def test_gradients_are_those_of_the_whole_model(policy, monkeypatch):

    def gradients():
        policy.zero_grad()
        sums, _ = policy(*INPUTS)
        (sums * torch.arange(1.0, 7.0)).mean().backward()
        return {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}

    apart = gradients()
    monkeypatch.setattr(policy.head, "separate", False)
    whole = gradients()
    assert apart.keys() == whole.keys()
    for name, grad in apart.items():
        assert grad.abs().max() > 1e-3
        torch.testing.assert_close(grad, whole[name], rtol=1e-4, atol=1e-5)


def test_right_padding_changes_nothing(policy):
    alone = []
    with torch.no_grad():
        for pair in PAIRS:
            batch = pad_pairs([pair], PAD)
            alone.append(policy(batch["input_ids"], batch["attention_mask"], batch["response_mask"])[0])
        together, _ = policy(*INPUTS)
        padded, _ = policy(F.pad(INPUTS[0], (0, 9), value=7), F.pad(INPUTS[1], (0, 9)), F.pad(INPUTS[2], (0, 9)))
    torch.testing.assert_close(torch.stack(alone, dim=1).flatten(), together, rtol=0, atol=1e-5)
    torch.testing.assert_close(padded, together, rtol=0, atol=1e-5)


def test_every_matrix_of_the_decoder_is_adapted_and_the_head_is_not(policy, family):
    linear = {
        name
        for name, module in random_model(family).named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head"
    }
    assert set(policy.factors()) == linear


def test_adapters_off_is_the_bare_model(policy, family):
    bare = random_model(family)
    with policy.as_base(), torch.no_grad():
        expected = bare(input_ids=INPUTS[0], attention_mask=INPUTS[1], use_cache=False).logits
        assert torch.equal(logits_of(policy, PAIRS), expected)
    assert not torch.equal(logits_of(policy, PAIRS), expected)


def test_training_mode_changes_nothing(policy):
    """No dropout, though GPT-2's configuration asks for it: references are computed in evaluation mode."""
    with torch.no_grad():
        trained, _ = policy.train()(*INPUTS)
        evaluated, _ = policy.eval()(*INPUTS)
    assert torch.equal(trained, evaluated)


def test_a_model_without_a_decoder_of_its_own_runs_whole():
    model = random_model("llama")
    model.base_model_prefix = "nowhere"
    policy = perturb(Policy(model, 4, 8.0))
    assert not policy.head.separate
    with torch.no_grad():
        sums, _ = policy(*INPUTS)
    torch.testing.assert_close(sums.double(), whole_log_probs(policy), rtol=0, atol=1e-5)


def test_a_saved_family_is_learned_and_served_by_plain_peft(family, tmp_path):
    folder = saved_model(family)
    options = TrainingOptions(learning_rate=1e-2, batch_size=4, micro_batch_size=2, max_length=32)
    learner = Learner(
        str(folder), objective="dpo", output=tmp_path, training=options, adapter=AdapterOptions(2), announce=str
    )
    for answer in ("yes", "perhaps"):
        rows = [{"prompt": f"{answer} {i}?", "chosen": f"{answer} {i}", "rejected": "no"} for i in range(4)]
        learner.learn(PreferenceSet.of(rows, source="rows"), name=answer)
    bare = AutoModelForCausalLM.from_pretrained(folder)
    (adapter,) = (tmp_path / "versions").glob("002-*/adapter")
    served = PeftModel.from_pretrained(bare, adapter).eval()
    with torch.no_grad():
        logits = served(input_ids=INPUTS[0], attention_mask=INPUTS[1]).logits
        with served.disable_adapter():
            before = served(input_ids=INPUTS[0], attention_mask=INPUTS[1]).logits
    torch.testing.assert_close(logits_of(learner.policy, PAIRS), logits, rtol=0, atol=1e-5)
    assert (logits - before).abs().max() > 1e-2
