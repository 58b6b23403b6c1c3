"""`learn --from-feedback`: what a gateway has stored becomes the next task of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everalign.cli.display import Display
from everalign.cli.feedback import check_is_there
from everalign.errors import GateRefusedError, InputError

if TYPE_CHECKING:
    from everalign.learning.recipe import Recipe
    from everalign.learning.run_data import RunData

_OPTIONS = ("minimum", "key_share", "agreement", "held_out")


@dataclass(frozen=True)
class FeedbackFlags:
    """Where feedback is, and how it becomes a task.

    Args:
        store: the store's address.
        options: of `NextTaskOptions`, as far as they are given.
    """

    store: str
    options: dict[str, Any]


def feedback_flags(flags: dict[str, Any]) -> FeedbackFlags | None:
    """Return what is said of feedback; None where nothing is to be learned from it."""
    given = {name: flags[name] for name in _OPTIONS if flags[name] is not None}
    if flags["from_feedback"] is None:
        for name in given:
            raise InputError(f"--{name.replace('_', '-')}: is for feedback; name its store with --from-feedback")
        return None
    if flags["task"]:
        raise InputError("--task: what is learned from feedback is the only task; leave --task out")
    return FeedbackFlags(flags["from_feedback"], given)


def learn_feedback(
    flags: FeedbackFlags, recipe: "Recipe", display: Display
) -> tuple["RunData", GateRefusedError | None]:
    """Learn feedback as the next task of the run that is there, or the first of a new one.

    Such a run starts from the corrector in service: its promoted version, or for a new run the model that is named.
    """
    from everalign.correction.files import FACTS_FILE, is_corrector
    from everalign.learning.known_recipe import completed, write_recipe
    from everalign.learning.learner import Learner
    from everalign.learning.promotion import alone_in
    from everalign.serving.loop import GATE, learn_from_feedback
    from everalign.serving.store import FeedbackStore
    from everalign.serving.task_options import NextTaskOptions

    if recipe.tasks:
        raise InputError("tasks: what is learned from feedback is the only task; leave them out of the recipe")
    check_is_there(flags.store)
    options = NextTaskOptions(**flags.options)
    # Unfinished tasks of the run's own wait for a command that names them, or says --resume alone.
    recipe = completed(recipe).model_copy(update={"tasks": None})
    output = Path(recipe.output or "")
    resume = (output / "run.json").exists()
    if not resume and recipe.output is not None and (output / FACTS_FILE).exists():
        raise InputError(
            f"--output {output}: is a corrector, and what is learned from feedback goes into a run: name another "
            f"folder, and begin with this corrector by --model {output}"
        )
    if recipe.objective is None and recipe.model is not None and is_corrector(recipe.model):
        recipe = recipe.model_copy(update={"objective": "correction"})
    arguments = {"gate": GATE, **recipe.learner_arguments(needs_tasks=False)}
    with alone_in(Path(arguments["output"])), FeedbackStore.open(flags.store) as store:
        learner = Learner(**arguments, resume=resume, announce=display.announce, progress=display.progress)
        write_recipe(learner.run.path, recipe)
        learned = learn_from_feedback(store, learner, options, display.announce)
    return learner.run, learned.refusal
