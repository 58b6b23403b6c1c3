"""A pool of learned prompts: which of them stand in front of a user's prompt, how a model reads them, and their file.

An entry of the pool is a few vectors of the width of the model's embeddings, and a key. In front of a prompt stand the
vectors of the entries whose keys are nearest to the prompt's query, as virtual tokens V, V + 1, ... behind the
vocabulary: the input embedding looks them up, and the output matrix never sees them. So everything that works on
tokens (shared prompts, packed rows, decoding) works on them as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from everalign.errors import InputError
from everalign.modeling.shrinking import MODEL_ERRORS
from everalign.storage import follow_umask

PROMPTS_FILE = "prompts.safetensors"

_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class PromptShape:
    """Size of a pool.

    Args:
        entries: how many there are (M).
        length: vectors of an entry (Lp).
        selected: entries in front of each prompt (N).
    """

    entries: int = 10
    length: int = 5
    selected: int = 5

    @property
    def tokens(self) -> int:
        """Virtual tokens in front of each prompt."""
        return self.selected * self.length


def nearest_keys(queries: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the keys with the largest cosine to each query.

    Args:
        queries: (B, d).
        keys: (M, d).
        count: N.

    Returns:
        Cosines (B, N), the largest first, with gradients to both, and the numbers (B, N) of these keys.
    """
    cosines = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T
    values, numbers = cosines.topk(count, dim=-1)
    return values, numbers


class PromptPool(nn.Module):
    """The entries that are learned, fp32.

    Args:
        shape: how many of what length.
        embeddings: the model's input embeddings, rows of which the vectors start as.
        query_width: width d of queries and keys.

    Attributes:
        vectors: (M, Lp, width of the embeddings).
        keys: (M, d).
    """

    def __init__(self, shape: PromptShape, embeddings: nn.Module, query_width: int) -> None:
        super().__init__()
        self.shape = shape
        weight: Tensor = embeddings.weight  # type: ignore[assignment]
        vectors = torch.empty(shape.entries, shape.length, weight.shape[1], dtype=torch.float32)
        keys = torch.empty(shape.entries, query_width, dtype=torch.float32)
        self.vectors, self.keys = (nn.Parameter(values.to(weight.device)) for values in (vectors, keys))

    @torch.no_grad()
    def reset(self, embeddings: nn.Module, seed: int) -> None:
        """Start anew: vectors are those of tokens drawn at random, keys uniform between -1 and 1."""
        generator = torch.Generator().manual_seed(seed)
        count = len(embeddings.weight)  # type: ignore[arg-type]
        tokens = torch.randint(count, self.vectors.shape[:2], generator=generator)
        # By a call: some models scale what they look up.
        self.vectors.copy_(embeddings(tokens.to(self.vectors.device)))
        self.keys.copy_(torch.rand(self.keys.shape, generator=generator) * 2 - 1)

    def save(self, folder: Path) -> None:
        """Write the pool into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in self.named_parameters()}
        save_file(state, folder / PROMPTS_FILE)
        follow_umask(folder / PROMPTS_FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Restore what `save` wrote.

        Raises:
            InputError: the file is missing or damaged, or of another model or size; the pool is as it was.
        """
        path = folder / PROMPTS_FILE
        try:
            state = load_file(path)
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file, and it holds the prompts that were learned") from error
        except SafetensorError as error:
            raise InputError(f"{path}: the prompts are damaged ({error}); restore the file") from error
        own = dict(self.named_parameters())
        shapes, found = ({name: tuple(v.shape) for name, v in values.items()} for values in (own, state))
        if shapes != found:
            raise InputError(f"{path}: prompts of another model or size: {found}, while this pool has {shapes}")
        for name, value in own.items():
            value.copy_(state[name])


def refuse_prompts(folder: Path) -> None:
    """Refuse a version's folder that holds prompts where an adapter is needed.

    Raises:
        InputError: says what can be done with it.
    """
    if (folder / PROMPTS_FILE).exists():
        raise InputError(
            f"{folder} holds prompts that the method l2p has learned, which are chosen anew for each question: no "
            "adapter and no merged model can hold them; evaluate the version in its run, or learn with another method"
        )


@contextmanager
def looked_up(embeddings: Any, vectors: Tensor) -> Iterator[int]:
    """Let input embeddings return these vectors (P, width) for P tokens behind the vocabulary.

    Yields:
        The first of these tokens.
    """
    plain, own, size = embeddings.forward, embeddings.__dict__.get("forward"), len(embeddings.weight)

    def forward(tokens: Tensor) -> Tensor:
        virtual = tokens >= size
        found: Tensor = plain(tokens.masked_fill(virtual, 0))
        return torch.where(virtual[..., None], vectors.to(found.dtype)[(tokens - size).clamp(min=0)], found)

    embeddings.forward = forward
    try:
        yield size
    finally:
        if own is None:
            del embeddings.forward
        else:
            embeddings.forward = own


@torch.no_grad()
def check_readable(model: Any, pool: PromptPool) -> None:
    """Try whether a model reads virtual tokens as if their vectors were given to it in place of tokens.

    Some models look tokens up in other tables as well.

    Raises:
        InputError: it does not.
    """
    embeddings, vectors = model.get_input_embeddings(), pool.vectors[: pool.shape.selected].flatten(0, 1)
    tokens = torch.arange(8, device=vectors.device) % len(embeddings.weight)
    refused = f"{type(model).__name__} cannot be learned with the method l2p: it does not read learned prompts"
    try:
        given = torch.cat([vectors.to(embeddings.weight.dtype), embeddings(tokens)])
        expected = model.base_model(inputs_embeds=given[None], use_cache=False).last_hidden_state
        with looked_up(embeddings, vectors) as first:
            ids = torch.cat([first + torch.arange(len(vectors), device=vectors.device), tokens])
            found = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state
    except MODEL_ERRORS as error:
        raise InputError(f"{refused} ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})") from error
    if (found - expected).abs().max() > _TOLERANCES[found.dtype] * expected.abs().max().clamp(min=1.0):
        raise InputError(refused)
