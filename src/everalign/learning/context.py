"""The run context: model, tokenizer, method, objective and options, put together once for all tasks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everalign.data.chat_tokens import template_fingerprint
from everalign.data.rows import RowSet
from everalign.distributed import asks_for_fsdp, follow_with, start, world
from everalign.errors import InputError
from everalign.evaluation.scorers import Scorer
from everalign.learning.options import AdapterOptions, CorrectionTaskOptions, RolloutOptions, TrainingOptions
from everalign.learning.tracking import Tracker
from everalign.methods import Method
from everalign.modeling.attention import use_flex_attention
from everalign.modeling.base_adapter import base_and_adapter
from everalign.modeling.base_weights import check_device_map, check_library, check_trainable
from everalign.modeling.loading import (
    DTYPES,
    check_vocabulary,
    load_base,
    load_tokenizer,
    readable_length,
    resolve_model,
    resolve_precision,
)
from everalign.modeling.machine import library_versions, machine_facts
from everalign.modeling.policy import Policy
from everalign.modeling.rehearsal import rehearse
from everalign.modeling.runtime import place_name, prepare_process, training_device
from everalign.modeling.sharding import shard
from everalign.options import Precision
from everalign.training.base_objective import Objective, TaskContext
from everalign.training.objectives import check_weighting, make_objective, reads
from everalign.training.options import StageOptions, WeightOptions
from everalign.training.reference import ReferenceCache

# Tokens from which on a mask of all pairs of them is worth a word: 128 MiB in bf16.
_LONG_ROW = 8192

Log = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RunContext(TaskContext):
    """A learner's parts; those that objectives need are `TaskContext`'s.

    Args:
        model_name: the base model as the user named it.
        base_adapter: the adapter that was merged into it, as the user named it; None for none.
        method: what is carried from task to task.
        objective: what a batch of the main stage teaches.
        options: how every task is trained.
        adapter: shape of the adapter.
        scorer: gives rewards to answers that have none; None where all have.
        rollouts: how answers are sampled where there are none.
        folder: holds what may be computed once and used again.
        progress: called with (stage, steps done, steps in all).
        tracker: gets what is measured while a stage is trained; None for nobody.
        said: lines that are logged once a run, and have been.
    """

    model_name: str
    base_adapter: str | None
    method: Method
    objective: Objective
    options: TrainingOptions
    adapter: AdapterOptions
    scorer: Scorer | None
    rollouts: RolloutOptions
    folder: Path
    progress: Progress
    tracker: Tracker | None = None
    said: set[str] = field(default_factory=set)

    def notes(self, rows: RowSet[Any]) -> tuple[str, ...]:
        """Return what the log should say of how rows are rendered, each line once a run."""
        found = self.objective.notes(rows, self)
        new = tuple(f"  {line}" for line in found if line not in self.said)
        self.said.update(found)
        return new

    def stages(self) -> list[tuple[Objective, StageOptions]]:
        """Return the stages of a task, in order, with the method's own learning rates."""
        found = [(self.objective, self.options.stage())]
        if self.options.sft_epochs > 0:
            # It has no use for β itself: methods that set something in a task's first stage read the run's here.
            found.insert(0, (make_objective("sft", self.options.beta), self.options.stage(supervised=True)))
        factor = self.method.rate_factor
        return [
            (objective, options.replace(learning_rate=factor * options.learning_rate)) for objective, options in found
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return what run.json tells about the set-up."""
        own = self.objective.settings()
        gamma = {"gamma": own.pop("gamma")} if "gamma" in own else {}
        adapter = {} if self.method.prompts is not None else self.adapter.model_dump()
        layout = {"processes": world(), "fsdp": self.policy.sharded}
        sampling = self.rollouts.model_dump(exclude_none=True)  # what is off was unknown to runs of earlier versions
        rewards = {} if self.scorer is None else {"reward": self.scorer.fingerprint, **sampling}
        return {
            "everalign": library_versions()["everalign"],
            "model": self.model_name,
            "base_adapter": self.base_adapter,
            "model_fingerprint": self.model_key,
            "template": template_fingerprint(self.tokenizer),
            "method": {"name": self.method.name, **gamma, **self.method.settings()},
            "objective": self.objective.name,
            "settings": {**self.options.model_dump(), **adapter, **own, **rewards},
            "seed": self.seed,
            "libraries": library_versions(),
            "machine": {**machine_facts(), **layout},
        }


def checked_objective(
    method: Method,
    objective: str,
    options: TrainingOptions,
    has_adapter: bool,
    weighting: WeightOptions,
    scorer: Scorer | None,
    rollouts: RolloutOptions,
    correction: CorrectionTaskOptions | None,
) -> tuple[Objective, TrainingOptions]:
    """Return the objective, and the options with its own defaults; `has_adapter` says whether one was asked for.

    Raises:
        InputError: the settings contradict each other.
    """
    method.check_fits(objective, options.reference, has_adapter)
    goal = make_objective(
        objective,
        options.beta,
        method.gamma,
        weighting=weighting,
        correction=CorrectionTaskOptions() if correction is None else correction,
    )
    if not reads(objective, "sft_epochs") and options.sft_epochs > 0:
        raise InputError(
            f"sft_epochs adds a stage before a preference objective; with objective {objective} set epochs"
        )
    check_weighting(objective, [name for name, value in weighting if value != getattr(WeightOptions(), name)])
    if scorer is not None and not reads(objective, "reward"):
        raise InputError(f"the objective {objective} learns from no rewards and would ignore reward: leave it out")
    if scorer is None and rollouts != RolloutOptions():
        raise InputError("sampled answers need rewards: give reward, or leave the sampling options out")
    options = options.resolved(objective, method.reference)
    if rollouts.rounds > 1 and goal.needs_reference and options.reference == "previous_task":
        raise InputError(
            "with several rounds the policy before the task is not available: set reference to stage_start"
        )
    if correction is not None and not reads(objective, "correction"):
        raise InputError(f"correction is for correctors, and the objective {objective} teaches none: leave it out")
    return goal, options


def make_context(
    model: str,
    base_adapter: str | None,
    method: Method,
    objective: str,
    options: TrainingOptions,
    adapter: AdapterOptions | None,
    weighting: WeightOptions,
    scorer: Scorer | None,
    rollouts: RolloutOptions,
    correction: CorrectionTaskOptions | None,
    seed: int,
    cache: Path,
    log: Log,
    progress: Progress,
    tracker: Tracker | None = None,
    fsdp: bool = False,
) -> RunContext:
    """Load the model and put a learner's parts together; arguments as in `Learner`.

    Raises:
        InputError: the settings contradict each other, or the model cannot be used.
    """
    goal, options = checked_objective(
        method, objective, options, adapter is not None, weighting, scorer, rollouts, correction
    )
    adapter = adapter or AdapterOptions()
    check_library(options.quantize)
    check_device_map(options.device_map, options.attention, base_adapter)
    prepare_process(options.deterministic)
    start()
    follow_with(None)
    fsdp = fsdp or asks_for_fsdp()
    if fsdp and world() == 1:
        raise InputError("fsdp shares the base model between processes, found one: give --processes", field="fsdp")
    if fsdp and options.quantize is not None:
        raise InputError(f"fsdp shares plain weights, and quantize is {options.quantize}: leave one of them out")
    device = training_device(log)
    options = options.replace(precision=resolve_precision(options.precision, device))
    log(f"the base model is computed in {options.precision} on {place_name(device)}")
    model, base_adapter = base_and_adapter(model, resolve_model(model), base_adapter)
    if base_adapter is not None:
        log(f"the base model is {model} with the adapter {base_adapter} merged into it")
    tokenizer = load_tokenizer(model, adapter=base_adapter)
    goal.bind(model, tokenizer)
    precision: Precision = options.precision  # type: ignore[assignment]  # resolved above
    # Sharded on the CPU, where all processes map the same file, and not on a GPU that may be too small for all of it.
    place = None if fsdp else device
    base, model_key = load_base(
        model,
        precision,
        adapter=base_adapter,
        device=place,
        quantize=options.quantize,
        device_map=options.device_map,
    )
    check_trainable(base, model)
    check_vocabulary(base, tokenizer, model)
    rehearse(base, adapter.module_names())
    prefix = 0 if method.prompts is None else method.prompts.tokens
    options = options.replace(max_length=readable_length(options.max_length, base, model, log, prefix))
    if options.attention == "sdpa" and device.type == "cuda" and options.max_length >= _LONG_ROW:
        size = options.max_length**2 * DTYPES[precision].itemsize / 2**30
        log(f"a row of {options.max_length} tokens takes a mask of {size:.1f} GiB with attention sdpa, none with flex")
    if options.attention == "flex":
        use_flex_attention(base, device)
    policy = Policy(base, adapter.rank, adapter.alpha, adapter.module_names(), seed, method.prompts, device)
    if fsdp:
        log(f"the layers of the base model are shared by {shard(policy, device)} processes (FSDP2)")
    why = policy.head.why_no_prefix_sharing
    sharing = "prompts are computed once for " + (f"each answer: {why}" if why else "all their answers")
    head = "" if policy.head.chunked else "; the model's head cannot be called separately: all logits are computed"
    for line in (sharing + head, *policy.notes):
        log(line)
    return RunContext(
        model_name=model,
        base_adapter=base_adapter,
        model_key=model_key,
        tokenizer=tokenizer,
        policy=policy,
        method=method,
        objective=goal,
        options=options,
        adapter=adapter,
        scorer=scorer,
        rollouts=rollouts,
        seed=seed,
        max_length=options.max_length,
        tokens_per_batch=options.tokens_per_batch,
        folder=cache,
        cache=ReferenceCache(cache),
        log=log,
        progress=progress,
        tracker=tracker,
    )
