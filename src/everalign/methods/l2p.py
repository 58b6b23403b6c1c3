"""L2P: a frozen model, and a pool of learned prompts of which each prompt gets those that are nearest to it."""

from typing import Any, ClassVar

from torch import Tensor

from everalign.data.collate import Batch, prompt_places
from everalign.errors import InputError
from everalign.methods.base import Method, Task, check_strength
from everalign.modeling.policy import Policy
from everalign.modeling.prompt_pool import PromptShape, nearest_keys
from everalign.training.hooks import RowTerms, Stage


class LearningToPrompt(Method):
    """L2P: no adapter learns, but a pool of prompts shared by all tasks (arXiv 2112.08654), for a language model.

    The query q of a prompt is the mean of the frozen model's last hidden states over its tokens, without the answer's:
    all answers to a prompt, in training, scoring and generation, get the same entries. Those are the `top_prompts` with
    the largest cos(q, k) of their keys k; their vectors are put in front, the nearest first. To a row's loss is added
    strength · Σ (1 − cos(q, k)) over its entries, by which alone keys learn. The reference is the base model, without
    prompts.

    As in l2p-pytorch, keys are not made of prompts and start uniform; other than there, rows choose by themselves, not
    the majority of a batch, in which training and use would differ; and vectors start as those of random tokens, whose
    size a language model expects. AdamW makes steps of the same length from gradients of any size, so that `strength`
    matters through gradient clipping only.

    Args:
        pool_size: M, entries of the pool.
        prompt_length: Lp, vectors of an entry.
        top_prompts: N, entries in front of each prompt.
        strength: μ, of the pull of keys to the queries that chose them.
        prompt_rate: learning rate of vectors and keys, in units of the run's (`--learning-rate`, and
            `--sft-learning-rate`), which are made for adapters. l2p-pytorch has 0.03, 300 times the default 1e-4.
    """

    name = "l2p"
    reference: ClassVar[str | None] = "base"
    prompts = PromptShape()

    def __init__(
        self,
        pool_size: int = PromptShape.entries,
        prompt_length: int = PromptShape.length,
        top_prompts: int = PromptShape.selected,
        strength: float = 0.1,
        prompt_rate: float = 300.0,
    ) -> None:
        sizes = {"pool_size": pool_size, "prompt_length": prompt_length, "top_prompts": top_prompts}
        for label, value in sizes.items():
            if value < 1:
                raise InputError(f"{label} is a number of at least 1, found {value}", field=label)
        if top_prompts > pool_size:
            raise InputError(f"top_prompts: {top_prompts} of {pool_size} cannot be chosen", field="top_prompts")
        for label, number in (("strength", strength), ("prompt_rate", prompt_rate)):
            check_strength(label, number)
        if prompt_rate == 0:
            raise InputError("prompt_rate must be above 0, or nothing is learned", field="prompt_rate")
        self.prompts = PromptShape(pool_size, prompt_length, top_prompts)
        self.strength, self.rate_factor = strength, prompt_rate
        self._policy: Policy | None = None

    def settings(self) -> dict[str, Any]:
        """Returns the arguments."""
        sizes = self.prompts
        return {
            "pool_size": sizes.entries,
            "prompt_length": sizes.length,
            "top_prompts": sizes.selected,
            "strength": self.strength,
            "prompt_rate": self.rate_factor,
        }

    def check_fits(self, objective: str, reference: str | None, adapter: bool) -> None:
        """Refuses another reference, the shape of an adapter, and correctors."""
        if reference not in (None, "base"):
            raise InputError(
                f"reference {reference}: the reference of l2p is the base model, without prompts: leave it out",
                field="reference",
            )
        if adapter:
            raise InputError(
                "l2p learns prompts and no adapter, and would ignore rank, alpha and targets: leave them out",
                field="adapter",
            )
        if objective == "correction":
            raise InputError(
                "a corrector is served as a merged model, which cannot hold the prompts that l2p learns: choose "
                "another method",
                field="method",
            )

    def begin_task(self, policy: Policy, task: Task) -> None:
        """Puts the pool's prompts in front, as they were learned so far."""
        policy.use_prompts()

    def begin_stage(self, stage: Stage) -> RowTerms | None:
        """Asks for a loss of each row."""
        self._policy = stage.policy
        if stage.policy.prompts is not None:
            # Several processes wait for the gradients of all that learns, and without strength keys have none.
            stage.policy.prompts.keys.requires_grad_(self.strength > 0)
        return RowTerms() if self.strength else None

    def row_loss(self, logprobs: Tensor, batch: Batch) -> Tensor | None:
        """Returns the pull of the chosen keys to each row's query."""
        policy = self._policy
        if policy is None or policy.prompts is None:
            return None
        starts, ends, whose = prompt_places(batch)
        # A row's first response stands for all: they follow the same prompt.
        of_rows = whose[batch["sizes"].cumsum(0) - batch["sizes"]]
        places = zip(starts[of_rows].tolist(), ends[of_rows].tolist(), strict=True)
        flat = batch["input_ids"].flatten().tolist()
        queries = policy.queries([flat[start:end] for start, end in places])
        cosines, _ = nearest_keys(queries, policy.prompts.keys, self.prompts.selected)
        return self.strength * (1 - cosines).sum(dim=1)
