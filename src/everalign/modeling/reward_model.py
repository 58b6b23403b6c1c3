"""Reward models: a sequence classifier with one output, read at the last token of prompt and answer.

The architecture and its folder are transformers' own (`AutoModelForSequenceClassification` with one label), so that
whatever loads such a model loads ours; its logits are rewards that are not centred yet.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from everalign.data.batches import batches_by_length
from everalign.data.comparisons import pad_right
from everalign.errors import EveralignError, InputError
from everalign.modeling.loading import cannot_load, resolve_model

_PADDING = "<|pad|>"


class RewardModel(nn.Module):
    """A classifier as a function of token sequences.

    Args:
        classifier: a sequence classifier with one label and a padding token (see `load_classifier`, `set_padding`).
    """

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    @property
    def padding(self) -> int:
        """The token that pads, which is never a sequence's last one."""
        token: int = self.classifier.config.get_text_config().pad_token_id
        return token

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return fp32 rewards (B,), not centred, of `input_ids` and `attention_mask` (B, T), padded on the right."""
        output = self.classifier(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        rewards: Tensor = output.logits[:, 0].float()
        return rewards


def load_classifier(name: str, fresh_head: bool, seed: int = 0) -> Any:
    """Load a sequence classifier with one label in fp32, dropout off.

    Dropout stays off because an answer's reward must not depend on which other answer it is compared with, nor on how
    a step is cut into batches.

    Args:
        name: a folder in Hugging Face format, a Hub name, a GGUF file, `tiny` or `smollm2`.
        fresh_head: let the head start with random values where the model has none, as a language model does.
        seed: seeds them.

    Raises:
        InputError: nothing loadable is there, its architecture has no sequence classifier, or weights are missing.
    """
    source = resolve_model(name)
    try:
        config = AutoConfig.from_pretrained(source, num_labels=1)
        _plain(config.get_text_config())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                source, config=config, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(cannot_load("sequence classifier with one label", name, error)) from error
    backbone = f"{model.base_model_prefix}."
    missing = sorted(key for key in loaded["missing_keys"] if not fresh_head or key.startswith(backbone))
    if missing:
        raise InputError(f"the weights of {name} lack {len(missing)} of the model's parameters, such as {missing[0]}")
    return model.eval()


def _plain(config: Any) -> None:
    """Switch dropout off, under each family's names for it, and the cache that only generation needs."""
    for key, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(config, key, 0.0)
    config.use_cache = False


def set_padding(classifier: Any, tokenizer: Any) -> None:
    """Give classifier and tokenizer one padding token, on the right, that is not the end of an answer.

    transformers reads the reward at the last token that is not padding: with EOS as padding, as is common, it would
    pass over the end of the answer. Where the tokenizer has no other padding token, one is added.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": _PADDING})
        if len(tokenizer) > classifier.get_input_embeddings().num_embeddings:
            # What the new row holds does not matter: nothing attends to it.
            classifier.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.padding_side = "right"
    classifier.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def sequence_rewards(
    model: RewardModel,
    sequences: Sequence[list[int]],
    tokens_per_batch: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Compute the rewards, not centred, of N sequences.

    Args:
        model: in evaluation mode; gradients are off.
        sequences: tokens of prompt and answer.
        tokens_per_batch: tokens computed at once, padding included.
        progress: called with (sequences done, sequences in all) after each batch.

    Returns:
        (N,) fp32 on the CPU.

    Raises:
        EveralignError: a reward is NaN or infinite.
    """
    device = next(model.parameters()).device
    order: list[int] = []
    parts: list[Tensor] = []
    for rows in batches_by_length([len(tokens) for tokens in sequences], tokens_per_batch):
        batch = pad_right([sequences[row] for row in rows], model.padding)
        with torch.no_grad():
            parts.append(model({name: values.to(device) for name, values in batch.items()}))
        order += rows
        if progress is not None:
            progress(len(order), len(sequences))
    rewards = torch.empty(len(sequences))
    if parts:
        rewards[order] = torch.cat(parts).cpu()  # the device is waited for once
    if not torch.isfinite(rewards).all():
        raise EveralignError("the model gives NaN or infinite rewards: lower the learning rate, or check its weights")
    return rewards
