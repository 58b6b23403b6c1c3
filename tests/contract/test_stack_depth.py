"""From the command line to a loss are few of the package's own frames: a reader follows a training step at one go."""

import sys
from pathlib import Path

import everalign
from cli_for_tests import learn, make_workspace, run, task
from everalign.objectives import fpo_loss
from everalign.training.objective_classes import FpoObjective

PACKAGE = Path(everalign.__file__).parent
# Of these, from `train_task` to the loss: train_task, train_stage, training_step, compute_loss, loss, fpo_loss.
TRAINING, DEEPEST = 6, 10


def own_frames() -> list[str]:
    """Functions of the package on the stack, outermost first."""
    frame, found = sys._getframe(1), []
    while frame is not None:
        if Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            found.append(f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)}:{frame.f_code.co_name}")
        frame = frame.f_back
    return found[::-1]


def test_a_loss_is_few_frames_below_the_command_line(tmp_path, monkeypatch, capsys):
    make_workspace(tmp_path)
    monkeypatch.chdir(tmp_path)
    stacks = []

    def watched(*args, **kwargs):
        stacks.append(own_frames())
        return fpo_loss(*args, **kwargs)

    monkeypatch.setattr(FpoObjective, "focused", staticmethod(watched))
    code, _, err = run(capsys, *learn(*task("warm"), "--objective", "fpo"))
    assert code == 0, err
    trained = [stack for stack in stacks if any(frame.endswith(":compute_loss") for frame in stack)]
    assert trained
    deepest = [*max(trained, key=len), "objectives/preference.py:fpo_loss"]
    start = next(i for i, frame in enumerate(deepest) if frame.endswith(":train_task"))
    assert len(deepest) - start <= TRAINING, "\n".join(deepest)
    assert len(deepest) <= DEEPEST, "\n".join(deepest)
