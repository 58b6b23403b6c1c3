"""Answers under templates that rewrite, refuse or open them; and what is said of what a template does not render."""

import pytest

from everalign.data.chat_template import template_notes
from everalign.data.chat_tokens import ChatFormat, encode_prompt
from everalign.data.messages import ChatPrompt
from everalign.data.records import Preference, Scored
from everalign.data.tokenization import tokenize_preferences
from everalign.errors import InputError
from tokenizers_for_tests import CHATML, NO_END, SHOUTING, THINKING, byte_tokenizer

USER = {"role": "user", "content": "Hi"}
CHAT = (USER,)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}
RESULT = {"role": "tool", "name": "add", "content": "2"}

_TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
_ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
# Cuts the reasoning off every answer, and opens it for the next one, as R1's distilled models do.
CUTS_REASONING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<A>' + m['content'].split('</think>')[-1] + '</s>' }}"
    "{% else %}{{ '<U>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<A><think>\n' }}{% endif %}"
)
# And puts an empty thought before every answer, as Nemotron's do.
CLOSES_THOUGHTS = CUTS_REASONING.replace("'<A>' + m", "'<A><think></think>' + m")
# Puts an empty thought before an answer without reasoning, and its own line breaks about one with it, as Qwen3 does.
INSERTS_THOUGHTS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set said = m['content'].split('</think>') %}"
    "{% set thought = m['reasoning_content'] if m['reasoning_content'] is defined else said[0].split('<think>')[-1] "
    "if said | length > 1 else '' %}{{ '<|im_start|>assistant\n<think>\n' + thought | trim + '\n</think>\n\n' "
    "+ said[-1] | trim + '<|im_end|>\n' }}{% else %}"
    + _TURN
    + "{% endif %}{% endfor %}"
    + _ASKS
    + "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)
# Opens reasoning in the prompt, and closes it in the conversation: Qwen3.5, and Qwen3's thinking models.
OPENS_THOUGHTS = INSERTS_THOUGHTS.replace(_ASKS, _ASKS + "{{ '<think>\n' }}")
# Refuses answers with marks of its channels, and writes its own about a plain one, as gpt-oss's does.
REFUSES_CHANNELS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% if '<|channel|>' in m['content'] %}"
    "{{ raise_exception('give the analysis as thinking') }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] + '<|im_end|>' }}"
    "{% else %}{{ '<|start|>user<|message|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# Prints words that its row asks for in front of an answer, and leaves them out of the conversation.
PREFACES = (
    "{% for m in messages %}" + _TURN + "{% endfor %}" + _ASKS + "{% if short %}{{ 'short: ' }}{% endif %}{% endif %}"
)
REFUSES_TEXT = (
    "{% for m in messages %}{% if m['content'] is string %}{{ raise_exception('parts only') }}{% endif %}{% endfor %}"
)
CALLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ('=' + m['name'] if m['name'] is defined else '') + '\n' }}"
    "{{ m['content'] if m['content'] is defined else '' }}"
    "{% for call in m['tool_calls'] or [] %}{{ '<call>' + call['function'] | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + _ASKS + "{% endif %}"
)
PARTS_ONLY = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    + _ASKS
    + "{% endif %}"
)


def said(template, answer, prompt=CHAT):
    """What the tokens of a prompt and of one of its answers say."""
    tokenizer = byte_tokenizer(template, bos="<s>")
    asked, (learned,) = ChatFormat(tokenizer).encode([prompt], [[answer]])[0]
    return tokenizer.decode(asked), tokenizer.decode(learned)


def rendered(template, messages, **variables):
    return byte_tokenizer(template, bos="<s>").apply_chat_template(list(messages), tokenize=False, **variables)


@pytest.mark.parametrize(
    ("template", "answer", "expected"),
    [
        (CUTS_REASONING, "r\n</think>\n\nYes", ("<U>Hi<A><think>\n", "r\n</think>\n\nYes</s>")),
        (CUTS_REASONING, "<think>\nr\n</think>\n\nYes", ("<U>Hi<A><think>\n", "r\n</think>\n\nYes</s>")),
        (CUTS_REASONING, "<think>r</think>Yes", ("<U>Hi<A><think>", "r</think>Yes</s>")),
        (CUTS_REASONING, "Yes", ("<U>Hi<A>", "Yes</s>")),
        (THINKING, "Yes", ("user: Hi</s>assistant: ", "Yes</s>")),
        (THINKING, "<b>Yes", ("user: Hi</s>assistant: ", "<b>Yes</s>")),
        (CLOSES_THOUGHTS, "Yes", ("<U>Hi<A><think>", "</think>Yes</s>")),
        (CLOSES_THOUGHTS, "<think>\nr\n</think>Yes", ("<U>Hi<A><think>\n", "r\n</think>Yes</s>")),
        (
            REFUSES_CHANNELS,
            "<|channel|>analysis<|message|>r<|end|><|start|>assistant<|channel|>final<|message|>Yes",
            (
                "<|start|>user<|message|>Hi<|end|><|start|>assistant",
                "<|channel|>analysis<|message|>r<|end|><|start|>assistant<|channel|>final<|message|>Yes<|im_end|>",
            ),
        ),
        (
            PREFACES,
            "Yes",
            ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nshort: ", "Yes<|im_end|>"),
        ),
    ],
)
def test_an_answer_that_is_not_rendered_is_what_a_model_writes(template, answer, expected):
    prompt = ChatPrompt(CHAT, (), {"short": True}) if template == PREFACES else CHAT
    assert said(template, answer, prompt) == expected


@pytest.mark.parametrize("template", [INSERTS_THOUGHTS, OPENS_THOUGHTS])
@pytest.mark.parametrize(
    "reply",
    [
        {"content": "Yes"},
        {"content": "<think>r</think>Yes"},
        {"content": "r\n</think>\n\nYes"},
        {"content": "Yes", "reasoning_content": "because"},
    ],
)
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_what_a_template_renders_in_its_own_way_is_learned_in_that_way(template, reply, variables):
    prompt = ChatPrompt(CHAT, (), variables) if variables else CHAT
    message = {"role": "assistant", **reply}
    whole = rendered(template, [*CHAT, message], **variables)
    answer = reply["content"] if len(reply) == 1 else (message,)
    assert "".join(said(template, answer, prompt)) == whole.removesuffix("\n")


def test_without_thoughts_the_prompt_closes_them():
    asked, learned = said(INSERTS_THOUGHTS, "Yes", ChatPrompt(CHAT, (), {"enable_thinking": False}))
    assert asked.endswith("<think>\n\n</think>\n\n")
    assert learned == "Yes<|im_end|>"
    assert (
        encode_prompt(byte_tokenizer(INSERTS_THOUGHTS), CHAT)[-10:] == encode_prompt(byte_tokenizer(CHATML), CHAT)[-10:]
    )


@pytest.mark.parametrize(
    ("template", "answer", "message"),
    [
        (SHOUTING, "good", "the chat template rewrites the answer 'good'"),
        (CHATML, ({"role": "assistant", "content": "a", "thinking": "t"},), "does not render 'thinking' of the answer"),
        (CUTS_REASONING, ({"role": "assistant", "content": "a", "reasoning_content": "b"},), "'reasoning_content'"),
        (
            CHATML.replace("message['content']", "(message['content'] or '')"),
            (CALL,),
            "does not render every call of 'add' in 'tool_calls' of the answer",
        ),
        (NO_END, (CALL,), "the chat template refuses a conversation of user, assistant"),
    ],
)
def test_what_no_rendering_says_is_refused_with_the_rule(template, answer, message):
    with pytest.raises(InputError, match=message):
        said(template, answer)


def test_tools_calls_and_names_are_rendered_as_the_template_renders_them():
    prompt = ChatPrompt(({**USER, "name": "ann"}, CALL, RESULT, USER), tuple(TOOLS))
    whole = rendered(CALLS, [*prompt, {"role": "assistant", "content": "Yes"}], tools=TOOLS)
    assert "".join(said(CALLS, "Yes", prompt)) == whole.removesuffix("\n")
    assert all(part in whole for part in ('"name": "add"', "user=ann", "tool=add", "<call>"))
    answer = (CALL, RESULT, {"role": "assistant", "content": "It is 2."})
    asked, learned = said(CALLS, answer, ChatPrompt(CHAT, tuple(TOOLS)))
    assert asked + learned == rendered(CALLS, [*CHAT, *answer], tools=TOOLS).removesuffix("\n")
    assert learned.startswith("<call>")
    assert said(CALLS, (CALL,))[1] == '<call>{"name": "add", "arguments": {"a": 1}}</call><|im_end|>'


def test_every_call_of_an_answer_is_rendered_or_it_is_refused():
    twice = ({**CALL, "tool_calls": CALL["tool_calls"] * 2},)
    assert said(CALLS, twice)[1].count("<call>") == 2
    first_only = CALLS.replace("m['tool_calls'] or []", "(m['tool_calls'] or [])[:1]")
    assert said(first_only, (CALL,))[1].count("<call>") == 1
    with pytest.raises(InputError, match="does not render every call of 'add'"):
        said(first_only, twice)


def test_arguments_that_a_template_quotes_once_more_are_told():
    function = {"name": "add", "arguments": '{"a": 1}'}
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
    raw = CALLS.replace("call['function'] | tojson", "call['function']['name'] + call['function']['arguments']")
    in_prompt, in_answer = Scored((USER, call, RESULT)), Preference(CHAT, (call,), "No")
    for row in (in_prompt, in_answer):
        (line,) = template_notes(byte_tokenizer(CALLS), [row])
        assert "'arguments' of tool calls are text" in line
        assert template_notes(byte_tokenizer(raw), [row]) == ()
    assert template_notes(byte_tokenizer(CALLS), [Preference(CHAT, (CALL,), "No")]) == ()


def test_tools_have_a_template_of_their_own_where_the_tokenizer_has_one():
    tokenizer = byte_tokenizer(bos="<s>")
    tokenizer.chat_template = {"default": CHATML, "tool_use": CALLS, "other": CUTS_REASONING}
    with_tools = ChatPrompt(CHAT, tuple(TOOLS))
    texts = [tokenizer.decode(encode_prompt(tokenizer, prompt)) for prompt in (CHAT, with_tools)]
    assert [("parameters" in text) for text in texts] == [False, True]
    named = ChatPrompt(CHAT, (), {"chat_template": "other"})
    assert tokenizer.decode(encode_prompt(tokenizer, named)) == "<U>Hi<A><think>\n"


@pytest.mark.parametrize("template", [CHATML, PARTS_ONLY, REFUSES_TEXT + PARTS_ONLY, CALLS])
def test_content_in_parts_is_read_by_every_template_and_text_by_those_that_want_parts(template):
    parts = {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}
    assert said(template, "Yes", (parts,)) == said(template, "Yes", (USER,))
    assert "user\nHi<|im_end|>" in said(template, "Yes", (parts,))[0]


def test_pairs_of_both_kinds_follow_one_prompt():
    tokenizer = byte_tokenizer(CUTS_REASONING, bos="<s>")
    row = Preference(CHAT, "r</think>Yes", "No")
    pair = tokenize_preferences([row], tokenizer, 1000)[0]
    assert tokenizer.decode(pair.prompt) == "<U>Hi<A>"
    assert tokenizer.decode(pair.chosen) == "<think>\nr</think>Yes</s>"
    assert tokenizer.decode(pair.rejected) == "No</s>"


def test_what_is_not_rendered_as_one_may_think_is_told():
    system, developer = {"role": "system", "content": "S"}, {"role": "developer", "content": "D"}
    only_users = (
        "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}"
        + _TURN
        + "{% endif %}{% endfor %}"
        + _ASKS
        + "{% endif %}"
    )
    rows = [
        Scored((system, developer, {**USER, "name": "ann"})),
        Scored(ChatPrompt(CHAT, tuple(TOOLS), {"short": True})),
        Scored(CHAT),
    ]
    lines = "\n".join(template_notes(byte_tokenizer(only_users), rows))
    for name in ("name", "tools", "short"):
        assert f"does not read {name!r}, which 1 rows have" in lines
    for role in ("system", "developer"):
        assert f"leaves out or rewrites messages of the role {role!r}" in lines
    assert template_notes(byte_tokenizer(CHATML), [Scored(CHAT), Scored((system, USER)), Scored("text")]) == ()
    assert template_notes(byte_tokenizer(), [Scored("text")]) == ()
    assert "no chat template" in template_notes(byte_tokenizer(), rows[2:])[0]
    assert "begins an answer with '<think>\\n'" in template_notes(byte_tokenizer(CUTS_REASONING), rows[2:])[0]
