"""The run context: model, tokenizer, method, objective and options, put together once for all tasks."""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from everalign.correction.corrector_files import chosen_template
from everalign.correction.tokenization import CorrectionEncoder, encode_held_out
from everalign.data.chat_tokens import template_fingerprint
from everalign.data.messages import ChatPrompt
from everalign.data.readers import load_corrections, load_preferences
from everalign.data.records import Preference
from everalign.data.rows import RowSet
from everalign.data.template_notes import template_notes
from everalign.data.tokenization import TokenizedPairs, tokenize_pairs
from everalign.errors import InputError
from everalign.evaluation.scorers import Scorer
from everalign.learning.options import AdapterOptions, CorrectionTaskOptions, RolloutOptions, TrainingOptions
from everalign.methods import Method
from everalign.modeling.base_adapter import base_and_adapter
from everalign.modeling.flex_attention import use_flex_attention
from everalign.modeling.loading import (
    check_trainable,
    check_vocabulary,
    load_model,
    load_tokenizer,
    model_fingerprint,
    readable_length,
    resolve_model,
    resolve_precision,
)
from everalign.modeling.policy import Policy
from everalign.modeling.rehearsal import rehearse
from everalign.modeling.runtime import place_name, prepare_process, training_device
from everalign.training.objectives import (
    DEFAULT_GAMMA,
    SCORED_OBJECTIVES,
    Objective,
    SupervisedObjective,
    make_objective,
)
from everalign.training.options import StageOptions, WeightOptions
from everalign.training.reference import ReferenceCache

_LIBRARIES = ("everalign", "torch", "transformers", "peft", "accelerate", "safetensors")


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that results depend on."""
    return {name: version(name) for name in _LIBRARIES}


def machine_facts() -> dict[str, Any]:
    """Return processor, core count and platform."""
    return {"cpu": _cpu_name(), "cores": os.cpu_count() or 1, "platform": platform.platform()}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


Log = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RunContext:
    """A learner's parts.

    Args:
        model_name: the base model as the user named it.
        base_adapter: the adapter that was merged into it, as the user named it; None for none.
        model_key: fingerprint of its weights, with that adapter.
        tokenizer: the model's.
        policy: what learns.
        method: what is carried from task to task.
        objective: what a batch of the main stage teaches.
        options: how every task is trained.
        adapter: shape of the adapter.
        weighting: how rewards become weights.
        scorer: gives rewards to answers that have none; None where all have.
        rollouts: how answers are sampled where there are none.
        correction: how corrections are learned.
        encoder: of the template they are learned behind; None where the objective is another than `correction`.
        seed: seeds everything random.
        folder: of what may be computed once and used again.
        cache: reference log-probabilities.
        log: called with one line for each thing that happens.
        progress: called with (stage, steps done, steps in all).
        said: lines that are said once a run, and have been.
    """

    model_name: str
    base_adapter: str | None
    model_key: str
    tokenizer: Any
    policy: Policy
    method: Method
    objective: Objective
    options: TrainingOptions
    adapter: AdapterOptions
    weighting: WeightOptions
    scorer: Scorer | None
    rollouts: RolloutOptions
    correction: CorrectionTaskOptions
    encoder: CorrectionEncoder | None
    seed: int
    folder: Path
    cache: ReferenceCache
    log: Log
    progress: Progress
    said: set[str] = field(default_factory=set)

    def encode(self, rows: Sequence[Preference]) -> TokenizedPairs:
        """Return preferences as tokens, cut to the options' length."""
        return tokenize_pairs(rows, self.tokenizer, self.options.max_length)

    def notes(self, rows: RowSet[Any]) -> tuple[str, ...]:
        """Return what is to be said of how rows are rendered, each line once a run."""
        if self.encoder is None:
            found = template_notes(self.tokenizer, rows)
        elif any(isinstance(row.question, ChatPrompt) for row in rows):
            found = ("a corrector reads the text of a question: tools and template variables are not learned",)
        else:
            found = ()
        new = tuple(f"  {line}" for line in found if line not in self.said)
        self.said.update(found)
        return new

    def encode_held_out(self, rows: RowSet[Any]) -> TokenizedPairs:
        """Return held-out rows as tokens: preferences, or corrections behind the corrector's template."""
        if self.encoder is None:
            return self.encode(rows)
        return encode_held_out(rows, self.encoder, self.options.max_length, self.log)

    def read_held_out(self, path: Path) -> RowSet[Any]:
        """Read held-out rows of the kind that the objective is judged on."""
        return load_preferences(path) if self.encoder is None else load_corrections(path)

    def stages(self) -> list[tuple[Objective, StageOptions]]:
        """Return the stages of a task, in order."""
        main = (self.objective, self.options.preference_stage())
        if self.options.sft_epochs == 0:
            return [main]
        return [(SupervisedObjective(), self.options.sft_stage()), main]

    def to_dict(self) -> dict[str, Any]:
        """Return what run.json tells about the set-up."""
        exponent = DEFAULT_GAMMA if self.method.gamma is None else self.method.gamma
        gamma = {"gamma": exponent} if self.objective.name == "fpo" else {}
        name = self.objective.name
        weighting = self.weighting.settings(name) if name in SCORED_OBJECTIVES else {}
        if self.scorer is not None:
            weighting |= {"reward": self.scorer.fingerprint, **self.rollouts.model_dump()}
        corrector = {} if self.encoder is None else _reads(self.encoder, self.correction)
        return {
            "everalign": library_versions()["everalign"],
            "model": self.model_name,
            "base_adapter": self.base_adapter,
            "model_fingerprint": self.model_key,
            "template": template_fingerprint(self.tokenizer),
            "method": {"name": self.method.name, **gamma, **self.method.settings()},
            "objective": self.objective.name,
            "settings": {**self.options.model_dump(), **self.adapter.model_dump(), **weighting, **corrector},
            "seed": self.seed,
            "libraries": library_versions(),
            "machine": {**machine_facts(), "threads": torch.get_num_threads()},
        }


def make_context(
    model: str,
    base_adapter: str | None,
    method: Method,
    objective: str,
    options: TrainingOptions,
    adapter: AdapterOptions,
    weighting: WeightOptions,
    scorer: Scorer | None,
    rollouts: RolloutOptions,
    correction: CorrectionTaskOptions | None,
    seed: int,
    cache: Path,
    log: Log,
    progress: Progress,
) -> RunContext:
    """Load the model and put a learner's parts together; arguments as in `Learner`.

    Raises:
        InputError: the settings contradict each other, or the model cannot be used.
    """
    if objective in ("sft", "correction", *SCORED_OBJECTIVES) and options.sft_epochs > 0:
        raise InputError(
            f"sft_epochs adds a stage before a preference objective; with objective {objective} set epochs"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a learner runs in one process, found WORLD_SIZE above 1: start it without accelerate launch")
    weighting.check_for(objective)
    _check_rollouts(objective, options, scorer, rollouts)
    if correction is not None and objective != "correction":
        raise InputError(f"correction is for correctors, and the objective {objective} teaches none: leave it out")
    goal = make_objective(objective, options.beta, method.gamma)
    prepare_process()
    device = training_device(log)
    options = options.replace(precision=resolve_precision(options.precision, device))
    log(f"the base model is computed in {options.precision} on {place_name(device)}")
    model, base_adapter = base_and_adapter(model, resolve_model(model), base_adapter)
    if base_adapter is not None:
        log(f"the base model is {model} with the adapter {base_adapter} merged into it")
    tokenizer = load_tokenizer(model, adapter=base_adapter)
    correction = correction or CorrectionTaskOptions()
    encoder = None
    if objective == "correction":
        encoder = CorrectionEncoder(tokenizer, *chosen_template(model, correction.template, correction.words))
    base = load_model(model, options.precision, adapter=base_adapter, device=device)  # type: ignore[arg-type]
    check_trainable(base, model)
    check_vocabulary(base, tokenizer, model)
    rehearse(base, adapter.module_names())
    options = options.replace(max_length=readable_length(options.max_length, base, model, log))
    model_key = model_fingerprint(base)
    if options.attention == "flex":
        use_flex_attention(base)
    policy = Policy(base, adapter.rank, adapter.alpha, adapter.module_names(), seed)
    for line in (_path(policy), *policy.notes):
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
        weighting=weighting,
        scorer=scorer,
        rollouts=rollouts,
        correction=correction,
        encoder=encoder,
        seed=seed,
        folder=cache,
        cache=ReferenceCache(cache),
        log=log,
        progress=progress,
    )


def _reads(encoder: CorrectionEncoder, options: CorrectionTaskOptions) -> dict[str, Any]:
    """What run.json tells of a corrector: what it reads, whether it was named or not."""
    objectives = ",".join(encoder.objectives)
    about = {"template": encoder.template.id, "objectives": objectives, "encoding": encoder.fingerprint}
    return {**about, "identity": options.identity}


def _check_rollouts(objective: str, options: TrainingOptions, scorer: Scorer | None, rollouts: RolloutOptions) -> None:
    if scorer is not None and objective not in SCORED_OBJECTIVES:
        raise InputError(f"the objective {objective} learns from no rewards and would ignore reward: leave it out")
    if scorer is None and rollouts != RolloutOptions():
        raise InputError("sampled answers need rewards: give reward, or leave the sampling options out")
    if rollouts.rounds > 1 and objective == "snkl" and options.reference == "previous_task":
        raise InputError("with several rounds the policy before the task is not at hand: set reference to stage_start")


def _path(policy: Policy) -> str:
    head = "" if policy.head.chunked else "; the model's head cannot be called apart: all logits are computed"
    if policy.head.shared:
        return f"prompts are computed once for all their answers{head}"
    return f"prompts are computed once for each answer: {policy.head.why_no_prefix_sharing}{head}"
