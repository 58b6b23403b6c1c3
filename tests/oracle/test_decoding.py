"""Decoding row by row: what is chosen is what the whole sequence would choose, whatever ends beside it."""

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from everalign.errors import InputError
from everalign.modeling import logprobs as token_log_probs
from everalign.modeling.decoding import Decoder, KeyValueCache, continue_rows, draw, pad_left
from everalign.modeling.policy import Policy
from memory_for_tests import LiveTensors
from models_for_tests import FAMILIES, SCALED, perturb, random_model, scaled_by_itself

LIMIT = 24
PROMPTS = [[1, 5, 9], [7], [3, 3, 8, 2, 11, 6], [4, 2]]


def greedy(logits):
    return logits.argmax(-1)


def exclusive(model, prompt, ends, limit=LIMIT):
    """Greedy continuation of one prompt, computed anew from the start for every token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + limit and (len(tokens) == len(prompt) or tokens[-1] not in ends):
        with torch.no_grad():
            tokens.append(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax().item())
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", [*FAMILIES, *SCALED])
def test_rows_of_a_batch_are_continued_as_if_alone(family):
    """Past a sliding window too, and with ends that come at different times."""
    model = random_model(family, vocabulary=40).eval()
    whole = [exclusive(model, prompt, ()) for prompt in PROMPTS]
    ends = [whole[0][2], whole[2][9]]
    found = continue_rows(Decoder(model, pad_left(PROMPTS, 0)), greedy, ends, LIMIT)
    expected = [exclusive(model, prompt, ends) for prompt in PROMPTS]
    assert len({len(tokens) for tokens in expected}) > 1
    assert found == expected


def test_adapters_take_part_and_folding_them_is_undone():
    policy = perturb(Policy(random_model(vocabulary=40), 4, 8.0), size=0.3)
    expected = [exclusive(policy.peft, prompt, ()) for prompt in PROMPTS]
    with policy.decoding(pad_left(PROMPTS, 0)) as decoder:
        found = continue_rows(decoder, greedy, [], LIMIT)
    assert found == expected
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()  # unseen by version counters
    with policy.decoding(pad_left(PROMPTS, 0)) as decoder:
        found = continue_rows(decoder, greedy, [], LIMIT)
    with policy.as_base():
        assert found == [exclusive(policy.peft, prompt, ()) for prompt in PROMPTS] != expected


def test_rows_taken_twice_go_on_apart():
    model = random_model(vocabulary=40).eval()
    decoder = Decoder(model, pad_left(PROMPTS, 0))
    decoder.select(torch.tensor([2, 0, 2]))
    decoder.append(torch.tensor([1, 2, 3]))
    expected = [exclusive(model, [*PROMPTS[row], token], (), 5) for row, token in ((2, 1), (0, 2), (2, 3))]
    assert continue_rows(decoder, greedy, [], 5) == expected


def cached(cache, theirs, counts, generator, rows=4):
    """Write tokens into our cache and into the library's layer, which must hold the same."""
    for count in counts:
        new = [torch.randn(rows, 2, count, 8, generator=generator) for _ in range(2)]
        cache.place([cache.end] * rows, count, torch.device("cpu"))
        assert cache.get_seq_length() == theirs.get_seq_length()
        for found, expected in zip(cache.update(*new, 0), theirs.update(*new), strict=True):
            assert torch.equal(found, expected)


def test_the_cache_holds_what_the_library_s_holds():
    """Across several growths of the buffers, and a selection of rows."""
    cache, theirs, generator = KeyValueCache(1), DynamicLayer(), torch.Generator().manual_seed(0)
    cached(cache, theirs, (3, 1, 70, 1, 1, 200, 1), generator)
    rows = torch.tensor([3, 1, 1])
    cache.select(rows, cache.end)
    theirs.batch_select_indices(rows)
    cached(cache, theirs, (2, 1), generator, rows=3)


def test_keys_of_the_first_tokens_are_copied_and_never_written_to():
    first, cache = torch.zeros(1, 2, 300, 8), KeyValueCache(1)
    given = first[:, :, :3]
    cache.place([0], 3, torch.device("cpu"))
    cache.update(given, given, 0)
    cache.place([3], 1, torch.device("cpu"))
    cache.update(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8), 0)
    assert not first.any()


@pytest.mark.parametrize("whole", [False, True])
def test_many_rows_hold_few_logits_and_are_drawn_as_all_at_once(whole, monkeypatch):
    vocabulary, limit = 500, 40_000
    model = scaled_by_itself(random_model(vocabulary=vocabulary)) if whole else random_model(vocabulary=vocabulary)

    def drawn():
        decoder = Decoder(model, pad_left(PROMPTS, 0))
        decoder.select(torch.arange(4).repeat_interleave(30))
        chances = torch.rand(120, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        return continue_rows(decoder, lambda logits, chances: draw(logits / 0.9, chances), [], 6, chances=chances)

    expected = drawn()
    monkeypatch.setattr(token_log_probs, "_LIVE_LOGITS", limit)
    with LiveTensors(lambda tensor: tensor.shape[-1:] == (vocabulary,) and tensor.is_contiguous()) as live:
        assert drawn() == expected
    assert 0 < live.most <= limit < 120 * vocabulary


def test_no_token_is_drawn_that_has_no_probability():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 1.0, float("-inf")]]).repeat(4000, 1)
    chances = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chances[0], chances[1] = 0.0, 1 - 2**-53
    drawn = draw(logits, chances)
    assert set(drawn.tolist()) == {1, 3}
    assert drawn[:2].tolist() == [1, 3]
    assert (drawn == 3).float().mean().item() == pytest.approx(torch.tensor(1.0).sigmoid().item(), abs=0.03)


def test_models_that_keep_something_else_are_refused():
    with pytest.raises(InputError, match="cannot be sampled from a mamba model"):
        Decoder(random_model("mamba"), pad_left(PROMPTS, 0))
