"""Sampled completions: drawn from the policy itself, whatever stands beside a prompt; the same for the same seed."""

import itertools
from collections import Counter

import pytest
import torch

from everalign.data.tokenization import TokenizedRow
from everalign.errors import InputError
from everalign.modeling.loading import load_model, load_tokenizer
from everalign.modeling.policy import Policy
from everalign.modeling.sampling import Samples, TurnEnd, _draw, _Ends, _samples, sample_completions
from everalign.options import SamplingOptions
from models_for_tests import collate_chosen, perturb, random_model
from tokenizers_for_tests import byte_tokenizer

END, LONGEST, DRAWS = 2, 3, 6000
PROMPTS = [[1], [1, 3, 1, 1, 3]]
ENDS = _Ends(byte_tokenizer(), frozenset({END}), TurnEnd())
# Up to two tokens and the end, or three tokens.
ANSWERS = [
    (*tokens, END) if count < LONGEST else tokens
    for count in range(LONGEST + 1)
    for tokens in itertools.product((0, 1, 3), repeat=count)
]
CHAT = [{"role": "user", "content": "How do I boil an egg?"}]


@pytest.fixture(scope="module")
def small():
    model = random_model(vocabulary=4)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)  # else all tokens are nearly as likely
    return perturb(Policy(model, 4, 8.0), size=0.3)


@pytest.fixture(scope="module")
def assistant():
    return Policy(load_model("tiny"), 4, 8.0), load_tokenizer("tiny")


def exact(policy, prompt):
    pairs = [TokenizedRow.pair("x", prompt, list(answer), [0], 1.0) for answer in ANSWERS]
    with torch.no_grad():
        return policy(collate_chosen(pairs, shared=True)).double().exp()


def test_frequencies_are_the_policy_s_probabilities(small):
    """Two prompts of different lengths beside each other, so that one is padded."""
    options = SamplingOptions(completions=DRAWS, max_new_tokens=LONGEST)
    with torch.no_grad():
        drawn = _draw(small, PROMPTS, ENDS, options, PROMPTS, [(0, 0), (0, 1)])
    for prompt, rows in zip(PROMPTS, (drawn[:DRAWS], drawn[DRAWS:]), strict=True):
        expected = exact(small, prompt)
        assert expected.sum().item() == pytest.approx(1.0, abs=1e-5)
        counts = Counter(map(tuple, rows))
        assert set(counts) <= set(ANSWERS)
        found = torch.tensor([counts[answer] / DRAWS for answer in ANSWERS]).double()
        # Standardised squares of n free frequencies have mean n and deviation √(2n), where enough are expected of each.
        often = DRAWS * expected >= 5
        squares = (DRAWS * (found - expected).square() / expected)[often]
        assert len(squares) > 15
        assert squares.sum().item() < len(squares) + 5 * (2 * len(squares)) ** 0.5


def test_the_two_prompts_are_told_apart(small):
    first, second = (exact(small, prompt) for prompt in PROMPTS)
    assert (first - second).abs().sum().item() > 0.3


def test_a_low_temperature_draws_the_likeliest_token(small):
    options = SamplingOptions(completions=50, temperature=1e-4, max_new_tokens=1)
    with torch.no_grad():
        drawn = _draw(small, PROMPTS, ENDS, options, PROMPTS, [(0, 0), (0, 1)])
        for prompt, rows in zip(PROMPTS, (drawn[:50], drawn[50:]), strict=True):
            logits = small.peft(input_ids=torch.tensor([prompt])).logits[0, -1]
            assert rows == [[logits.argmax().item()]] * 50


def test_the_seed_decides_and_the_global_state_stays(assistant):
    options = SamplingOptions(completions=3, max_new_tokens=40)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, again, other = (sample_completions(*assistant, [CHAT, "Once"], options, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(found.texts) + found.unfinished for found in first] == [3, 3]


def test_what_is_beside_a_prompt_changes_nothing(assistant):
    prompts, options = ["a", CHAT, "b c d", CHAT, "Once upon"], SamplingOptions(completions=3, max_new_tokens=40)
    alone, some, all_at_once = (
        sample_completions(*assistant, prompts, options, seed=5, tokens_per_batch=tokens)
        for tokens in (1, 200, 100_000)
    )
    assert alone == some == all_at_once
    assert alone[1].texts != alone[3].texts  # the same prompt, drawn anew


def test_answers_come_without_end_mark_and_prompt(assistant):
    (found,) = sample_completions(*assistant, [CHAT], SamplingOptions(completions=6, max_new_tokens=60), seed=0)
    specials = set(assistant[1].all_special_tokens)
    assert found.texts
    assert not any(special in text or "boil an egg" in text for text in found.texts for special in specials)


def test_what_does_not_end_and_what_says_nothing_is_counted_and_left_out(assistant):
    (found,) = sample_completions(*assistant, [CHAT], SamplingOptions(completions=5, max_new_tokens=2), seed=0)
    assert found == Samples((), 5)
    tokenizer = assistant[1]
    word, end = tokenizer("hello", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
    ends, answers = _Ends(tokenizer, frozenset({end}), TurnEnd()), [[*word, end, end], [end, *word], [*word, *word]]
    assert _samples(ends, "x", [5], answers) == Samples(("hello",), 2)


def test_progress_counts_prompts_and_small_batches_answer_all(assistant):
    done = []
    options = SamplingOptions(completions=2, max_new_tokens=8)
    found = sample_completions(
        *assistant, ["a", CHAT, "b c d"], options, seed=0, tokens_per_batch=1, progress=done.append
    )
    assert (len(found), done) == (3, [1, 1, 1])


def test_a_prompt_that_is_too_long_is_named(assistant):
    options = SamplingOptions(max_prompt_tokens=5)
    with pytest.raises(InputError, match=r"prompt 2 has \d+ tokens, and max_prompt_tokens allows 5: raise it"):
        sample_completions(*assistant, ["a", "many words " * 5], options, seed=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("completions", 0), ("completions", 1.5), ("max_new_tokens", 0), ("temperature", 0), ("temperature", "1")],
)
def test_bad_options_are_refused_by_name(name, value):
    with pytest.raises(InputError, match=f"^{name} must be a"):
        SamplingOptions(**{name: value})
