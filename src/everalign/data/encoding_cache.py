"""Encoded rows on disk: what was tokenised once is read the next time, by a resumed run or by another method's."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor

from everalign.data.encoding import EncodedPair, EncodedPairs, encode_pairs
from everalign.data.records import Preference
from everalign.data.templating import ChatFormat, template_fingerprint
from everalign.tensor_files import read_tensors, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES = ("tokens", "lengths", "counts")
# Changes when rows are turned into tokens in another way than before.
_FORMAT = 1
# A chat template that prints today's date gives other tokens tomorrow.
_CLOCK = "strftime_now"


class EncodingCache:
    """Does what `encode_pairs` does, and keeps the tokens in a folder.

    A file belongs to one tokenizer with its chat template, one `max_length` and one list of rows by content.

    Args:
        folder: created when first written to; may be shared by runs with the same tokenizer or others.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def encode(self, rows: Sequence[Preference], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> EncodedPairs:
        """Return rows as tokens; arguments and errors as in `encode_pairs`.

        Raises:
            InputError: the cache file is damaged; the message says to delete it.
        """
        if _CLOCK in ChatFormat(tokenizer).template:
            return encode_pairs(rows, tokenizer, max_length)
        path = self._folder / f"encoded-{_key(rows, tokenizer, max_length)}.safetensors"
        stored = read_tensors(path, _NAMES, "cache of encoded rows")
        if stored is not None:
            return _unpacked(rows, max_length, *(stored[name] for name in _NAMES))
        encoded = encode_pairs(rows, tokenizer, max_length)
        write_tensors(path, _packed(encoded))
        return encoded


def _key(rows: Sequence[Preference], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> str:
    # Special tokens in a text are cut up or not, as the tokenizer is set; the fingerprint does not tell.
    probe = tokenizer(" ".join(tokenizer.all_special_tokens), add_special_tokens=False, verbose=False)["input_ids"]
    facts = (_FORMAT, transformers.__version__, template_fingerprint(tokenizer), max_length, probe)
    digest = hashlib.sha256(repr(facts).encode())
    for row in rows:
        digest.update(row.id.encode())
    return digest.hexdigest()[:32]


def _packed(encoded: EncodedPairs) -> dict[str, Tensor]:
    parts = [tokens for pair in encoded for tokens in (pair.prompt, pair.chosen, pair.rejected)]
    counts = (encoded.truncated_prompts, encoded.truncated_responses, encoded.identical_after_truncation)
    return {
        "tokens": torch.tensor([token for part in parts for token in part], dtype=torch.int32),
        "lengths": torch.tensor([len(part) for part in parts], dtype=torch.int32),
        "counts": torch.tensor(counts),
    }


def _unpacked(
    rows: Sequence[Preference], max_length: int, tokens: Tensor, lengths: Tensor, counts: Tensor
) -> EncodedPairs:
    parts = iter([part.tolist() for part in torch.split(tokens, lengths.tolist())])
    pairs = tuple(EncodedPair(row.id, next(parts), next(parts), next(parts), row.weight) for row in rows)
    return EncodedPairs(pairs, max_length, *counts.tolist())
