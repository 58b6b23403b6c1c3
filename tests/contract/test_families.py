"""Every family's response-only head against the model's own logits; loading from a folder and learning with it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM, Qwen2Config

from everalign import AdapterOptions, Learner, PreferenceSet, TrainingOptions
from everalign.data.collate import collate
from everalign.data.tokenization import TokenizedRow
from everalign.modeling import logprobs as token_log_probs
from everalign.modeling.logprobs import _in_one_row
from everalign.modeling.policy import Policy
from everalign.training.objectives import OBJECTIVES, make_objective
from models_for_tests import (
    FAMILIES,
    SCALED,
    collate_chosen,
    logits_of,
    perturb,
    random_groups,
    random_model,
    random_pairs,
    random_policy,
    random_rows,
    saved_model,
    scaled_by_itself,
)
from tiers_for_tests import slow_but

PAIRS = [*random_pairs(5, seed=5), TokenizedRow.pair("alike", [3, 4, 5], [6, 7, 8, 9, 10], [6, 7, 8, 11], 1.0)]
BATCH = collate(PAIRS, shared=False)
INPUTS = {name: BATCH[name] for name in ("input_ids", "attention_mask")}


def whole_log_probs(policy):
    """Sums of the response tokens' log-probabilities from the whole model's logits, token by token in fp64."""
    log_probs = F.log_softmax(logits_of(policy, PAIRS).double(), dim=-1)
    sums = []
    for row, (prompt, response) in enumerate((p.prompt, tokens) for p in PAIRS for tokens in p.responses):
        start = len(prompt)
        sums.append(sum(log_probs[row, start + i - 1, token] for i, token in enumerate(response)))
    return torch.stack(sums)


@pytest.fixture(scope="module", params=slow_but(["gemma3", "gpt2", "granite"], FAMILIES + SCALED))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def policy(family):
    return perturb(random_policy(family)).eval()


def test_the_head_is_apart_in_all_of_them(policy):
    assert policy.head.separate


@pytest.mark.parametrize("family", FAMILIES + SCALED)
def test_the_head_is_apart_in_bf16_too(family):
    assert Policy(random_model(family).to(torch.bfloat16), 2, 4.0).head.separate


def test_bf16_products_of_another_number_of_rows_do_not_hide_the_head():
    """At this width some processors sum a row of a small product in another order than that of a large one."""
    config = Qwen2Config(
        vocab_size=1000, hidden_size=896, intermediate_size=64, num_hidden_layers=1, num_attention_heads=14,
        num_key_value_heads=1, use_sliding_window=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).requires_grad_(False).eval()
    assert Policy(model, 2, 4.0).head.separate


def test_prompts_are_shared_also_where_layers_have_windows(policy):
    assert policy.head.shared
    assert policy.head.why_no_prefix_sharing is None


def test_response_only_head_equals_the_whole_model(policy):
    with torch.no_grad():
        sums = policy(BATCH)
    assert BATCH["lengths"].tolist() == [len(tokens) for p in PAIRS for tokens in p.responses]
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), whole_log_probs(policy), rtol=0, atol=1e-5)


def test_the_whole_model_path_gives_the_same(policy, monkeypatch):
    expected = whole_log_probs(policy)
    monkeypatch.setattr(policy.head, "separate", False)
    with torch.no_grad():
        sums = policy(BATCH)
        logits = policy.response_logits(BATCH)
    torch.testing.assert_close(sums.double(), expected, rtol=0, atol=1e-5)
    whole = logits_of(policy, PAIRS).flatten(0, 1)[BATCH["predictors"]]
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)


def gradients(policy, batch):
    """A loss in which every sequence counts differently, and its gradients."""
    policy.zero_grad()
    sums = policy(batch)
    loss = (sums * torch.arange(1.0, len(sums) + 1)).mean() / len(sums)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}


def assert_same_gradients(first, second):
    assert first[0] == pytest.approx(second[0], rel=1e-6)
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        size = gradient.abs().max()
        assert size > 1e-3
        torch.testing.assert_close(gradient / size, second[1][name] / size, rtol=0, atol=1e-5)


def test_gradients_are_those_of_the_whole_model(policy, monkeypatch):
    apart = gradients(policy, BATCH)
    monkeypatch.setattr(policy.head, "separate", False)
    assert_same_gradients(apart, gradients(policy, BATCH))


def test_shared_and_packed_rows_give_the_loss_and_gradients_of_separate_sequences(policy):
    batch = collate(PAIRS, shared=True)
    assert len(batch["input_ids"]) < len(PAIRS)
    assert_same_gradients(gradients(policy, batch), gradients(policy, BATCH))


def test_packed_chosen_sequences_give_those_of_separate_ones(policy):
    packed, single = (collate_chosen(PAIRS, shared) for shared in (True, False))
    assert len(packed["input_ids"]) < len(single["input_ids"])
    assert_same_gradients(gradients(policy, packed), gradients(policy, single))


def in_batches(policy, objective, rows, sizes):
    """Loss and gradients of a step whose rows come in micro-batches of these sizes."""
    policy.zero_grad()
    starts = [0, *itertools.accumulate(sizes)]
    batches = [objective.collate(rows[a:b], policy.head.shared) for a, b in itertools.pairwise(starts)]
    count, total = sum(batch["count"] for batch in batches), 0.0
    for batch in batches:
        batch["reference"] = torch.full((len(batch["lengths"]),), -7.0)
        loss, _ = objective.loss(policy, batch, count)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_accumulated_micro_batches_equal_the_big_batch(policy, name):
    rows = random_rows(name, 6, seed=5) if OBJECTIVES[name].rows != "preferences" else PAIRS
    objective = make_objective(name)
    whole, parts = (in_batches(policy, objective, rows, sizes) for sizes in ([6], [1, 3, 2]))
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    for key, gradient in whole[1].items():
        size = gradient.abs().max()
        assert size > 1e-5
        torch.testing.assert_close(parts[1][key] / size, gradient / size, rtol=0, atol=1e-5)


def test_scored_groups_share_their_prompt_without_changing_anything(policy):
    groups = random_groups(6, seed=5)
    shared, separate = (collate(groups, shared) for shared in (True, False))
    assert shared["input_ids"].numel() < separate["input_ids"].numel()
    assert_same_gradients(gradients(policy, shared), gradients(policy, separate))


def test_right_padding_changes_nothing(policy):
    for shared in {False, policy.head.shared}:
        alone = []
        longer = collate([*PAIRS, *random_pairs(1, seed=1, longest=60)], shared)
        with torch.no_grad():
            for pair in PAIRS:
                alone.append(policy(collate([pair], shared)))
            together = policy(longer).view(-1, 2)[: len(PAIRS)]
        torch.testing.assert_close(torch.stack(alone), together, rtol=0, atol=1e-5)


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
        expected = bare(**INPUTS, use_cache=False).logits
        assert torch.equal(logits_of(policy, PAIRS), expected)
    assert not torch.equal(logits_of(policy, PAIRS), expected)


def test_training_mode_changes_nothing(policy):
    """No dropout, though GPT-2's configuration asks for it: references are computed in evaluation mode."""
    with torch.no_grad():
        trained, evaluated = policy.train()(BATCH), policy.eval()(BATCH)
    assert torch.equal(trained, evaluated)


@pytest.mark.parametrize("family", ["qwen2", "roberta"])
def test_what_a_model_does_behind_its_decoder_is_run_on_a_few_positions(family, monkeypatch):
    """A scale of its own, and RoBERTa's dense layer and norm before the output matrix: values and gradients."""
    model = scaled_by_itself(random_model("qwen2")) if family == "qwen2" else random_model("roberta")
    policy = perturb(Policy(model, 4, 8.0))
    assert (policy.head.separate, policy.head.chunked) == (False, True)
    heights = []
    model.get_output_embeddings().register_forward_hook(lambda _, given, logits: heights.append(logits[..., 0].numel()))
    monkeypatch.setattr(token_log_probs, "_CHUNK_ROWS", 4)
    monkeypatch.setattr(token_log_probs, "_CHUNK_LOGITS", {"cpu": 1, "cuda": 1})
    chunked = gradients(policy, BATCH)
    # One row to learn of the vocabulary's size; forwards, and again in the backward pass.
    assert max(heights) == 4
    assert len(heights) == 1 + 2 * -(-len(BATCH["targets"]) // 4)
    monkeypatch.setattr(policy.head, "_resumable", False)
    assert_same_gradients(chunked, gradients(policy, BATCH))
    row = _in_one_row(BATCH) if family == "qwen2" else BATCH
    assert max(heights) == row["input_ids"].numel()


def test_a_model_without_a_decoder_of_its_own_runs_whole():
    model = random_model("llama")
    model.base_model_prefix = "nowhere"
    policy = perturb(Policy(model, 4, 8.0))
    assert not policy.head.separate
    with torch.no_grad():
        sums = policy(BATCH)
    torch.testing.assert_close(sums.double(), whole_log_probs(policy), rtol=0, atol=1e-5)


def test_a_saved_family_is_learned_and_served_by_plain_peft(family, tmp_path):
    folder = saved_model(family)
    options = TrainingOptions(learning_rate=1e-2, batch_size=4, tokens_per_batch=120, max_length=32)
    learner = Learner(
        str(folder), objective="dpo", output=tmp_path, training=options, adapter=AdapterOptions(rank=2), log=str
    )
    for answer in ("yes", "perhaps"):
        rows = [{"prompt": f"{answer} {i}?", "chosen": f"{answer} {i}", "rejected": "no"} for i in range(4)]
        learner.learn(PreferenceSet.of(rows, source="rows"), name=answer)
    bare = AutoModelForCausalLM.from_pretrained(folder)
    (adapter,) = (tmp_path / "versions").glob("002-*/adapter")
    served = PeftModel.from_pretrained(bare, adapter).eval()
    with torch.no_grad():
        logits = served(**INPUTS).logits
        with served.disable_adapter():
            before = served(**INPUTS).logits
    torch.testing.assert_close(logits_of(learner.policy, PAIRS), logits, rtol=0, atol=1e-5)
    assert (logits - before).abs().max() > 1e-2
