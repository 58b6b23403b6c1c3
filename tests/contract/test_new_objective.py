"""An objective is one file and one line of the table: a new one is learned without a change anywhere else."""

import pytest
import torch

from everalign.errors import InputError
from everalign.training.base_objective import Objective
from everalign.training.objectives import OBJECTIVES, Entry, make_objective
from learner_for_tests import held_out, make_learner, save_model, task_rows


class HingeObjective(Objective):
    """A hinge on the difference of log-likelihoods per token (SLiC)."""

    def loss(self, model, batch, count):
        chosen, rejected = (model(batch) / batch["lengths"]).view(-1, 2).unbind(1)
        losses = torch.relu(1.0 - (chosen - rejected)) * batch["weight"]
        return losses.sum() / count, {"hinge": losses.detach()}


def test_a_registered_objective_is_learned(tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "hinge", Entry(f"{__name__}:HingeObjective", "preferences"))
    learner = make_learner(save_model(tmp_path / "model"), tmp_path / "run", objective="hinge")
    scores = learner.learn(task_rows("warm", 20), "warm", held_out("warm"))
    (version,) = learner.run.versions
    (stage,) = version.manifest.stages
    assert (stage.stage, stage.rows, stage.reference) == ("hinge", 20, None)
    assert scores["warm"].accuracy == 1.0
    assert learner.run.facts.objective == "hinge"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_line_of_the_table_is_an_objective(name):
    objective = make_objective(name)
    assert isinstance(objective, Objective)
    assert objective.name == name
    assert objective.needs_reference == ("reference" in OBJECTIVES[name].reads)


def test_an_unknown_objective_is_refused_with_the_known_ones():
    known = r"sft, dpo, fpo, fpo-normalised, focalpo, hypo, hypo-ln, dpo\+hypo-ln, var, snkl, correction"
    with pytest.raises(InputError, match=f"choose one of {known}") as caught:
        make_objective("ppo")
    assert caught.value.field == "objective"
