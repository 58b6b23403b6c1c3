"""Long rows: tables of positions that end, and positions that stretch with the longest row of a batch."""

import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    RobertaConfig,
    XGLMConfig,
)

from everalign.data.collate import collate, split_by_length
from everalign.data.tokenization import TokenizedRow
from everalign.errors import InputError
from everalign.modeling.architecture import study
from everalign.modeling.decoding import RaggedModel, RaggedRows
from everalign.modeling.policy import Policy
from everalign.modeling.positions import Stretch
from everalign.modeling.sampling import sample_completions
from everalign.options import SamplingOptions
from everalign.training.reference import sequence_logprobs
from models_for_tests import SHAPE, perturb
from tokenizers_for_tests import byte_tokenizer

SMALL = {**SHAPE, "vocab_size": 96}
FACTORS = {"short_factor": [1.0, 1.02, 1.05, 1.1], "long_factor": [1.3, 4.0, 20.0, 60.0]}


def longrope(original, longest):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": original, **FACTORS}
    lengths = {"original_max_position_embeddings": original, "max_position_embeddings": longest}
    return Phi3Config(**{**SMALL, **lengths, "rope_parameters": rope})


def rotary(kind, longest, **more):
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0, **more}
    return LlamaConfig(**{**SMALL, "max_position_embeddings": longest, "rope_parameters": rope})


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


# ---- tables that end ----

OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
LONGEST = {
    "a table": (GPT2Config(**OLD, n_positions=1000), 1000),
    "a table shorter than the copy's": (GPT2Config(**OLD, n_positions=48), 48),
    "a table with two rows to spare": (
        OPTConfig(**LAYERS, hidden_size=32, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=2048),
        2048,
    ),
    "a table whose first rows are for padding": (
        RobertaConfig(**LAYERS, hidden_size=32, intermediate_size=64, is_decoder=True, max_position_embeddings=514),
        512,
    ),
    "another table with two rows to spare": (
        BioGptConfig(**LAYERS, hidden_size=32, intermediate_size=64, max_position_embeddings=300),
        300,
    ),
    "sines in a table": (GPTJConfig(**OLD, rotary_dim=4, n_positions=200), 200),
    "sines that grow": (
        XGLMConfig(d_model=32, num_layers=2, attention_heads=4, ffn_dim=64, vocab_size=96, max_position_embeddings=200),
        None,
    ),
    "rotary positions": (rotary("linear", 128), None),
}


@pytest.mark.parametrize(("config", "longest"), LONGEST.values(), ids=LONGEST)
def test_the_longest_row_that_can_be_read_is_found(config, longest):
    model = model_of(config)
    assert study(model).lengths.longest == longest
    if longest is not None:
        row = torch.randint(3, 96, (1, longest + 1), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            model(input_ids=row[:, :-1])
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=row)


# ---- positions that stretch ----

STRETCHED = {
    "longrope": (longrope(4096, 131072), Stretch((4096,), by_length=False)),
    "dynamic": (rotary("dynamic", 2048), Stretch((2048,), by_length=True)),
    "yarn": (rotary("yarn", 8192, original_max_position_embeddings=2048), None),
    "linear": (rotary("linear", 2048), None),
}


@pytest.mark.parametrize(("config", "stretch"), STRETCHED.values(), ids=STRETCHED)
def test_where_positions_begin_to_stretch_is_found(config, stretch):
    assert study(model_of(config)).lengths.stretch == stretch


def pairs(*lengths):
    rng = random.Random(0)

    def tokens(count):
        return [rng.randrange(3, 96) for _ in range(count)]

    return [
        TokenizedRow.pair(str(i), tokens(prompt), tokens(chosen), tokens(rejected), 1.0)
        for i, (prompt, chosen, rejected) in enumerate(lengths)
    ]


# Short rows, long ones, exactly the limit of 32 and one more, and a prompt whose answers lie on both sides of it.
PAIRS = pairs((6, 4, 5), (60, 12, 9), (28, 4, 5), (30, 20, 1), (40, 3, 7), (5, 3, 2))


def alone(config, prompt, response, updates):
    """Log-probability of a response by plain transformers in a new model, the update added to its weights."""
    model = model_of(config)
    with torch.no_grad():
        for name, update in updates.items():
            model.get_submodule(name).weight += update.dense()
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
    return sum(logits[len(prompt) + i - 1, token].item() for i, token in enumerate(response))


@pytest.mark.parametrize(
    "config",
    [longrope(32, 512), longrope(8, 512), rotary("dynamic", 32)],
    ids=["longrope", "longrope of few tokens", "dynamic"],
)
def test_a_row_is_what_it_is_alone_whatever_stands_beside_it(config):
    policy = perturb(Policy(model_of(config), 2, 4.0)).eval()
    expected = torch.tensor(
        [[alone(config, pair.prompt, own, policy.total()) for own in (pair.chosen, pair.rejected)] for pair in PAIRS]
    )
    for shared in (True, False):
        with torch.no_grad():
            found = policy(collate(PAIRS, shared)).view(-1, 2)
            short = policy(collate(PAIRS[:1], shared)).view(-1, 2)
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=2e-4)
        torch.testing.assert_close(short, expected[:1].float(), rtol=0, atol=2e-4)
    for budget in (60, 10_000):
        found = torch.stack(sequence_logprobs(policy, PAIRS, budget))
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=2e-4)


def test_gradients_are_the_sum_of_those_of_each_row_alone():
    policy = perturb(Policy(model_of(rotary("dynamic", 32)), 2, 4.0)).train()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    together = torch.autograd.grad(policy(collate(PAIRS, policy.head.shared)).sum(), parameters)
    apart = [torch.autograd.grad(policy(collate([pair], False)).sum(), parameters) for pair in PAIRS]
    for found, *parts in zip(together, *apart, strict=True):
        expected = sum(parts)
        torch.testing.assert_close(found / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-4)


def test_short_rows_share_their_prompts_as_ever():
    batch = collate(PAIRS[:1] + PAIRS[5:], shared=True)
    ((same, numbers),) = split_by_length(batch, Stretch((32,), by_length=True).kind)
    assert same is batch
    assert numbers.tolist() == list(range(len(batch["targets"])))


def test_kinds_are_cut_apart_and_cover_every_token():
    batch = collate(PAIRS, shared=True)
    parts = split_by_length(batch, Stretch((32,), by_length=False).kind)
    assert len(parts) == 2
    assert torch.cat([numbers for _, numbers in parts]).sort().values.tolist() == list(range(len(batch["targets"])))
    for part, numbers in parts:
        assert torch.equal(part["targets"], batch["targets"][numbers])
    assert [int(part["attention_mask"].sum(1).max()) for part, _ in parts] == [32, 72]


# ---- rows that are written ----


def test_answers_that_would_change_their_positions_are_refused_before_they_are_sampled():
    tokenizer = byte_tokenizer()
    config = longrope(40, 512)
    config.vocab_size = len(tokenizer)
    policy = Policy(model_of(config), 2, 4.0)
    short = SamplingOptions(completions=2, max_new_tokens=8)
    assert len(sample_completions(policy, tokenizer, ["abc"], short, seed=0)) == 1
    with pytest.raises(InputError, match=r"may grow to .* tokens, and beyond 40 the model's positions stretch"):
        sample_completions(policy, tokenizer, ["abc"], SamplingOptions(max_new_tokens=60), seed=0)


def test_answers_longer_than_a_table_of_positions_are_refused_before_they_are_sampled():
    tokenizer = byte_tokenizer()
    policy = Policy(model_of(GPT2Config(**{**OLD, "vocab_size": len(tokenizer)}, n_positions=64)), 2, 4.0)
    with pytest.raises(InputError, match=r"may grow to .* tokens, and the model can read 64: lower max_new_tokens"):
        sample_completions(policy, tokenizer, ["abc"], SamplingOptions(max_new_tokens=64), seed=0)


def test_drafts_are_verified_up_to_where_positions_stretch():
    rows = RaggedRows(RaggedModel(model_of(longrope(32, 512))), 1)
    rows.append([[5] * 30], [1])
    with pytest.raises(InputError, match="a row may grow to 33 tokens, and beyond 32"):
        rows.append([[5] * 3], [1])
