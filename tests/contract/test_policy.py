"""One base model and two adapters: what every switch computes, what is trainable, what is on disk."""

import pytest
import torch

from everalign.data.collate import collate
from everalign.errors import InputError
from everalign.memory import LowRankUpdate
from everalign.modeling.policy import Policy
from models_for_tests import (
    logits_of,
    perturb,
    random_model,
    random_pairs,
    random_policy,
    random_updates,
    trainable,
)

PAIRS = random_pairs(3)


FRESH = {"stm": {True}, "base": {False}}
TWO = {"stm": {True}, "ltm": {False}, "base": {False}}


@pytest.fixture
def policy():
    return random_policy()


@pytest.fixture
def both():
    """A policy with an update in both adapters."""
    policy = random_policy()
    policy.write_long_term(random_updates(policy))
    return perturb(policy)


# ---- switches ----


def test_a_new_policy_is_its_base_model_bit_for_bit(policy):
    bare = random_model()
    ours = logits_of(policy, PAIRS)
    with policy.as_base():
        assert torch.equal(logits_of(policy, PAIRS), ours)
    policy.peft = bare
    assert torch.equal(logits_of(policy, PAIRS), ours)


def test_both_adapters_off_is_the_base_model_bit_for_bit(both):
    expected = logits_of(random_policy(), PAIRS)
    with both.as_base():
        assert torch.equal(logits_of(both, PAIRS), expected)
    assert (logits_of(both, PAIRS) - expected).abs().max() > 0.1


def test_a_fresh_short_term_adapter_changes_nothing_bit_for_bit(both):
    both.start_short_term(seed=7)
    with_both = logits_of(both, PAIRS)
    alone = random_policy()
    alone.write_long_term(both.long_term())
    assert torch.equal(logits_of(alone, PAIRS), with_both)
    with both.as_snapshot(both.long_term()) as switched, switched():
        assert torch.equal(logits_of(both, PAIRS), with_both)


def test_the_policy_is_base_weights_plus_its_total_update(both):
    model = random_model()
    with torch.no_grad():
        for name, update in both.total().items():
            model.get_submodule(name).weight += update.dense()
    dense = random_policy()
    dense.peft = model
    torch.testing.assert_close(logits_of(dense, PAIRS), logits_of(both, PAIRS), rtol=0, atol=2e-5)


def test_a_snapshot_of_the_total_is_the_policy(both):
    expected = logits_of(both, PAIRS)
    with both.as_snapshot(both.total()) as switched:
        perturb(both, seed=9)
        changed = logits_of(both, PAIRS)
        with switched():
            torch.testing.assert_close(logits_of(both, PAIRS), expected, rtol=0, atol=2e-5)
        assert torch.equal(logits_of(both, PAIRS), changed)
    assert torch.equal(logits_of(both, PAIRS), changed)
    assert (changed - expected).abs().max() > 0.1


@pytest.mark.parametrize("nothing", [{}, "zero"])
def test_a_snapshot_of_nothing_is_the_base_model(both, nothing):
    updates = {name: LowRankUpdate.zero(u.shape) for name, u in both.total().items()} if nothing else {}
    with both.as_snapshot(updates) as switched, switched():
        assert torch.equal(logits_of(both, PAIRS), logits_of(random_policy(), PAIRS))
    assert trainable(both) == TWO


def test_what_was_learned_moves_to_long_term_memory(policy):
    perturb(policy)
    trained = logits_of(policy, PAIRS)
    policy.write_long_term(policy.short_term())
    policy.start_short_term(seed=3)
    torch.testing.assert_close(logits_of(policy, PAIRS), trained, rtol=0, atol=1e-5)


def test_memory_of_different_ranks_is_padded(policy):
    updates = random_updates(policy)
    names = sorted(updates)
    updates[names[0]] = LowRankUpdate.zero(updates[names[0]].shape)
    updates[names[1]] = updates[names[1]] + updates[names[1]]
    policy.write_long_term(updates)
    for name, update in policy.long_term().items():
        torch.testing.assert_close(update.dense(), updates[name].dense(), rtol=0, atol=1e-6)
        assert update.width == 6


def test_factors_of_a_lower_rank_leave_nothing_of_the_old_ones(both):
    low = {name: (left[:, :1], right[:1]) for name, (left, right) in both.factors().items()}
    both.write_factors(low)
    for name, (left, right) in both.factors().items():
        assert left.shape[1] == right.shape[0] == 4
        assert torch.equal(left[:, :1], low[name][0])
        assert torch.equal(right[:1], low[name][1])
        assert left[:, 1:].abs().max() == right[1:].abs().max() == 0


def test_reset_forgets_everything(both):
    both.reset(seed=0)
    assert both.long_term() == {}
    assert torch.equal(logits_of(both, PAIRS), logits_of(random_policy(), PAIRS))
    assert trainable(both) == FRESH
    fresh, factors = random_policy().factors(), both.factors()
    assert all(torch.equal(factors[name][1], fresh[name][1]) for name in fresh)


def test_the_seed_alone_decides_the_short_term_adapter(policy):
    before = torch.get_rng_state()
    policy.start_short_term(seed=5)
    first = policy.factors()
    policy.start_short_term(seed=6)
    other = policy.factors()
    torch.manual_seed(123)
    policy.start_short_term(seed=5)
    again = policy.factors()
    for name in first:
        assert torch.equal(first[name][1], again[name][1])
        assert not torch.equal(first[name][1], other[name][1])
        assert first[name][0].abs().max() == 0
    torch.set_rng_state(before)
    policy.start_short_term(seed=5)
    policy.write_long_term(random_updates(policy))
    assert torch.equal(torch.get_rng_state(), before)


# ---- what is trainable ----


def test_flags_after_every_switch(policy):
    assert trainable(policy) == FRESH
    policy.write_long_term(random_updates(policy))
    assert trainable(policy) == TWO
    policy.start_short_term(1)
    assert trainable(policy) == TWO
    with policy.as_base():
        pass
    assert trainable(policy) == TWO
    with policy.as_snapshot(random_updates(policy)) as switched:
        assert trainable(policy) == {**TWO, "snapshot": {False}}
        with switched():
            assert trainable(policy)["ltm"] == {False}
        assert trainable(policy) == {**TWO, "snapshot": {False}}
    assert trainable(policy) == TWO
    policy.write_long_term({})
    assert trainable(policy) == FRESH


def test_everything_is_restored_when_a_block_fails(both):
    expected = logits_of(both, PAIRS)

    def fails(context):
        with pytest.raises(KeyboardInterrupt), context:
            raise KeyboardInterrupt
        assert trainable(both) == TWO
        assert torch.equal(logits_of(both, PAIRS), expected)

    fails(both.as_base())
    fails(both.as_snapshot(random_updates(both)))
    with pytest.raises(KeyboardInterrupt), both.as_snapshot(random_updates(both)) as switched, switched():
        raise KeyboardInterrupt
    assert trainable(both) == TWO
    assert torch.equal(logits_of(both, PAIRS), expected)
    assert set(both.peft.peft_config) == {"stm", "ltm"}


def test_only_the_short_term_adapter_gets_gradients(both):
    both(BATCH).sum().backward()
    with_gradient = {name for name, parameter in both.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in both.named_parameters() if ".stm." in name}


BATCH = collate(random_pairs(2), shared=True)


def test_the_state_is_what_is_being_learned(both):
    state = both.state_dict()
    assert set(state) == {name for name, parameter in both.named_parameters() if parameter.requires_grad}
    assert all(".stm." in name for name in state)
    other = random_policy(seed=0)
    other.write_long_term(both.long_term())
    other.load_state_dict({name: value.clone() for name, value in state.items()})
    assert torch.equal(logits_of(other, PAIRS), logits_of(both, PAIRS))
    wrapped = torch.nn.ModuleDict({"inner": both})
    assert set(wrapped.state_dict()) == {f"inner.{name}" for name in state}


def test_a_state_of_other_modules_is_refused(policy):
    with pytest.raises(InputError, match="does not fit this model or adapter"):
        policy.load_state_dict(random_policy(targets=["q_proj"]).state_dict())


# ---- targets ----


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "v_proj"],
        ["model.layers.0.self_attn.q_proj"],
        ["layers.1.mlp.up_proj", "o_proj"],
        r".*\.1\..*[qk]_proj",
    ],
)
def test_long_term_memory_sits_on_the_very_same_modules(targets):
    policy = perturb(random_policy(targets=targets))
    modules = set(policy.short_term())
    trained = logits_of(policy, PAIRS)
    policy.write_long_term(policy.short_term())
    policy.start_short_term(1)
    assert set(policy.long_term()) == set(policy.short_term()) == modules
    torch.testing.assert_close(logits_of(policy, PAIRS), trained, rtol=0, atol=1e-5)


def test_targets_that_do_not_exist_are_refused_with_those_that_do():
    with pytest.raises(
        InputError, match=r"cannot adapt wq: no module .*Modules of this model: .*q_proj, up_proj, v_proj"
    ):
        random_policy(targets=["wq"])


def test_only_linear_modules_are_adapted():
    with pytest.raises(InputError, match=r"cannot adapt model\.embed_tokens, which is of type Embedding"):
        random_policy(targets=["q_proj", "embed_tokens"])


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], r".*(q_proj|lm_head)"])
def test_a_head_that_is_tied_to_the_embeddings_is_no_target(targets):
    """qwen3 here ties them: a merged model would add to the embeddings what was learned for the head."""
    with pytest.raises(InputError, match=r"cannot adapt lm_head: its weights are tied to those of model\.embed_tokens"):
        random_policy("qwen3", targets=targets)


def with_shared_weights():
    model = random_model()
    first, second = (layer.self_attn for layer in model.model.layers)
    second.v_proj.weight = first.v_proj.weight
    return model


def test_weights_that_layers_share_are_no_target():
    with pytest.raises(InputError, match=r"cannot adapt model\.layers\.0\.self_attn\.v_proj: .* tied to .*layers\.1"):
        Policy(with_shared_weights(), 4, 8.0, ["v_proj"])


def test_weights_that_layers_share_stay_frozen_where_all_are_meant():
    policy = Policy(with_shared_weights(), 4, 8.0)
    assert not any("v_proj" in name for name in policy.factors())
    expected = "not adapted, since modules share their weights: linear modules of model.layers.#.self_attn.v_proj (2)"
    assert expected in policy.notes


def test_the_head_can_be_a_target():
    policy = perturb(random_policy(targets=["q_proj", "lm_head"]))
    batch = collate(PAIRS, shared=False)
    whole = logits_of(policy, PAIRS).flatten(0, 1)[batch["predictors"]]
    with torch.no_grad():
        torch.testing.assert_close(policy.response_logits(batch), whole, rtol=0, atol=1e-5)
    log_probs = whole.log_softmax(-1)[range(len(whole)), batch["targets"]]
    expected = torch.zeros(2 * len(PAIRS)).index_add(0, batch["sequences"], log_probs)
    sums = policy(batch)
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-5)
    sums.sum().backward()
    head = policy.peft.get_base_model().lm_head
    assert head.lora_B["stm"].weight.grad.abs().max() > 1e-3


# ---- bf16 ----


def bf16_policy():
    return perturb(Policy(random_model().bfloat16(), 4, 8.0))


def test_in_bf16_the_adapters_stay_fp32_and_results_are_near():
    policy, exact = bf16_policy(), perturb(random_policy())
    policy.write_long_term(random_updates(policy))
    exact.write_long_term(random_updates(exact))
    dtypes = {"lora" in name: parameter.dtype for name, parameter in policy.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    sums, expected = policy(BATCH), exact(BATCH)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, expected, rtol=0, atol=0.3)
    assert not torch.equal(sums, expected)


def test_in_bf16_the_switches_hold_bit_for_bit():
    policy = bf16_policy()
    fresh = Policy(random_model().bfloat16(), 4, 8.0)
    with torch.no_grad():
        expected = fresh(BATCH)
        with policy.as_base():
            assert torch.equal(policy(BATCH), expected)
        policy.start_short_term(1)
        assert torch.equal(policy(BATCH), expected)


def test_in_bf16_gradients_are_fp32_and_near():
    policy, exact = bf16_policy(), perturb(random_policy())
    for each in (policy, exact):
        each(BATCH).mean().backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        cosine = torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.98
