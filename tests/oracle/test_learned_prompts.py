"""Learned prompts against transformers with `inputs_embeds`, brute force and closed forms."""

import copy

import pytest
import torch
import torch.nn.functional as F

from everalign.data.collate import collate
from everalign.errors import InputError
from everalign.evaluation.preference import mean_kl
from everalign.methods import make_method
from everalign.modeling.policy import Policy
from everalign.modeling.prompt_pool import PromptShape, check_readable, nearest_keys, refuse_prompts
from everalign.modeling.sampling import greedy_continuations
from everalign.training.hooks import Stage, make_batch, parameters
from everalign.training.objectives import make_objective
from everalign.training.reference import sequence_logprobs
from models_for_tests import random_groups, random_model, random_pairs, random_policy, scaled_by_itself

SHAPE = PromptShape(entries=6, length=2, selected=3)
PAIRS = random_pairs(5)
# Embeddings that are scaled, positions that are added, windows, a head that is scaled, prompts that cannot be shared.
FAMILIES = ("llama", "gemma3", "gpt2", "mistral", "cohere", "bloom")


def prompted_policy(family="llama", seed=0, shape=SHAPE):
    policy = Policy(random_model(family), 4, 8.0, seed=seed, prompts=shape)
    policy.use_prompts()
    return policy


def query_of(model, prompt):
    with torch.no_grad():
        states = model.base_model(input_ids=torch.tensor([prompt]), use_cache=False).last_hidden_state
    return states[0].mean(0)


def chosen_vectors(model, pool, prompt):
    """What stands in front of a prompt, by sorting all cosines."""
    cosines = [F.cosine_similarity(query_of(model, prompt), key, dim=0).item() for key in pool.keys]
    best = sorted(range(len(cosines)), key=lambda number: -cosines[number])[: pool.shape.selected]
    return torch.cat([pool.vectors[number] for number in best]), best


def embedded(model, pool, prompt, response=()):
    vectors, _ = chosen_vectors(model, pool, prompt)
    tokens = model.get_input_embeddings()(torch.tensor([*prompt, *response]))
    return torch.cat([vectors, tokens])[None]


def plain_logprob(model, pool, prompt, response):
    logits = model(inputs_embeds=embedded(model, pool, prompt, response), use_cache=False).logits[0]
    log_probs = logits[-len(response) - 1 : -1].log_softmax(-1)
    return log_probs.gather(1, torch.tensor(response)[:, None]).sum()


# ---- what stands in front ----


def test_the_nearest_keys_are_those_that_brute_force_finds():
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(7, 5, generator=generator), torch.randn(9, 5, generator=generator)
    cosines, numbers = nearest_keys(queries, keys, 4)
    for row, query in enumerate(queries):
        every = {number: F.cosine_similarity(query, key, dim=0).item() for number, key in enumerate(keys)}
        best = sorted(every, key=lambda number: -every[number])[:4]
        assert numbers[row].tolist() == best
        assert cosines[row].tolist() == pytest.approx([every[number] for number in best], abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_vectors_in_front_of_embeddings(family):
    policy, model = prompted_policy(family), random_model(family)
    assert policy.head.shared == (family != "bloom")
    found = sequence_logprobs(policy, PAIRS, 100)
    for row, values in zip(PAIRS, found, strict=True):
        with torch.no_grad():
            expected = [plain_logprob(model, policy.prompts, row.prompt, response) for response in row.responses]
        torch.testing.assert_close(values, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_a_prompt_chooses_alike_whatever_answers_it_and_whatever_stands_beside_it():
    policy = prompted_policy()
    alone = policy.queries([PAIRS[0].prompt])
    policy._queries.clear()
    together = policy.queries([row.prompt for row in PAIRS])
    assert torch.equal(alone[0], together[0])
    torch.testing.assert_close(alone[0], query_of(random_model(), PAIRS[0].prompt), rtol=1e-4, atol=1e-5)
    for row in PAIRS:
        _, numbers = nearest_keys(policy.queries([row.prompt]), policy.prompts.keys, 3)
        assert numbers[0].tolist() == chosen_vectors(random_model(), policy.prompts, row.prompt)[1]


def test_shared_prompts_give_what_separate_ones_give():
    policy = prompted_policy("gemma3")
    rows = random_groups(6, seed=4)
    with torch.no_grad():
        shared, apart = (policy(collate(rows, shared)) for shared in (True, False))
    torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-4)


def test_choices_and_logits_stay_in_the_batchs_order():
    policy = prompted_policy()
    batch = collate(PAIRS, shared=True)
    with torch.no_grad():
        log_probs = policy.response_logits(batch).log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]
        found, _ = policy.response_choices(batch)
        sums = torch.zeros(10).index_add(0, batch["sequences"], log_probs)
        torch.testing.assert_close(found, log_probs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(policy(batch), sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_answers_are_those_of_transformers_generation_from_embeddings(family):
    policy, model = prompted_policy(family), random_model(family)
    prompts = [row.prompt for row in PAIRS]
    written = greedy_continuations(policy, prompts, [2], 8)
    for prompt, tokens in zip(prompts, written, strict=True):
        with torch.no_grad():
            given = embedded(model, policy.prompts, prompt)
            expected = model.generate(
                inputs_embeds=given,
                attention_mask=torch.ones(given.shape[:2], dtype=torch.long),
                do_sample=False,
                max_new_tokens=8,
                eos_token_id=2,
                pad_token_id=0,
            )
        assert tokens == expected[0].tolist()
    assert len({tuple(tokens) for tokens in written}) > 1


# ---- what is not the policy ----


def test_without_prompts_it_is_the_base_model_bit_for_bit():
    policy, bare = prompted_policy(), random_policy()
    batch = collate(PAIRS, shared=True)
    with torch.no_grad():
        prompted, expected = policy(batch), bare(batch)
        with policy.as_base():
            assert torch.equal(policy(batch), expected)
            assert policy.prefix_length == 0
        assert torch.equal(policy(batch), prompted)
    assert (prompted - expected).abs().max() > 0.1
    weights = dict(bare.language_model.named_parameters())
    for name, value in policy.language_model.named_parameters():
        assert torch.equal(value, weights[name])


def test_before_anything_is_learned_nothing_is_put_in_front():
    policy, bare = prompted_policy(), random_policy()
    policy.reset(3)
    batch = collate(PAIRS, shared=True)
    with torch.no_grad():
        assert torch.equal(policy(batch), bare(batch))
        assert policy.snapshot().prompts is None
        with policy.as_snapshot(policy.snapshot()) as switched:
            policy.use_prompts()
            assert not torch.equal(policy(batch), bare(batch))
            with switched():
                assert torch.equal(policy(batch), bare(batch))


def test_a_snapshot_is_the_policy_as_it_was():
    policy = prompted_policy()
    batch = collate(PAIRS, shared=True)
    with torch.no_grad():
        before, earlier = policy(batch), policy.snapshot()
        policy.prompts.reset(policy.language_model.get_input_embeddings(), seed=5)
        now = policy(batch)
        with policy.as_snapshot(earlier) as switched:
            assert torch.equal(policy(batch), now)
            with switched():
                assert torch.equal(policy(batch), before)
        with policy.as_snapshot({}) as switched, switched():
            assert torch.equal(policy(batch), random_policy()(batch))
        assert torch.equal(policy(batch), now)
    assert (now - before).abs().max() > 0.1
    assert mean_kl(policy, policy.snapshot(), PAIRS) == 0.0
    assert mean_kl(policy, earlier, PAIRS) > 0.0


# ---- what learns ----


def stage_of(policy):
    with policy.as_base():
        reference = sequence_logprobs(policy, PAIRS, 400)
    return Stage(policy, make_objective("dpo", 1.0), PAIRS, len(PAIRS), 0, reference, 400)


def test_chosen_entries_learn_by_the_loss_and_chosen_keys_by_the_pull():
    policy, method = prompted_policy(), make_method("l2p", strength=0.7, top_prompts=3)
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == ["prompts.vectors", "prompts.keys"]
    stage, number = stage_of(policy), 1
    terms = method.begin_stage(stage)
    batch = make_batch(PAIRS, [number], stage.objective, True, stage.reference, terms)
    logprobs = policy(batch)
    stage.objective.loss(lambda _: logprobs, batch, batch["count"])[0].backward()
    _, chosen = chosen_vectors(random_model(), policy.prompts, PAIRS[number].prompt)
    moved = policy.prompts.vectors.grad.flatten(1).any(1)
    assert sorted(moved.nonzero()[:, 0].tolist()) == sorted(chosen)
    assert policy.prompts.keys.grad is None

    pull = method.row_loss(logprobs, batch)
    query = query_of(random_model(), PAIRS[number].prompt)
    keys = policy.prompts.keys.detach().clone().requires_grad_()
    expected = 0.7 * sum(1 - F.cosine_similarity(query, keys[one], dim=0) for one in chosen)
    torch.testing.assert_close(pull, expected[None].detach(), rtol=1e-4, atol=1e-5)
    before = policy.prompts.vectors.grad.clone()
    pull.sum().backward()
    expected.backward()
    torch.testing.assert_close(policy.prompts.keys.grad, keys.grad, rtol=1e-3, atol=1e-6)
    assert torch.equal(policy.prompts.vectors.grad, before)


@pytest.mark.parametrize("shared", [True, False])
def test_each_row_is_pulled_to_its_own_query(shared):
    policy, method = prompted_policy(), make_method("l2p", strength=0.1, top_prompts=3)
    stage = stage_of(policy)
    batch = make_batch(PAIRS, [3, 0, 2], stage.objective, shared, stage.reference, method.begin_stage(stage))
    found = method.row_loss(policy(batch), batch)
    cosines, _ = nearest_keys(policy.queries([PAIRS[n].prompt for n in (3, 0, 2)]), policy.prompts.keys, 3)
    torch.testing.assert_close(found, 0.1 * (1 - cosines).sum(1))


def test_gradients_of_vectors_are_those_of_finite_differences():
    policy = prompted_policy()
    stage = stage_of(policy)
    (vectors, _) = parameters(policy)
    batch = stage.objective.collate(PAIRS, True)
    batch["reference"] = torch.cat(stage.reference)
    stage.objective.loss(policy, batch, batch["count"])[0].backward()
    flat, place = vectors.data.view(-1), vectors.grad.abs().argmax()
    found = []
    for step in (1e-3, -1e-3):
        flat[place] += step
        found.append(stage.loss(range(len(PAIRS))))
        flat[place] -= step
    assert vectors.grad.view(-1)[place].item() == pytest.approx((found[0] - found[1]) / 2e-3, rel=2e-2)


def test_vectors_start_as_embeddings_and_a_seed_gives_them_again():
    policy = prompted_policy("gemma3")
    embeddings = policy.language_model.get_input_embeddings()
    with torch.no_grad():
        every = embeddings(torch.arange(len(embeddings.weight)))
    vectors = policy.prompts.vectors.detach().view(-1, every.shape[1])
    assert (vectors[:, None] == every).all(-1).any(1).all()
    assert policy.prompts.keys.abs().max() <= 1
    start = copy.deepcopy(policy.prompts.state_dict())
    for seed, same in ((1, False), (0, True)):
        policy.reset(seed)
        assert torch.equal(policy.prompts.vectors, start["vectors"]) is same
        assert torch.equal(policy.prompts.keys, start["keys"]) is same


# ---- files and models ----


def test_prompts_are_written_alone_and_read_again(tmp_path):
    policy, other = prompted_policy(), prompted_policy(seed=7)
    policy.save_adapter(tmp_path / "kept")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["prompts.safetensors"]
    other.load_adapter(tmp_path / "kept", long_term=False, seed=1)
    assert torch.equal(other.prompts.vectors, policy.prompts.vectors)
    assert torch.equal(other.prompts.keys, policy.prompts.keys)
    with pytest.raises(InputError, match="no adapter and no merged model can hold them"):
        random_policy().load_adapter(tmp_path / "kept", long_term=False, seed=0)
    refuse_prompts(tmp_path)


def test_files_that_are_no_prompts_of_this_pool_are_refused(tmp_path):
    policy = prompted_policy()
    before = policy.prompts.vectors.detach().clone()
    with pytest.raises(InputError, match=r"prompts\.safetensors: no such file"):
        policy.load_adapter(tmp_path, long_term=False, seed=0)
    prompted_policy(shape=PromptShape(6, 3, 3)).save_adapter(tmp_path)
    with pytest.raises(InputError, match="prompts of another model or size"):
        policy.load_adapter(tmp_path, long_term=False, seed=0)
    (tmp_path / "prompts.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="the prompts are damaged"):
        policy.load_adapter(tmp_path, long_term=False, seed=0)
    assert torch.equal(policy.prompts.vectors, before)


def test_a_model_whose_states_cannot_be_read_is_refused():
    whole = scaled_by_itself(random_model())
    type(whole).base_model = property(lambda self: self)
    with pytest.raises(InputError, match="l2p: its hidden states cannot be read apart"):
        Policy(whole, 4, 8.0, prompts=SHAPE)


def test_a_model_that_looks_tokens_up_elsewhere_is_refused():
    model, pool = random_model(), prompted_policy().prompts
    table = torch.nn.Embedding(96, 32)
    plain = model.model.forward

    def forward(input_ids=None, inputs_embeds=None, **options):
        given = model.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return plain(inputs_embeds=given + (0 if input_ids is None else table(input_ids)), **options)

    model.model.forward = forward
    with pytest.raises(InputError, match=r"does not read learned prompts \(IndexError"):
        check_readable(model, pool)
    forward_of = torch.nn.Embedding.forward
    table.forward = lambda tokens: forward_of(table, tokens % 96)
    with pytest.raises(InputError, match=r"does not read learned prompts$"):
        check_readable(model, pool)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("pool_size", 0),
        ("prompt_length", 0),
        ("top_prompts", 0),
        ("top_prompts", 11),
        ("strength", -1.0),
        ("prompt_rate", 0.0),
        ("prompt_rate", float("inf")),
    ],
)
def test_bad_arguments_name_themselves(argument, value):
    with pytest.raises(InputError) as error:
        make_method("l2p", **{argument: value})
    assert error.value.field == argument
