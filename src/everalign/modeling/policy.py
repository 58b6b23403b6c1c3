"""A policy: one frozen base model with two LoRA adapters, long-term and short-term.

    base model                      both adapters off
    policy before the task          short-term adapter off (when each task trains a fresh one)
    policy now                      both on

so every reference policy is a switch and never a second model. The long-term adapter is frozen and fp32; its rank
follows what memory consolidation writes into it. Built on peft, whose checkpoint format is ours.

A policy may learn prompts instead (see `everalign.modeling.prompt_pool`): its adapters stay switched off, and it is the
base model where no prompts are put in front.

`everalign.modeling.trainable.FullModel` is the alternative without adapters, where all weights learn.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from everalign.data.collate import Batch, prompt_places, with_prefix
from everalign.errors import InputError
from everalign.memory import LowRankUpdate
from everalign.modeling import lora as adapters
from everalign.modeling.architecture import ALL_LINEAR, choose_targets, study
from everalign.modeling.attention import use_cpu_attention
from everalign.modeling.base_weights import is_offloaded
from everalign.modeling.decoding import Decoder, pad_left
from everalign.modeling.logprobs import SequenceLogProbs
from everalign.modeling.lora import frozen_for_inference, fuse
from everalign.modeling.prompt_pool import (
    PromptPool,
    PromptShape,
    check_readable,
    looked_up,
    nearest_keys,
    refuse_prompts,
)
from everalign.modeling.runtime import use_lean_layers
from everalign.modeling.trainable import TrainableLM

SHORT_TERM = "stm"
LONG_TERM = "ltm"
_SNAPSHOT = "snapshot"

Updates = Mapping[str, LowRankUpdate]


@dataclass(frozen=True)
class Snapshot:
    """A policy as it was: its difference from the base model.

    Args:
        updates: of adapted modules.
        prompts: a copy of the pool; None for a policy that learns none.
    """

    updates: Updates
    prompts: PromptPool | None = None


Earlier = Snapshot | Updates


class Policy(TrainableLM):
    """The policy that is trained, evaluated and saved.

    Args:
        model: a frozen Hugging Face causal language model.
        rank: rank r of the short-term adapter.
        alpha: LoRA's α; the update of a module is (α/r)·B·A.
        targets: names of the modules to adapt or their last parts, a regular expression, or `all-linear`.
        seed: seeds the short-term adapter's A (B starts at 0), or the pool.
        prompts: size of a pool of prompts, which is then all that learns; None for none.
        device: where it is going to compute; where the model is when None.

    A base model in bf16 computes under bf16 autocast, in training, evaluation and as reference alike; adapters and
    log-probabilities stay fp32.

    Attributes:
        head: computes log-probabilities.
        notes: what stays frozen though one might think that it is adapted; a line each.
        seed: of the short-term adapter that it was made with.
        prompts: the pool; None for none.

    Raises:
        InputError: the model has no such modules, or cannot read learned prompts.
    """

    prompts: PromptPool | None

    def __init__(
        self,
        model: Any,
        rank: int,
        alpha: float,
        targets: str | list[str] = ALL_LINEAR,
        seed: int = 0,
        prompts: PromptShape | None = None,
        device: torch.device | None = None,
    ) -> None:
        mixed = next(model.parameters()).dtype == torch.bfloat16
        super().__init__(mixed)
        # Before anything of it is replaced: the copy is made of its classes as they are.
        architecture = study(model)
        chosen = choose_targets(model, targets, architecture.reached)
        self.notes = chosen.notes if prompts is None else []
        self.peft = adapters.attach(model, SHORT_TERM, rank, alpha, chosen.names)
        adapters.check_untied(self.peft)
        # Adapters come and go in these same layers.
        self._layers = list(adapters.layers(self.peft).values())
        for layer in self._layers:
            # Autocast decides the precision of the products; casting their input to the adapter's fp32 first
            # would only copy it back and forth.
            layer.cast_input_dtype_enabled = not mixed
            fuse(layer)
        self._snapshot: Updates | None = None
        # A trainer leaves a model where it is that says so.
        self.hf_device_map = getattr(model, "hf_device_map", {})
        if device is None or device.type == "cpu":
            use_cpu_attention(model)
            if not is_offloaded(model):
                use_lean_layers(model)
        self.head = SequenceLogProbs(model, architecture)
        self.seed = seed
        self.prompts: PromptPool | None = None
        if prompts is not None:
            if not self.head.chunked:
                raise InputError(
                    f"{type(model).__name__} cannot be learned with the method l2p: its hidden states cannot be read "
                    "apart"
                )
            self._queries: dict[tuple[int, ...], Tensor] = {}
            self.prompts = PromptPool(prompts, self._embeddings, self.queries([(0,)]).shape[-1])
        # The pool whose prompts are put in front now stands last. In a list, which makes it no part of the policy.
        self._pools: list[PromptPool | None] = [None]
        self.reset(seed)
        if self.prompts is not None:
            check_readable(model, self.prompts)

    @property
    def language_model(self) -> Any:
        """The base model with both adapters injected."""
        return self.peft.get_base_model()

    @property
    def _embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    # ---- what it computes ----

    def response_logits(self, batch: Batch) -> Tensor:
        """Return the logits (K, V) fp32 that predict the batch's K response tokens, in the order of its `targets`."""
        with self._reading(batch) as read:
            return self.head.response_logits(read).float()

    def response_states(self, batch: Batch) -> Tensor:
        """Return what `logits` makes the batch's logits of: (K, d), a row for each of its K response tokens."""
        with self._reading(batch) as read:
            return self.head.states(read)

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits (K, V) fp32 of some of the rows that `response_states` returned."""
        with self._computing(states):
            return self.head.logits(states).float()

    @contextmanager
    def decoding(self, batch: Batch) -> Iterator[Decoder]:
        """Yield a decoder of left-padded prompts; the policy must stay as it is inside the `with` block."""
        with self._computing(batch["input_ids"]), frozen_for_inference(self._layers, merging=True):
            if self.prefix_length == 0:
                yield Decoder(self.language_model, batch, self.head)
                return
            rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
            prompts = [[token for token, shown in zip(*row, strict=True) if shown] for row in rows]
            with self._prompted(prompts) as first:
                starts = range(first, first + len(prompts) * self.prefix_length, self.prefix_length)
                longer = [[*range(n, n + self.prefix_length), *ids] for n, ids in zip(starts, prompts, strict=True)]
                device = batch["input_ids"].device
                padded = {name: value.to(device) for name, value in pad_left(longer, 0).items()}
                yield Decoder(self.language_model, padded, self.head)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Compute batches without gradients, in evaluation mode; no adapter may change inside the `with` block."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad(), frozen_for_inference(self._layers, merging=False):
                yield
        finally:
            self.training = was_training

    # ---- prompts in front of prompts ----

    @property
    def prefix_length(self) -> int:
        """Tokens that are put in front of every prompt."""
        pool = self._pools[-1]
        return 0 if pool is None else pool.shape.tokens

    def use_prompts(self) -> None:
        """Put the pool's prompts in front from now on, until `reset`."""
        self._pools[0] = self.prompts

    def queries(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Return the queries (B, d) fp32 by which pools choose: means of the base model's last hidden states.

        Over a prompt's tokens, and nothing that follows them. Each prompt is computed alone and once, so that its query
        does not depend on what it is computed beside.
        """
        found = []
        for tokens in map(tuple, prompts):
            if tokens not in self._queries:
                ids = torch.tensor([tokens], device=self._embeddings.weight.device)
                places = torch.arange(len(tokens), device=ids.device)
                # All of its tokens as if they were predictors.
                batch = {"input_ids": ids, "predictors": places, "targets": ids[0]}
                batch |= {"sequences": torch.zeros_like(places), "lengths": torch.tensor([len(tokens)]).to(places)}
                with torch.no_grad(), self._computing(ids):
                    self._queries[tokens] = self.head.states(batch).float().mean(dim=0).cpu()
            found.append(self._queries[tokens])
        return torch.stack(found).to(self._embeddings.weight.device)

    @contextmanager
    def _reading(self, batch: Batch) -> Iterator[Batch]:
        with self._computing(batch["input_ids"]):
            if self.prefix_length == 0:
                yield batch
                return
            flat = batch["input_ids"].flatten().tolist()
            starts, ends, _ = (places.tolist() for places in prompt_places(batch))
            prompts = [flat[start:end] for start, end in zip(starts, ends, strict=True)]
            with self._prompted(prompts) as first:
                yield with_prefix(batch, self.prefix_length, first)

    @contextmanager
    def _prompted(self, prompts: Sequence[Sequence[int]]) -> Iterator[int]:
        """Let the embeddings look up what stands in front of each of these prompts; yields its first token."""
        pool = self._pools[-1]
        assert pool is not None
        # The nearest entry stands first. Which entries they are has no gradient: keys learn by a loss of their own.
        _, numbers = nearest_keys(self.queries(prompts), pool.keys.detach(), pool.shape.selected)
        with looked_up(self._embeddings, pool.vectors[numbers].flatten(0, 2)) as first:
            yield first

    @contextmanager
    def _with_pool(self, pool: PromptPool | None) -> Iterator[None]:
        """Put this pool's prompts in front inside the `with` block, or none."""
        self._pools.append(pool)
        try:
            yield
        finally:
            self._pools.pop()

    # ---- which adapters take part ----

    def reset(self, seed: int) -> None:
        """Forget everything: no long-term memory, a fresh short-term adapter; the policy is the base model.

        Where it learns prompts, these are fresh too, and nothing is put in front.
        """
        self.write_long_term({})
        self.start_short_term(seed)
        self._pools[0] = None
        if self.prompts is not None:
            self.prompts.reset(self._embeddings, seed)

    def start_short_term(self, seed: int) -> None:
        """Begin a fresh short-term adapter (A random by `seed`, B = 0), which changes nothing yet."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for layer in self._layers:
                layer.reset_lora_parameters(SHORT_TERM, True)
        self._activate()

    def write_long_term(self, updates: Updates) -> None:
        """Replace the long-term adapter by these updates, one of shape (m, n) per adapted module; {} for none."""
        adapters.replace(self.peft, LONG_TERM, updates)
        self._activate()

    def _activate(self) -> None:
        if self.prompts is not None:
            self.peft.base_model.disable_adapter_layers()
            return
        names = [name for name in (LONG_TERM, SHORT_TERM) if name in self.peft.peft_config]
        self._use(names)
        for layer in self._layers:
            layer.set_requires_grad(SHORT_TERM, True)

    def _use(self, names: list[str]) -> None:
        # As peft's model does it, which would look for the layers among all modules every time.
        for layer in self._layers:
            layer.set_adapter(names, inference_mode=True)
        self.peft.base_model.active_adapter = names

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Compute as the base model inside the `with` block."""
        try:
            with self.peft.disable_adapter(), self._with_pool(None):
                yield
        finally:
            self._activate()

    @contextmanager
    def as_snapshot(self, earlier: Earlier) -> Iterator[Any]:
        """Yield a context manager under which the policy is what it was, or the base model plus these updates.

        Inside a block of the same updates, their adapter is there already.
        """
        if self.prompts is not None:
            yield partial(self._with_pool, earlier.prompts if isinstance(earlier, Snapshot) else None)
            return
        updates = earlier.updates if isinstance(earlier, Snapshot) else earlier

        @contextmanager
        def switched() -> Iterator[None]:
            if _SNAPSHOT not in self.peft.peft_config:
                with self.as_base():
                    yield
                return
            self._use([_SNAPSHOT])
            try:
                yield
            finally:
                self._activate()

        if updates is self._snapshot:
            yield switched
            return
        self._snapshot = updates
        try:
            adapters.replace(self.peft, _SNAPSHOT, updates)
            self._activate()
            yield switched
        finally:
            self._snapshot = None
            adapters.replace(self.peft, _SNAPSHOT, {})
            self._activate()

    # ---- what it has learned ----

    def snapshot(self) -> Snapshot:
        """Return the policy as it is now, for `as_snapshot`."""
        pool = self._pools[-1]
        return Snapshot(self.total(), None if pool is None else copy.deepcopy(pool).requires_grad_(False))

    def short_term(self) -> dict[str, LowRankUpdate]:
        """Return (α/r)·B·A of every adapted module, in factored form, detached fp32 copies on the CPU."""
        return adapters.read(self.peft, SHORT_TERM)

    def long_term(self) -> dict[str, LowRankUpdate]:
        """Return the long-term updates; {} where there are none."""
        return adapters.read(self.peft, LONG_TERM) if LONG_TERM in self.peft.peft_config else {}

    def total(self) -> dict[str, LowRankUpdate]:
        """Return the policy's whole difference from the base model, module by module, in factored form."""
        short, long = self.short_term(), self.long_term()
        return {name: long[name] + update if name in long else update for name, update in short.items()}

    def learned_factors(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Return the short-term adapter's own factors (B (m, r), A (r, n)) of every module, with gradients."""
        return {
            name: (layer.lora_B[SHORT_TERM].weight, layer.lora_A[SHORT_TERM].weight)
            for name, layer in adapters.layers(self.peft).items()
        }

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the short-term adapter's raw factors (B (m, r), A (r, n)) of every module, detached copies."""
        return adapters.read_factors(self.peft, SHORT_TERM)

    def write_factors(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Overwrite the short-term adapter's raw factors (B, A) of every module."""
        adapters.write_factors(self.peft, SHORT_TERM, factors)

    # ---- on disk ----

    def save_adapter(self, folder: Path) -> None:
        """Write the policy as one PEFT adapter that plain peft loads.

        The long-term adapter where there is one (the short-term one must be fresh then), else the short-term one.
        Prompts, where it learns those, are written alone: plain peft must not take an empty adapter for the policy.
        """
        if self.prompts is not None:
            self.prompts.save(folder)
            return
        name = LONG_TERM if LONG_TERM in self.peft.peft_config else SHORT_TERM
        if name == LONG_TERM and any(update.norm() > 0 for update in self.short_term().values()):
            raise RuntimeError("save_adapter: the short-term adapter holds an update that was not consolidated")
        adapters.save(self.peft, name, folder)

    def load_adapter(self, folder: Path, long_term: bool, seed: int) -> None:
        """Restore what `save_adapter` wrote, as the long-term adapter or as the short-term one.

        Raises:
            InputError: the folder holds no adapter, or one of another model or shape; the policy is as it was.
        """
        if self.prompts is not None:
            self.prompts.load(folder)
            self.use_prompts()
            return
        refuse_prompts(folder)
        rank, alpha = adapters.load_scale(folder)
        factors = adapters.load_factors(self.peft, folder)
        config = self.peft.peft_config[SHORT_TERM]
        if not long_term and (rank, alpha) != (config.r, config.lora_alpha):
            raise InputError(
                f"{folder}: an adapter of rank {rank} and alpha {alpha:g}, while this policy has rank {config.r} "
                f"and alpha {config.lora_alpha:g}: use the settings it was learned with"
            )
        self.reset(seed)
        if long_term:
            scale = alpha / rank
            self.write_long_term({name: LowRankUpdate(left * scale, right) for name, (left, right) in factors.items()})
        else:
            adapters.write_factors(self.peft, SHORT_TERM, factors)
