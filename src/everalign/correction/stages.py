"""Training's stages, each kept when it is finished, so that a killed training goes on where it was."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from everalign.data.groups import EncodedGroup
from everalign.data.layout import row_tokens
from everalign.modeling.policy import Policy
from everalign.modeling.whole_model import WholeModel
from everalign.training.finished import keep_finished, load_finished
from everalign.training.stage import StageOptions, StageResult, train_rows
from everalign.training.teaching import RewardWeightedObjective


def train_stage(
    model: Policy | WholeModel,
    rows: Sequence[EncodedGroup],
    options: StageOptions,
    folder: Path,
    *,
    seed: int,
    announce: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> tuple[StageResult, bool]:
    """Train `model` in place, or load what an earlier call had finished.

    Args:
        model: a policy, whose adapter is trained, or a whole model.
        rows: prompts, each with the one text that is to follow it, and its weight.
        options: how.
        folder: holds checkpoints and then the finished stage.
        seed: seeds the order of the rows.
        announce: called with a line where activations are computed again because memory is short.
        progress: called with (steps done, steps in all).

    Returns:
        What the stage did, and whether an earlier call had finished it.

    Raises:
        EveralignError: the loss or the weights became NaN or infinite.
    """
    finished = load_finished(model, folder)
    if finished is not None:
        return StageResult(**finished), True
    shared = model.head.shared
    result = train_rows(
        model,
        RewardWeightedObjective(),
        rows,
        [row_tokens(row, shared) for row in rows],
        options,
        folder / "checkpoints",
        seed=seed,
        shared=shared,
        progress=progress,
        announce=announce,
    )
    keep_finished(model, asdict(result), folder, "training")
    return result, False
