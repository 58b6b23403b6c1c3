"""The table of methods: what each is called, where it lives and which arguments it takes. Importing it is cheap.

The command line checks a method's name and arguments by it before torch is loaded.
"""

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from everalign.errors import InputError


class Entry(NamedTuple):
    """One method.

    Args:
        home: its module in `everalign.methods`.
        kind: its class there.
        takes: names of its arguments.
        regime: how it learns its tasks (see `Method`).
        labelled: whether it keeps a policy for each label.
    """

    home: str
    kind: str
    takes: tuple[str, ...] = ()
    regime: str = "sequential"
    labelled: bool = False


_BUFFER = ("replay", "capacity")
_CONSOLIDATION = ("gamma", "energy", "keep", "rank_cap", "average")
_PROJECTION = ("strength", *_BUFFER, "memory_rows", "refresh")

ENTRIES: Mapping[str, Entry] = {
    "lifealign": Entry("lifealign", "LifeAlign", (*_CONSOLIDATION, "space", "step", *_BUFFER, "anchors", "review")),
    "seqft": Entry("baselines", "SequentialFineTuning"),
    "er": Entry("baselines", "ExperienceReplay", (*_BUFFER, "anchors", "review")),
    "mtl": Entry("baselines", "MultiTask", regime="joint"),
    "stl": Entry("baselines", "SingleTask", regime="separate"),
    "gem": Entry("gradient_projection", "GradientEpisodicMemory", _PROJECTION),
    "ewc": Entry("ewc", "ElasticWeightConsolidation", ("strength", "online", "decay", "fisher_rows")),
    "olora": Entry("olora", "OrthogonalLora", ("strength", "shrinkage")),
    "l2p": Entry("l2p", "LearningToPrompt", ("pool_size", "prompt_length", "top_prompts", "strength", "prompt_rate")),
    "cppo": Entry("cppo", "ContinualPpo", ("strength", "bound", "lowest", "highest")),
    "copr": Entry("copr", "OptimalPolicyRegularization", ("rate", *_BUFFER)),
    "ogpsa": Entry("gradient_projection", "OrthogonalGradients", _PROJECTION),
    "slao": Entry("slao", "MergeBeforeForget"),
    "gdumb": Entry("baselines", "BufferOnly", _BUFFER),
    "lifealign-rf": Entry("lifealign_rf", "RehearsalFreeLifeAlign", (*_CONSOLIDATION, "strength", "own_answers")),
    "experts": Entry("experts", "LabelledExperts", labelled=True),
}

DEFAULT = "lifealign"
SPACES = ("none", "product", "factors")
RANK_CAP = 64


def method_file(name: str) -> Path | None:
    """Returns the file of a method named `FILE.py:CLASS`, relative to the working directory; None of other names."""
    file, colon, _ = name.rpartition(":")
    return Path(file) if colon and file.endswith(".py") else None


def check_method(name: str, arguments: Collection[str]) -> Entry | None:
    """Refuses an unknown method, and arguments that it would ignore.

    Returns:
        The method's entry; None of a method in a file, of which only the file is looked at.
    """
    file = method_file(name)
    if file is not None:
        if not file.is_file():
            raise InputError(f"{name}: {file}: no such file in {Path.cwd()}")
        return None
    if name not in ENTRIES:
        near = difflib.get_close_matches(name, ENTRIES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InputError(f"unknown method {name!r}{hint}: choose one of {', '.join(ENTRIES)}, or name FILE.py:CLASS")
    check_taken(name, arguments, ENTRIES[name].takes)
    return ENTRIES[name]


def check_taken(name: str, arguments: Collection[str], takes: Collection[str]) -> None:
    """Refuses an argument that a method does not take."""
    for argument in arguments:
        if argument not in takes:
            raise InputError(f"{argument} means nothing to the method {name!r}, which would ignore it: leave it out")


def check_space(space: str, given: Mapping[str, Any]) -> None:
    """Refuses what is no space, and arguments that it would ignore; values of None are not given."""
    if space not in SPACES:
        raise InputError(f"space is 'none', 'product' or 'factors', found {space!r}", field="space")
    asked = [name for name in ("energy", "keep", "rank_cap") if given.get(name) is not None]
    # 0 and `fixed` ask for nothing.
    asked += [name for name, default in (("average", 0), ("step", "fixed")) if given.get(name) not in (None, default)]
    if space == "none" and asked:
        problem = f"{asked[0]} is for consolidated updates, and without a space none is: add space 'product'"
        raise InputError(problem, field=asked[0])
    # Runs have the default on record in this space too.
    if space == "factors" and given.get("rank_cap") not in (None, RANK_CAP):
        problem = "rank_cap means nothing in the space 'factors', where the adapter keeps its rank"
        raise InputError(problem, field="rank_cap")
    if space == "factors" and "step" in asked:
        raise InputError("a fitted step is one of the space 'product': choose that, or leave step out", field="step")
