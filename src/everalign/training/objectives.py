"""The table of objectives: what each is called, where it lives, which rows it learns from and which options it reads.

A new objective is a file with a subclass of `everalign.training.base_objective.Objective`, and a line here. Importing
the table loads nothing heavy; an objective's module is loaded when the objective is first made.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from everalign.errors import InputError
from everalign.training.options import VAR_TEMPERATURE, ObjectiveOptions, WeightOptions

if TYPE_CHECKING:
    from everalign.training.base_objective import Objective


@dataclass(frozen=True)
class Entry:
    """One objective.

    Args:
        home: its class, as `module:name`.
        rows: what it learns from; `judged` are preferences or scored rows.
        reads: options that mean something to it and not to all others: `beta`, `gamma`, `reference`, `sft_epochs`,
            `reward` (with the sampling options), `correction`, and `weighting` with those of `WeightOptions`.
        why: why it ignores `beta` and `reference`, where it does.
        beta, reference, temperature: their values where none are given.
    """

    home: str
    rows: Literal["preferences", "scored", "judged", "corrections"]
    reads: frozenset[str] = frozenset()
    why: str = "has no margin"
    beta: float = 0.1
    reference: str = "stage_start"
    temperature: float = 1.0


# Within a prompt snkl is its own normaliser; what it takes from the weighting is how sharp the rewards are.
_SHARPNESS = frozenset({"temperature", "target_ess", "scale_rewards", "drop_constant"})
_MARGIN = frozenset({"beta", "reference", "sft_epochs"})
_CLASSES = "everalign.training.objective_classes"

OBJECTIVES: dict[str, Entry] = {
    "sft": Entry(f"{_CLASSES}:SupervisedObjective", "preferences"),
    "dpo": Entry(f"{_CLASSES}:DpoObjective", "preferences", _MARGIN),
    "fpo": Entry(f"{_CLASSES}:FpoObjective", "preferences", _MARGIN | {"gamma"}),
    "fpo-normalised": Entry(f"{_CLASSES}:NormalisedFpoObjective", "preferences", _MARGIN | {"gamma"}),
    "focalpo": Entry(f"{_CLASSES}:FocalPoObjective", "preferences", _MARGIN | {"gamma"}),
    "hypo": Entry(f"{_CLASSES}:HybridObjective", "preferences", _MARGIN, reference="base"),
    "hypo-ln": Entry(f"{_CLASSES}:TokenHybridObjective", "preferences", _MARGIN, beta=5.0, reference="base"),
    "dpo+hypo-ln": Entry(f"{_CLASSES}:RankedDpoObjective", "preferences", _MARGIN, reference="base"),
    "var": Entry(
        f"{_CLASSES}:VarObjective",
        "scored",
        frozenset({"reward", "weighting", *WeightOptions.model_fields}),
        temperature=VAR_TEMPERATURE,
    ),
    "snkl": Entry(
        f"{_CLASSES}:SelfNormalisedObjective",
        "judged",
        frozenset({"reference", "reward", "weighting"}) | _SHARPNESS,
        "takes log-ratios as they are",
    ),
    "correction": Entry("everalign.correction.objective:CorrectionObjective", "corrections", frozenset({"correction"})),
}


def check_objective(name: str) -> None:
    """Refuses an objective that is not in the table."""
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(name, OBJECTIVES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InputError(f"unknown objective {name!r}{hint}: choose one of {', '.join(OBJECTIVES)}", field="objective")


def reads(objective: str | None, option: str) -> bool:
    """Whether an objective reads an option: for None the default, `fpo`; unknown objectives read all options."""
    entry = OBJECTIVES.get(objective or "fpo")
    return entry is None or option in entry.reads


def readers_of(option: str) -> tuple[str, ...]:
    """Return the objectives that read an option."""
    return tuple(name for name, entry in OBJECTIVES.items() if option in entry.reads)


def check_weighting(objective: str | None, given: Iterable[str]) -> None:
    """Refuse weighting options, by their names, that the objective would ignore."""
    for name in given:
        if not reads(objective, "weighting"):
            which = " and ".join(readers_of("weighting"))
            raise InputError(f"{name} is for rewards, which only {which} learn from: leave it out", field=name)
        if not reads(objective, name):
            what = f"the objective {objective} compares the completions of a prompt and would ignore {name}"
            raise InputError(f"{what}: leave it out", field=name)


def weighting_settings(objective: str | None, weighting: WeightOptions) -> dict[str, Any]:
    """Return the values that mean something to an objective."""
    entry = OBJECTIVES.get(objective or "fpo")
    whole = weighting if entry is None else weighting.resolved(entry.temperature)
    return {name: value for name, value in whole.settings().items() if reads(objective, name)}


def make_objective(name: str, beta: float | None = None, gamma: float | None = None, **options: Any) -> "Objective":
    """Build an objective by its name on the command line.

    Args:
        name: a key of `OBJECTIVES`.
        beta: inverse temperature of the implicit reward, for those that have one; None for the objective's own.
        gamma: focusing exponent of those that have one; None for the objective's own, anything else refuses it.
        options: further fields of `ObjectiveOptions`.
    """
    check_objective(name)
    if gamma is not None and "gamma" not in OBJECTIVES[name].reads:
        raise InputError(
            f"gamma is the focusing exponent of {', '.join(readers_of('gamma'))}; the objective {name!r} would ignore "
            "it: leave it out",
            field="gamma",
        )
    module, _, attribute = OBJECTIVES[name].home.partition(":")
    beta = OBJECTIVES[name].beta if beta is None else beta
    options["weighting"] = (options.get("weighting") or WeightOptions()).resolved(OBJECTIVES[name].temperature)
    objective: Objective = getattr(import_module(module), attribute)(name, ObjectiveOptions(beta, gamma, **options))
    return objective
