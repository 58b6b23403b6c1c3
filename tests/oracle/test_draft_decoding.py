"""Decoding with drafts: whatever is guessed, the tokens are those of plain greedy decoding."""

import random

import pytest
import torch

from everalign.errors import EveralignError, InputError
from everalign.modeling import decoding as ragged_decoding
from everalign.modeling import speculative
from everalign.modeling.attention import CPU_ATTENTION, cpu_attention
from everalign.modeling.decoding import RaggedModel, RaggedRows
from everalign.modeling.speculative import DraftDecoder, PromptLookup, best_width
from models_for_tests import FAMILIES, SCALED, random_model
from tiers_for_tests import slow_but

END, LIMIT, VOCABULARY = 2, 24, 40
PROMPTS = [[1, 5, 9], [7], [3, 3, 8, 2, 11, 6, 9, 9, 30, 12, 4, 17], [4, 2]]


def exclusive(model, prompt, limit=LIMIT, ends=(END,)):
    """Greedy continuation, computed anew from the start for every token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + limit and (len(tokens) == len(prompt) or tokens[-1] not in ends):
        with torch.no_grad():
            tokens.append(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax().item())
    return tokens[len(prompt) :]


def drafts_of(output, ends=(END,)):
    """Equal, substituted, inserted, deleted, cut, garbage, empty, and longer than the limit."""
    middle, rng = len(output) // 2, random.Random(len(output))
    before, after = output[:middle], output[middle:]
    other = 3 + (after[0] - 2) % (VOCABULARY - 3)
    garbage = [rng.randrange(3, VOCABULARY) for _ in range(20)]
    return [
        output,
        [*before, other, *after[1:]],
        [*before, other, *after],
        [*before, *after[1:]],
        before,
        garbage,
        [],
        [*[token for token in output if token not in ends], *garbage, *garbage],
    ]


def decoded(model, prompts, drafts, limit=LIMIT, ends=(END,), **options):
    decoder = DraftDecoder(model, prompts, drafts, ends, [limit] * len(prompts), **options)
    return decoder, decoder.run()


@pytest.mark.parametrize("family", slow_but(["llama", "gemma3", "gpt2"], [*FAMILIES, *SCALED]))
def test_every_draft_gives_the_tokens_of_greedy_decoding(family):
    """In batches of 1, 4 and 16 rows, past a sliding window, and with inputs that take several passes."""
    plain = random_model(family, vocabulary=VOCABULARY)
    rows, ends = [], [exclusive(plain, PROMPTS[0], ends=())[2], exclusive(plain, PROMPTS[2], ends=())[9]]
    for prompt in PROMPTS:
        output = exclusive(plain, prompt, ends=ends)
        rows += [(prompt, draft, output) for draft in drafts_of(output, ends)]
    random.Random(0).shuffle(rows)
    assert len({len(output) for _, _, output in rows}) > 1
    for tokens_per_pass, sizes in ((4096, (1, 4, 16)), (24, (4,))):
        model = RaggedModel(plain, tokens_per_pass)
        for size in sizes:
            for start in range(0, len(rows), size):
                prompts, drafts, outputs = zip(*rows[start : start + size], strict=True)
                _, found = decoded(model, prompts, drafts, ends=ends)
                assert [row.tokens for row in found] == list(outputs)
                assert [row.ended for row in found] == [output[-1] in ends for output in outputs]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_drafts_verified_in_slices_give_the_same_tokens(family, monkeypatch):
    """Of drafts a slice at first, and of a pass's head a few positions at a time; long drafts do so by themselves."""
    monkeypatch.setattr(speculative, "_FIRST_SLICE", 3)
    monkeypatch.setattr(speculative, "_SECOND_PASS_SHARE", 100.0)
    monkeypatch.setattr(ragged_decoding, "_FIRST_SLICE", 2)
    plain = random_model(family, vocabulary=VOCABULARY)
    for tokens_per_pass in (4096, 24):
        model = RaggedModel(plain, tokens_per_pass)
        for prompt in PROMPTS:
            output = exclusive(plain, prompt)
            drafts = drafts_of(output)
            decoder, rows = decoded(model, [prompt] * len(drafts), drafts)
            assert [row.tokens for row in rows] == [output] * len(drafts)
    decoder, (row,) = decoded(RaggedModel(plain), PROMPTS[:1], [exclusive(plain, PROMPTS[0])])
    assert decoder.passes > 1
    assert row.accepted >= len(row.tokens) - decoder.passes


def test_guesses_that_come_to_nothing_cost_little():
    """A draft of noise: what is guessed is bounded by what guesses saved and a small share of the passes."""
    plain = random_model(vocabulary=VOCABULARY)
    rng = random.Random(1)
    draft = [rng.randrange(3, VOCABULARY) for _ in range(200)]
    _, (row,) = decoded(RaggedModel(plain), PROMPTS[:1], [draft], limit=200, ends=())
    right = row.accepted
    price = speculative._COSTS["cpu"][1] / (1 + speculative._COSTS["cpu"][0])
    checked = row.accepted + row.rejected - len(draft)
    assert checked * price <= 1 + 0.02 * row.passes + right


def test_shared_keys_are_not_copied_and_give_the_same_numbers():
    plain = random_model("qwen2", vocabulary=VOCABULARY)
    config = plain.config
    assert config.num_key_value_heads < config.num_attention_heads
    ids, mask = torch.tensor([[5, 6, 7, 8]] * 2), torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 1, 4, 4)
    with torch.no_grad():
        own = plain(input_ids=ids, attention_mask=mask, use_cache=False).logits
        with cpu_attention(plain):
            assert config._attn_implementation == CPU_ATTENTION
            ours = plain(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert config._attn_implementation == "sdpa"
    assert torch.allclose(own, ours, atol=1e-6)


def test_an_unchanged_draft_takes_one_pass_and_one_that_differs_only_as_many_as_it_needs():
    plain = random_model(vocabulary=VOCABULARY)
    model = RaggedModel(plain)
    outputs = [exclusive(plain, prompt) for prompt in PROMPTS]
    decoder, rows = decoded(model, PROMPTS, outputs)
    assert decoder.passes == 1
    assert {(row.passes, row.rejected) for row in rows} == {(1, 0)}
    assert [row.accepted for row in rows] == [len(output) for output in outputs]
    long = outputs[0]
    assert len(long) == LIMIT
    changed = [*long[:3], (long[3] + 1) % VOCABULARY, *long[4:]]
    decoder, rows = decoded(model, PROMPTS[:2], [changed, outputs[1]])
    assert 1 < rows[0].passes == decoder.passes < 12
    assert rows[1].passes == 1


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_rows_stop_at_their_limit(limit):
    plain = random_model(vocabulary=VOCABULARY)
    model = RaggedModel(plain)
    output = exclusive(plain, PROMPTS[0])
    for draft in drafts_of(output):
        _, (row,) = decoded(model, PROMPTS[:1], [draft], limit)
        assert row.tokens == output[:limit]
        assert not row.ended


def test_a_model_s_last_position_can_be_used():
    """Padding beside a full row stands nowhere beyond it."""
    plain = random_model("gpt2", vocabulary=VOCABULARY)
    model, prompt = RaggedModel(plain), [5] * 250
    expected, other = exclusive(plain, prompt, 6, ()), exclusive(plain, [7], LIMIT, ())
    # The row beside it goes on with long guesses while this one is at its end.
    draft = [*other[:12], 1 + other[12], *other[13:]]
    rows = DraftDecoder(model, [prompt, [7]], [[3] * 6, draft], [], [6, LIMIT]).run()
    assert [row.tokens for row in rows] == [expected, other]


def test_tokens_taken_back_leave_no_trace():
    plain = random_model("gemma2", vocabulary=VOCABULARY)
    model, rng = RaggedModel(plain), random.Random(3)
    rows, texts = RaggedRows(model, 3), [[], [], []]
    for _ in range(40):
        added = [[rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 9))] for _ in texts]
        found, _ = rows.append(added, [1, 1, 1])
        for text, more, predicted in zip(texts, added, found, strict=True):
            text += more
            with torch.no_grad():
                expected = plain(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax().item()
            assert predicted.tokens == [expected]
            del text[rng.randint(max(0, len(text) - 7), len(text)) :]
        rows.lengths = [len(text) for text in texts]


def test_a_gate_sees_what_the_first_pass_found():
    plain = random_model(vocabulary=VOCABULARY)
    model, prompt, draft = RaggedModel(plain), PROMPTS[2], [9, 8, 7, END]
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([[*prompt, *draft]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    log_probs = logits.log_softmax(-1)
    seen = []
    _, rows = decoded(model, [prompt, PROMPTS[0]], [draft, []], gate=lambda verified: seen.append(verified) or True)
    (verified,) = seen
    assert (verified.row, verified.length) == (0, 4)
    expected = log_probs.gather(1, torch.tensor(draft)[:, None]).mean().item()
    assert verified.log_likelihood == pytest.approx(expected, abs=1e-5)
    others = log_probs[0].clone()
    others[9] = float("-inf")
    assert verified.margin == pytest.approx((log_probs[0, 9] - others.max()).item(), abs=1e-5)
    assert verified.gap == pytest.approx((log_probs.max(-1).values - log_probs[range(4), draft]).max().item(), abs=1e-5)
    assert [row.accepted_by_gate for row in rows] == [True, False]
    assert rows[0].tokens == []
    assert rows[1].tokens == exclusive(plain, PROMPTS[0])


def test_little_is_checked_after_many_wrong_guesses():
    rng = random.Random(0)
    draft = [rng.randrange(5, 9) for _ in range(60)]
    lookup, written, checked = PromptLookup(draft, []), [draft[0]], 0
    lookup.update(written)
    for _ in range(100):
        guess = lookup.propose(written)
        width = best_width([(lookup.first, lookup.rate, len(guess))], 0.15, 0.05)
        checked += width
        # Never what was guessed, and always something that occurs in the draft.
        written.append(5 + (guess[0] - 4) % 4 if guess else rng.randrange(5, 9))
        lookup.update(written[-1:])
    assert 0 < checked < 20


def test_a_substitution_an_insertion_and_a_deletion_are_followed():
    draft = list(range(10, 30))
    for written, expected in (([10, 11, 99], 13), ([10, 11, 99, 12], 13), ([10, 11, 13], 14)):
        lookup = PromptLookup(draft, [])
        lookup.update(written[:3])
        for token in written[3:]:
            lookup.propose(written[:3])
            lookup.update([token])
        assert lookup.propose(written)[0] == expected


def test_more_is_guessed_where_it_pays():
    costs = (0.15, 0.05)
    assert best_width([(0.03, 0.99, 2)], *costs) == 0
    assert best_width([(0.9, 0.9, 0)], *costs) == 0
    assert best_width([(0.99, 0.99, 200)], *costs) > best_width([(0.7, 0.7, 200)], *costs) > 0
    assert best_width([(0.99, 0.99, 200)], *costs) > best_width([(0.2, 0.99, 200)], *costs)
    assert best_width([(0.99, 0.99, 200)] * 16, *costs) < best_width([(0.99, 0.99, 200)], *costs)
    assert best_width([(1.0, 1.0, 7)], 0.001, 0.001) == 7


@pytest.mark.parametrize("family", ["bloom", "gpt_neo", "mamba"])
def test_models_that_cannot_are_refused(family):
    with pytest.raises(InputError, match="drafts cannot be verified by a "):
        RaggedModel(random_model(family))


def test_bad_input_is_refused():
    plain = random_model()
    with pytest.raises(InputError, match="tokens per pass: must be at least 1"):
        RaggedModel(plain, 0)
    model = RaggedModel(plain)
    with pytest.raises(InputError, match="prompt 2 has no tokens"):
        DraftDecoder(model, [[1], []], [[], []], [END], [3, 3])
    with pytest.raises(InputError, match="limit 1 must be at least 1, found 0"):
        DraftDecoder(model, [[1]], [[]], [END], [0])
    plain.get_output_embeddings().weight.data[5] = float("nan")
    with pytest.raises(EveralignError, match="logits are NaN"):
        decoded(model, [[1]], [[4]])
