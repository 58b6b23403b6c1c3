"""An answer ends where the model's configuration, its tokenizer or its chat template says so, and nowhere else."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from corrections_for_tests import corrections
from everalign.correction.local_engine import LocalEngine
from everalign.correction.templates import get_template
from everalign.correction.tokenization import CorrectionEncoder
from everalign.data.chat_template import DEFAULT_CHAT_TEMPLATE
from everalign.data.chat_tokens import encode_prompt, encode_response
from everalign.modeling.policy import Policy
from everalign.modeling.positions import Lengths
from everalign.modeling.sampling import TurnEnd, sample_completions, special_stop_ids, stop_token_ids, turn_end
from everalign.options import SamplingOptions
from models_for_tests import random_model
from tokenizers_for_tests import CHATML, NO_END, NO_SYSTEM, byte_tokenizer, piece_tokenizer

IM_END, GEMMA_END, EOS = 259, 260, 257
CHAT = [{"role": "user", "content": "How are you?"}]


def turns(behind: str, last: str = "") -> str:
    """A template that puts `behind` after every message, and `last` at the end."""
    return (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '" + behind + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% else %}{{ '" + last + "' }}{% endif %}"
    )


LLAMA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = turns("</s>")
# Of models that read images: content is a list of parts, and a text is none.
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ':' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)
NO_TEXT = PARTS.replace("{{ '<", "{% if m['content'] is string %}{{ raise_exception('no') }}{% endif %}{{ '<", 1)
NEEDS_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no') }}{% endif %}"
REFUSING = "{{ raise_exception('no') }}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, TurnEnd(IM_END)),
        (NO_SYSTEM, TurnEnd(GEMMA_END)),
        (NO_END, TurnEnd(text="\n\nuser:")),
        (None, TurnEnd(EOS)),
        (DEFAULT_CHAT_TEMPLATE, TurnEnd(EOS)),
        (LLAMA, TurnEnd(EOS, lead=" ", opening=" ")),
        (turns(r"<|im_end|>\n", "</s>"), TurnEnd(IM_END)),
        (turns(r"\n### End\n"), TurnEnd(text="\n### End")),
        (turns(r"\n### End\n", "</s>"), TurnEnd(EOS, "\n### End")),
        (turns(r"\n<|im_end|>\n"), TurnEnd(IM_END, lead="\n")),
        (turns(r"\n"), TurnEnd(text="\n<user>")),
        (PARTS, TurnEnd(IM_END)),
        (NO_TEXT, TurnEnd(IM_END)),
        (NEEDS_SYSTEM + CHATML, TurnEnd(IM_END)),
        (NEEDS_SYSTEM + NO_TEXT, TurnEnd(IM_END)),
        (REFUSING, TurnEnd()),
        ("{{ messages[0]['content'] | upper }}", TurnEnd()),
    ],
)
def test_the_end_of_a_turn_is_read_from_the_template(template, expected):
    assert turn_end(byte_tokenizer(template, bos="<s>")) == expected


def test_white_space_that_is_a_token_ends_nothing():
    tokenizer = byte_tokenizer(turns(r"\n\n<|im_end|>"))
    tokenizer.add_tokens(["\n\n"])
    assert turn_end(tokenizer) == TurnEnd(IM_END, lead="\n\n")


def stopping(generation=None, config=None, template=None):
    model, tokenizer = random_model(vocabulary=262), byte_tokenizer(template)
    model.generation_config = GenerationConfig(eos_token_id=generation)
    model.config.eos_token_id = config
    return stop_token_ids(model, tokenizer)


@pytest.mark.parametrize(
    ("generation", "config", "template", "expected"),
    [
        (None, None, None, {EOS}),
        (7, None, None, {EOS, 7}),
        ([7, IM_END], None, None, {EOS, 7, IM_END}),
        (None, IM_END, None, {EOS, IM_END}),
        (None, [GEMMA_END, EOS], None, {EOS, GEMMA_END}),
        ([EOS], None, CHATML, {EOS, IM_END}),
        # The default of a family, which is the letter "#" here.
        (None, 2, CHATML, {EOS, IM_END}),
    ],
)
def test_all_that_names_an_end_counts(generation, config, template, expected):
    assert stopping(generation, config, template) == expected


def sampled(model, tokenizer, prompt, limit=24):
    """The likeliest answer, by a temperature that leaves no other one."""
    options = SamplingOptions(completions=1, temperature=1e-5, max_new_tokens=limit)
    return sample_completions(Policy(model, 2, 2.0), tokenizer, [prompt], options, seed=0)[0]


@pytest.mark.parametrize("prompt", ["Once", "b", CHAT, [{"role": "user", "content": "?"}]])
def test_sampling_stops_where_transformers_generate_stops(prompt):
    """The tokenizer's own EOS and the template's end are ends to both; a random model meets those of the list first."""
    model, tokenizer = random_model(vocabulary=262, seed=3), byte_tokenizer(CHATML)
    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    model.generation_config = GenerationConfig(pad_token_id=0)
    free = model.generate(input_ids=ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :].tolist()
    ends = [EOS, IM_END, *free[9:11]]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
    ended = model.generate(input_ids=ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :].tolist()
    assert 1 < len(ended) < 24
    assert ended[-1] in ends
    found = sampled(model, tokenizer, prompt)
    expected = tokenizer.decode(ended[:-1], skip_special_tokens=True)
    assert found.texts == ((expected,) if expected.strip() else ())


class Scripted:
    """A policy and decoder that write given tokens, whatever they read."""

    def __init__(self, tokens, generation=None):
        self.peft, self.tokens, self.training = random_model(vocabulary=len(tokens) + 400), tokens, False
        self.peft.generation_config = GenerationConfig(eos_token_id=generation)
        self.head, self.prefix_length = SimpleNamespace(lengths=Lengths()), 0
        self.peft.config.eos_token_id, self.place = None, 0

    def eval(self):
        return self

    def train(self, mode):
        return self

    def on_device(self, batch):
        return batch

    @contextmanager
    def decoding(self, batch):
        self.rows = len(batch["input_ids"])
        yield self

    def __len__(self):
        return self.rows

    def choose(self, choose, *beside):
        return torch.full((self.rows,), self.tokens[min(self.place, len(self.tokens) - 1)])

    def select(self, rows):
        self.rows = len(rows)

    def append(self, tokens):
        self.place += 1


def written(tokenizer, prompt, tokens, generation=None):
    options = SamplingOptions(completions=1, max_new_tokens=len(tokens))
    policy = Scripted(tokens, generation)
    (found,) = sample_completions(policy, tokenizer, [prompt], options, seed=0)
    return found.texts, policy.place + 1


def test_an_answer_ends_at_the_text_that_its_template_ends_a_turn_with():
    tokenizer = byte_tokenizer(turns(r"\n### End\n"))
    tokens = tokenizer("Fine.\n### End\n<user>More?", add_special_tokens=False)["input_ids"]
    texts, count = written(tokenizer, CHAT, tokens)
    assert (texts, count) == (("Fine.",), len("Fine.\n### End"))
    assert written(tokenizer, "### End", tokens) == ((), len(tokens)), "a plain text may go on behind such words"


def test_an_answer_ends_where_the_next_turn_begins():
    tokenizer = byte_tokenizer(NO_END)
    tokens = tokenizer("Fine, user: you?\n\nuser: More?", add_special_tokens=False)["input_ids"]
    assert written(tokenizer, CHAT, tokens)[0] == ("Fine, user: you?",)


def test_what_stands_between_answer_and_end_token_is_the_template_s():
    tokenizer = byte_tokenizer(turns(r"\n<|im_end|>\n"))
    tokens = [*tokenizer("Fine.\n\n", add_special_tokens=False)["input_ids"], IM_END, 65]
    assert written(tokenizer, CHAT, tokens)[0] == ("Fine.\n",)
    assert written(tokenizer, CHAT, [*tokens[:-2], GEMMA_END], GEMMA_END)[0] == ("Fine.\n\n",)


@pytest.mark.parametrize("prepend", ["always", "first", "never"])
def test_a_text_is_continued_with_its_space(prepend):
    """Decoded by itself, such an answer loses the space that begins it."""
    tokenizer = piece_tokenizer(prepend)
    whole = tokenizer("Once upon a time there was.")["input_ids"]
    prompt = encode_prompt(tokenizer, "Once upon a time")
    assert whole[: len(prompt)] == prompt
    tokens = [*whole[len(prompt) :], tokenizer.eos_token_id]
    assert written(tokenizer, "Once upon a time", tokens)[0] == (" there was.",)


@pytest.mark.parametrize(
    ("tokenizer", "template"),
    [
        *((byte_tokenizer(bos="<s>"), template) for template in (CHATML, NO_SYSTEM, None, LLAMA)),
        *((piece_tokenizer(prepend), template) for prepend in ("always", "first") for template in (None, LLAMA, PLAIN)),
    ],
)
def test_what_is_learned_of_a_sample_is_what_was_sampled(tokenizer, template):
    tokenizer.chat_template = template
    tokens = encode_response(tokenizer, CHAT, "Fine, thanks.")
    ((text,), count) = written(tokenizer, CHAT, tokens)
    assert encode_response(tokenizer, CHAT, text) == tokens
    assert count == len(tokens)
    assert text.strip() == "Fine, thanks."


def test_a_correction_ends_at_special_ends_of_the_model_and_at_no_text():
    model, tokenizer = random_model(vocabulary=262), byte_tokenizer()
    model.generation_config = GenerationConfig(eos_token_id=[IM_END, ord("a")])
    assert special_stop_ids(model, tokenizer) == {EOS, IM_END}
    with torch.no_grad():
        head = model.lm_head.weight
        states = model.model(torch.arange(40)[None]).last_hidden_state[0]
        head[IM_END] = 50 * torch.linalg.lstsq(states, torch.ones(len(states))).solution
    encoder = CorrectionEncoder(tokenizer, get_template("aligner-1"))
    row = next(iter(corrections(1, 0)))
    (found,) = LocalEngine(model, encoder).write([(row.question, row.answer)], None, 30)
    assert (found.finished, encoder.ends) == (True, {EOS, IM_END})
    assert found.output_tokens < 30
