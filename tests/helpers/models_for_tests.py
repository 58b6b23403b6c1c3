"""Tiny models with random weights of the families people adapt, and policies and pairs over them."""

import atexit
import functools
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BitsAndBytesConfig,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from everalign.data.collate import Batch, collate
from everalign.data.tokenization import TokenizedRow
from everalign.memory import LowRankUpdate
from everalign.modeling.policy import Policy
from tokenizers_for_tests import byte_tokenizer

VOCABULARY = 96
PAD = 0

# Weights this large give logits of order one, so that no comparison passes because everything is nearly zero.
SPREAD = 0.2

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": SPREAD,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# A window shorter than the test sequences, so that local attention is at work.
LOCAL: dict[str, Any] = {"sliding_window": 6, "query_pre_attn_scalar": 8}
GPT2_SHAPE: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "initializer_range": SPREAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2")
# Their logits are scaled after the output matrix.
SCALED = ("cohere", "granite")


def _configuration(family: str, vocabulary: int, layers: int) -> PreTrainedConfig:
    shape = {**SHAPE, "vocab_size": vocabulary, "num_hidden_layers": layers}
    makers = {
        "llama": lambda: LlamaConfig(**shape),
        "qwen2": lambda: Qwen2Config(**shape),
        "qwen3": lambda: Qwen3Config(**shape, tie_word_embeddings=True),
        "mistral": lambda: MistralConfig(**shape, sliding_window=6),
        "gemma2": lambda: Gemma2Config(**shape, **LOCAL, final_logit_softcapping=3.0),
        "gemma3": lambda: Gemma3TextConfig(**shape, **LOCAL),
        "phi3": lambda: Phi3Config(**shape),
        "gpt2": lambda: GPT2Config(vocab_size=vocabulary, **{**GPT2_SHAPE, "n_layer": layers}),
        "cohere": lambda: CohereConfig(**shape, logit_scale=0.5),
        "olmo3": lambda: Olmo3Config(
            **shape, sliding_window=6, layer_types=["sliding_attention", "full_attention"] * (layers // 2)
        ),
        "mixtral": lambda: MixtralConfig(
            **shape, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.5, sliding_window=None
        ),
        "granite": lambda: GraniteConfig(**shape, logits_scaling=2.0),
        "bloom": lambda: BloomConfig(vocab_size=vocabulary, hidden_size=32, n_layer=2, n_head=4),
        "gpt_neo": lambda: GPTNeoConfig(
            vocab_size=vocabulary, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
        ),
        "roberta": lambda: RobertaConfig(
            **{**shape, "pad_token_id": 1}, is_decoder=True, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1
        ),
        "mamba": lambda: MambaConfig(vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, state_size=4),
    }
    return makers[family]()


def random_model(family: str = "llama", seed: int = 0, vocabulary: int = VOCABULARY, layers: int = 2) -> Any:
    """A frozen base model as `load_model` gives it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_configuration(family, vocabulary, layers))
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms start at constants that would hide a mistake.
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval()
    model.requires_grad_(False)
    return model


def scaled_by_itself(model: Any) -> Any:
    """A model whose class scales its logits by what no configuration tells, so that its head alone is not enough."""
    plain = type(model)

    class Scaled(plain):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 0.7
            return output

    model.__class__ = Scaled
    return model


@functools.cache
def saved_model(family: str = "llama", seed: int = 0) -> Path:
    """A folder with a model and a tokenizer of one token a byte, made once a session and never written to."""
    folder = Path(tempfile.mkdtemp(prefix=f"everalign-{family}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer = byte_tokenizer()
    random_model(family, seed, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def packed(plain: Path, folder: Path) -> Path:
    """A language model as a checkpoint of weights that bitsandbytes has quantised, as others publish them."""
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=how).save_pretrained(folder)
    for file in plain.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return folder


def random_policy(
    family: str = "llama", rank: int = 4, alpha: float = 8.0, targets: str | list[str] = "all-linear", seed: int = 0
) -> Policy:
    """A policy that is its base model still."""
    return Policy(random_model(family, seed), rank, alpha, targets, seed)


def perturb(policy: Policy, seed: int = 1, size: float = 0.1) -> Policy:
    """Gives the short-term adapter an update, as training would."""
    generator = torch.Generator().manual_seed(seed)
    policy.write_factors(
        {
            name: (size * torch.randn(left.shape, generator=generator), right)
            for name, (left, right) in policy.factors().items()
        }
    )
    return policy


def random_updates(policy: Policy, seed: int = 2, rank: int = 3, size: float = 0.05) -> dict[str, LowRankUpdate]:
    """Updates for every adapted module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LowRankUpdate(
            size * torch.randn(update.shape[0], rank, generator=generator),
            torch.randn(rank, update.shape[1], generator=generator),
        )
        for name, update in policy.short_term().items()
    }


def random_pairs(count: int, seed: int = 0, longest: int = 12, vocabulary: int = VOCABULARY) -> list[TokenizedRow]:
    """Pairs of very different lengths."""
    rng = random.Random(seed)

    def tokens(most: int) -> list[int]:
        return [rng.randrange(3, vocabulary) for _ in range(rng.randint(1, most))]

    return [TokenizedRow.pair(f"{i:04}", tokens(longest), tokens(longest), tokens(longest), 1.0) for i in range(count)]


def random_groups(
    count: int, seed: int = 0, longest: int = 12, vocabulary: int = VOCABULARY, answers: int = 4
) -> list[TokenizedRow]:
    """Groups of one to `answers` responses, some of them of weight 0."""
    rng = random.Random(seed)

    def tokens() -> list[int]:
        return [rng.randrange(3, vocabulary) for _ in range(rng.randint(1, longest))]

    groups = []
    for i in range(count):
        responses = tuple(tokens() for _ in range(rng.randint(1, answers)))
        weights = [rng.choice([0.0, rng.random(), 3 * rng.random()]) for _ in responses]
        weights[rng.randrange(len(weights))] = 0.5
        groups.append(TokenizedRow(f"{i:04}", tokens(), responses, tuple(weights)))
    return groups


def random_targets(count: int, seed: int = 0, longest: int = 12, vocabulary: int = VOCABULARY) -> list[TokenizedRow]:
    """Groups of two to five responses to be compared, one share in some of them 0."""
    rng = random.Random(seed)
    groups = []
    for group in random_groups(count, seed, longest, vocabulary):
        first = [rng.randrange(3, vocabulary) for _ in range(rng.randint(1, longest))]
        shares = [rng.choice([0.0, 1.0]), *(0.1 + rng.random() for _ in group.responses)]
        normal = tuple(share / sum(shares) for share in shares)
        groups.append(TokenizedRow(group.id, group.prompt, (first, *group.responses), normal, 0.5 + rng.random()))
    return groups


def random_rows(objective: str, count: int, **options: Any) -> list[Any]:
    """Rows of the kind that an objective is trained on."""
    kinds = {"var": random_groups, "correction": random_groups, "snkl": random_targets}
    return kinds.get(objective, random_pairs)(count, **options)


def collate_chosen(pairs: list[TokenizedRow], shared: bool) -> Batch:
    """The chosen responses of preferences alone."""
    return collate([pair.only([0]) for pair in pairs], shared)


def logits_of(policy: Policy, pairs: list[TokenizedRow]) -> torch.Tensor:
    """The whole model's logits (2B, T, V) of the pairs, as it is switched now."""
    batch = collate(pairs, shared=False)
    with torch.no_grad():
        output = policy.peft(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return output.logits


def trainable(policy: Policy) -> dict[str, set[bool]]:
    """Whether the parameters of each adapter, and those of the base model, are trainable."""
    found: dict[str, set[bool]] = {"stm": set(), "ltm": set(), "snapshot": set(), "base": set()}
    for name, parameter in policy.named_parameters():
        adapter = next((key for key in found if f".{key}." in name), "base")
        found[adapter].add(parameter.requires_grad)
    return {key: values for key, values in found.items() if values}
