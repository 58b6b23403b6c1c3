"""Tokenizers of the kinds that models come with, and chat templates of the shapes that they come with.

Those of Mistral are real ones, from the package mistral-common. The others are trained here on a few sentences, with
the normalizer, the pre-tokenizer and the decoder that the kind has.
"""

import importlib.util
import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

MARKS = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|assistant|>"]
SENTENCES = [
    "Paris is the capital of France. It is a city on the Seine, and it has been one for 2,000 years.",
    "USER: What is the answer to the question? ASSISTANT: The answer is that nobody knows it.",
    "def f(x):\n    return x + 1\n\n\nprint(f(12345))\n",
    "Human: Once upon a time there was a house.\n\nAssistant: No. It is not so, is it?  No!",
    "Été à Łódź, naïve ½ coffee; 日本語です。今日は🙂 fine",
    "1. first\n2. second\n\n- one\n- two\n\tIndented.",
] * 20
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _finished(core, adds="<s> $A"):
    core.add_special_tokens(
        [AddedToken(mark, normalized=False, special=True) for mark in ("<s>", "</s>", "<pad>", *MARKS)]
    )
    core.post_processor = processors.TemplateProcessing(
        single=adds, special_tokens=[(name, core.token_to_id(name)) for name in ("<s>", "</s>") if name in adds]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _byte_level(splits, *, prefix_space=False, normalizer=None, ignore_merges=False, trim=False, adds="$A"):
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=not splits)
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits]
    core.pre_tokenizer = pre_tokenizers.Sequence([*parts, level])
    if normalizer is not None:
        core.normalizer = normalizer
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = _finished(core, adds)
    if trim:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _pieces(normalizer, pre_tokenizer, decoder, adds="<s> $A"):
    """As sentencepiece's BPE: a space is `▁`, unknown characters fall back to bytes."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False)
    )
    state = json.loads(trained.to_str())["model"]
    vocabulary, merges = state["vocab"], [tuple(pair) for pair in state["merges"]]
    for name in ["▁", *(f"<0x{byte:02X}>" for byte in range(256))]:
        vocabulary.setdefault(name, len(vocabulary))
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if normalizer is not None:
        core.normalizer = normalizer
    if pre_tokenizer is not None:
        core.pre_tokenizer = pre_tokenizer
    strip = [] if decoder == "keep" else [decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return _finished(core, adds)


def _spaces(*first):
    return normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])


def _unigram():
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    core.train_from_iterator(
        SENTENCES,
        trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False),
    )
    return _finished(core, "$A </s>")


def _wordpiece():
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.train_from_iterator(
        SENTENCES, trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    )
    return _finished(core, "<s> $A </s>")


def mistral_file(name):
    if importlib.util.find_spec("mistral_common") is None:
        pytest.skip("needs Mistral's tokenizers: pip install mistral-common sentencepiece protobuf")
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / name


def _mistral_fast(name, **settings):
    folder = Path(mkdtemp())
    shutil.copy(mistral_file(name), folder / "tokenizer.model")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True, **settings}))
    return AutoTokenizer.from_pretrained(folder)


def _sentencepiece(model):
    """A slow one, which knows nothing of where its tokens stand in a text."""
    from transformers import BertGenerationTokenizer

    return BertGenerationTokenizer(str(model), bos_token="<s>", eos_token="</s>", additional_special_tokens=MARKS)


def _slow_unigram():
    import sentencepiece

    folder = Path(mkdtemp())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(folder / "t5"),
        vocab_size=300,
        model_type="unigram",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return _sentencepiece(folder / "t5.model")


KINDS = {
    "mistral v1": lambda: _mistral_fast("tokenizer.model.v1", legacy=True),
    "mistral v3": lambda: _mistral_fast("mistral_instruct_tokenizer_240323.model.v3", legacy=True),
    "mistral v1, not legacy": lambda: _mistral_fast("tokenizer.model.v1", legacy=False),
    "mistral v1, slow": lambda: _sentencepiece(mistral_file("tokenizer.model.v1")),
    "gpt2": lambda: _byte_level([]),
    "gpt2, space before each text": lambda: _byte_level([], prefix_space=True),
    "roberta": lambda: _byte_level([], prefix_space=True, trim=True),
    "llama3": lambda: _byte_level([LLAMA3], ignore_merges=True, adds="<s> $A"),
    "qwen2": lambda: _byte_level([LLAMA3], normalizer=normalizers.NFC()),
    "deepseek": lambda: _byte_level([r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", GPT2], adds="<s> $A"),
    "no splits": lambda: _byte_level([r"[\s\S]+"]),
    "llama2": lambda: _pieces(_spaces(normalizers.Prepend("▁")), None, "strip"),
    "metaspace always": lambda: _pieces(None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False), "strip"),
    "metaspace first": lambda: _pieces(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), "strip"),
    "metaspace never": lambda: _pieces(None, pre_tokenizers.Metaspace(prepend_scheme="never", split=True), "keep"),
    "gemma": lambda: _pieces(_spaces(), pre_tokenizers.Split(" ", "merged_with_previous"), "keep"),
    "with bos and eos": lambda: _pieces(_spaces(), None, "keep", adds="<s> $A </s>"),
    "t5": _unigram,
    "t5, slow": _slow_unigram,
    "bert": _wordpiece,
    "byt5, slow": lambda: ByT5Tokenizer(bos_token="<s>", extra_ids=0, additional_special_tokens=MARKS),
}
REWRITING = ("t5", "t5, slow", "bert", "mistral v1, slow")
"""Kinds that do not give every text back as it was."""


@cache
def tokenizer_of(kind):
    return KINDS[kind]()


_EACH = "{% for m in messages %}"
_ASKS = "{% if add_generation_prompt %}"
TEMPLATES = {
    "chatml": (
        _EACH
        + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        + _ASKS
        + "{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
    ),
    "llama2": (
        _EACH + "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
        " </s>",
    ),
    "llama3": (
        "{{ bos_token }}"
        + _EACH
        + "{{ '<|start|>' + m['role'] + '<|stop|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}" + _ASKS + "{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}",
        "<|eot_id|>",
    ),
    "zephyr": (
        _EACH
        + "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        + _ASKS
        + "{{ '<|assistant|>\n' }}{% endif %}",
        "</s>",
    ),
    "gemma": (
        "{{ bos_token }}"
        + _EACH
        + "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
        "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        + _ASKS
        + "{{ '<start_of_turn>model\n' }}{% endif %}",
        "<end_of_turn>",
    ),
    "mistral": (
        "{{ bos_token }}" + _EACH + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
        "</s>",
    ),
    "phi3": (
        _EACH
        + "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        + _ASKS
        + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
    ),
    "vicuna": (
        "{{ bos_token }}" + _EACH + "{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        + _ASKS
        + "{{ 'ASSISTANT:' }}{% endif %}",
        "</s>",
    ),
    "a space at the end": (
        _EACH
        + "{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        + _ASKS
        + "{{ 'assistant: ' }}{% endif %}",
        "</s>",
    ),
    "deepseek": (
        "{{ bos_token }}" + _EACH + "{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n\n' }}"
        "{% else %}{{ 'Assistant: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        + _ASKS
        + "{{ 'Assistant:' }}{% endif %}",
        "</s>",
    ),
}
"""Name: template, and the text that ends the assistant's turn in it."""
