"""Contenders of a bench: a method with its arguments, what differs from the shared settings, and what is tuned."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import field_validator

from everalign.errors import InputError, located
from everalign.learning.options import DEFAULT_OBJECTIVE, PAPER_ADAPTER, TrainingOptions
from everalign.learning.recipe import AdapterKeys, Keys, MethodKeys, Text, TrainingKeys, WeightKeys, name_alone
from everalign.training.objectives import OBJECTIVES, reads

Choice = Mapping[str, Any]
"""Values of the options that a contender is tuned on; of one trial, or those that were chosen."""

NO_METHOD = "none"
"""The method of a contender that learns nothing: the base model as it is, or with an instruction."""

OF_MARGINS = ("reference", "beta", "sft_epochs")
"""Options of training that some objectives have no use for."""

SAME_FOR_ALL = {
    "test_limit": "test_limit stands outside, beside seeds: it is the same for all",
    "max_length": "max_length stands in the shared training: held-out pairs are cut to it too, so it is the same for "
    "all",
}


class Contender(Keys):
    """A method with its arguments, its objective, and what differs from the shared settings.

    With the method `none` nothing is learned: the base model is scored with a system message, `system`, the same for
    all tasks or one for each.

    With `scored` it learns from answers with rewards in place of pairs: from the file that every task has under this
    name.
    """

    method: MethodKeys
    system: Text | dict[str, Text] | None = None
    scored: Text | None = None
    objective: Text | None = None
    preset: Text | None = None
    training: TrainingKeys | None = None
    adapter: AdapterKeys | None = None
    weighting: WeightKeys | None = None
    tune: dict[str, Any] | None = None

    _name_alone = field_validator("method", mode="before")(name_alone)

    @field_validator("training")
    @classmethod
    def _differs_in_learning_alone(cls, training: Any) -> Any:
        for option, why in SAME_FOR_ALL.items():
            if getattr(training, option, None) is not None:
                raise InputError(why, field=option)
        return training

    @field_validator("tune")
    @classmethod
    def _lists(cls, tune: dict[str, Any] | None) -> dict[str, Any] | None:
        for option, values in (tune or {}).items():
            section_of(option)
            if not isinstance(values, list) or not values:
                raise InputError(f"{option} needs a list of values to try, found {values!r}", field=option)
            if any(values.count(value) > 1 for value in values):
                raise InputError(f"{option} names a value twice: {values}", field=option)
        return tune

    @property
    def learns(self) -> bool:
        """Whether there is anything to learn."""
        return str(self.method.name) != NO_METHOD

    def check_instruction(self, tasks: Iterable[str]) -> None:
        """Refuses what a contender that learns nothing would ignore, and an instruction of one that learns."""
        tried = (self.tune or {}).get("system", [])
        given = [*([] if self.system is None else [self.system]), *tried]
        if self.learns:
            if given:
                raise InputError(
                    f"system: is the instruction of a contender of the method {NO_METHOD}, which learns nothing; one "
                    "that all contenders get stands in the task"
                )
            return
        whole = self.model_dump(exclude_none=True, exclude={"system"})
        whole["tune"] = [name for name in whole.get("tune", {}) if name != "system"]
        whole["method"].pop("name")
        ignored = next((key for key, value in whole.items() if value), None)
        if ignored is not None:
            raise InputError(f"{ignored}: the method {NO_METHOD} learns nothing and would ignore this: leave it out")
        for texts in given:
            if isinstance(texts, str) and texts:
                continue
            if not isinstance(texts, dict) or not all(isinstance(text, str) and text for text in texts.values()):
                raise InputError(f"system: must be a text, or a mapping from tasks to texts, found {texts!r}")
            if unknown := next((task for task in texts if task not in tasks), None):
                raise InputError(f"system: {unknown_name('task', unknown, list(tasks))}")

    def check_options(self, shared: Any) -> None:
        """Refuses options that would be ignored, rows that the objective cannot learn from, and a length of its own.

        Args:
            shared: what all contenders train with.
        """
        for option in self.tune or {}:
            section = section_of(option)
            if getattr(getattr(self, section) if section else self, option, None) is not None:
                where = ".".join(filter(None, (section, option)))
                raise InputError(f"{where}: is given here and tuned under `tune`: leave one of them out", field=option)
        tried = [("tune.objective", objective) for objective in (self.tune or {}).get("objective", [])]
        given = [("objective", self.objective or DEFAULT_OBJECTIVE)] if not tried else []
        for key, objective in [*given, *tried]:
            entry = OBJECTIVES.get(objective) if isinstance(objective, str) else None
            if entry is None or not self.learns:
                continue
            if entry.rows == "corrections":
                raise InputError(f"{key}: a bench learns from preferences or scored rows, and {objective} cannot")
            if entry.rows == "scored" and self.scored is None:
                raise InputError(
                    f"{key}: {objective} learns from answers with rewards: name the tasks' files with `scored`"
                )
            if entry.rows == "preferences" and self.scored is not None:
                raise InputError(f"scored: {objective} learns from pairs and would ignore the rewards: leave it out")
        if self.preset is None:
            return
        with located("preset"):
            own = TrainingOptions.preset(self.preset).max_length
        if own != TrainingOptions().max_length and getattr(shared, "max_length", None) is None:
            raise InputError(
                f"preset: {self.preset} would cut the held-out pairs of this contender alone to {own} tokens: name "
                "max_length in the shared training"
            )

    def replaced(self, training: Any, adapter: Any) -> list[str]:
        """Returns what the shared settings replace of the preset, such as `epochs 1.0 (preset: 3.0)`."""
        if self.preset is None:
            return []
        pairs: list[tuple[Any, Any, Any]] = [(TrainingOptions.preset(self.preset), training, self.training)]
        if self.preset == "paper":
            pairs.append((PAPER_ADAPTER, adapter, self.adapter))
        found = []
        for preset, shared, mine in pairs:
            for option, value in given(shared).items():
                own = option in given(mine) or option in (self.tune or {})
                read = option not in OF_MARGINS or reads(self.objective, option)
                if option in preset.model_fields_set and read and not own and value != getattr(preset, option):
                    found.append(f"{option} {value} (preset: {getattr(preset, option)})")
        return found

    @property
    def trials(self) -> list[Choice]:
        """Every combination of the values to try; one empty choice where nothing is tuned."""
        grid = self.tune or {}
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def given(keys: Any) -> dict[str, Any]:
    """Returns what a section of a recipe names."""
    return {} if keys is None else keys.model_dump(exclude_none=True)


def section_of(option: str) -> str:
    """Where an option that is tuned belongs: a section of a learner's recipe, or nothing for one beside them."""
    homes = {"training": TrainingKeys, "adapter": AdapterKeys, "weighting": WeightKeys, "method": MethodKeys}
    known = {name: section for section, keys in homes.items() for name in keys.model_fields}
    del known["name"]
    if option in ("objective", "system"):
        return ""
    if option in SAME_FOR_ALL:
        raise InputError(SAME_FOR_ALL[option], field=option)
    if option not in known:
        raise InputError(unknown_name("option", option, ["objective", "system", *known], listed=False), field=option)
    return known[option]


def unknown_name(what: str, name: str, known: Sequence[str], listed: bool = True) -> str:
    """Says that there is no such name, and which is near or which there are."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}" if listed else "see learn --help"
    return f"unknown {what} {name!r}: {hint}"
