"""Options: the paper's values, and every bad value refused by name."""

import math

import pytest

from everalign import AdapterOptions, TrainingOptions
from everalign.errors import InputError
from everalign.learning.options import PAPER_ADAPTER

NOT_NUMBERS = (math.nan, math.inf, -math.inf, True, None, "1", [1])
BAD_TRAINING = {
    "reference": ("Base", "none", ""),
    "learning_rate": (0, -1e-4, *NOT_NUMBERS),
    "epochs": (0.0, -1, *NOT_NUMBERS),
    "sft_epochs": (-0.5, *NOT_NUMBERS),
    "sft_learning_rate": (0.0, -1e-4, *NOT_NUMBERS),
    "beta": (0.0, -0.1, *(value for value in NOT_NUMBERS if value is not None)),
    "batch_size": (0, -1, 1.5, 16.0, *NOT_NUMBERS),
    "tokens_per_batch": (0, -1, 1.5, *NOT_NUMBERS),
    "max_length": (0, 7, 64.0, *NOT_NUMBERS),
    "checkpointing": ("yes", True, None),
    "precision": ("fp16", "float32", None),
    "quantize": ("int4", "NF4", True, 4),
    "device_map": ("", 0, True),
    "attention": ("flash", "flex_attention", None),
    "warmup": (-0.1, 1, 1.5, 100, *NOT_NUMBERS),
    "scheduler": ("Cosine", "constant", "reduce_lr_on_plateau", None),
    "max_grad_norm": (-1.0, *NOT_NUMBERS),
    "logging_steps": (0, -1, 2.5, *NOT_NUMBERS),
    "checkpoint_steps": (-1, 0.5, *NOT_NUMBERS),
    "deterministic": ("yes", 1, None),
    "test_limit": (-1, 0.5, *NOT_NUMBERS),
}
BAD_ADAPTER = {
    "rank": (0, -1, 8.0, *NOT_NUMBERS),
    "alpha": (0.0, -16, *NOT_NUMBERS),
    "targets": ("", " ", "q_proj,,v_proj", "q_proj,", ["q_proj"], None),
}


def cases(table):
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), cases(BAD_TRAINING))
def test_bad_training_options_are_refused_by_name(name, value):
    with pytest.raises(InputError, match=rf"^{name} must be .*, found "):
        TrainingOptions(**{name: value})


@pytest.mark.parametrize(("name", "value"), cases(BAD_ADAPTER))
def test_bad_adapter_options_are_refused_by_name(name, value):
    with pytest.raises(InputError, match=rf"^{name} must be .*, found "):
        AdapterOptions(**{name: value})


def test_every_option_has_bad_values_here():
    assert set(BAD_TRAINING) == set(TrainingOptions.model_fields)
    assert set(BAD_ADAPTER) == set(AdapterOptions.model_fields)


def test_the_smallest_values_are_taken():
    least = TrainingOptions(
        sft_epochs=0, warmup=0, max_grad_norm=0, checkpoint_steps=0, test_limit=0, max_length=8, logging_steps=1
    )
    assert least.stage().warmup == 0
    assert AdapterOptions(rank=1, alpha=0.5).alpha == 0.5


def test_the_paper_preset_has_the_scripts_values():
    paper = TrainingOptions.preset("paper")
    assert paper.model_dump() == TrainingOptions().model_dump() | {
        "reference": "base",
        "beta": 0.1,
        "learning_rate": 5e-6,
        "epochs": 3.0,
        "sft_epochs": 3.0,
        "sft_learning_rate": 1e-4,
        "max_length": 2048,
    }
    assert (paper.beta, paper.scheduler, paper.warmup) == (0.1, "cosine", 0.1)
    assert PAPER_ADAPTER.model_dump() == {"rank": 8, "alpha": 16.0, "targets": "q_proj,v_proj"}
    assert PAPER_ADAPTER.module_names() == ["q_proj", "v_proj"]


def test_the_paper_preset_makes_two_stages():
    paper = TrainingOptions.preset("paper", batch_size=8, tokens_per_batch=120, checkpoint_steps=7, max_grad_norm=0.5)
    sft, preference = paper.stage(supervised=True), paper.stage()
    assert (sft.learning_rate, sft.epochs) == (1e-4, 3.0)
    assert (preference.learning_rate, preference.epochs) == (5e-6, 3.0)
    for stage in (sft, preference):
        assert (stage.batch_size, stage.tokens_per_batch, stage.warmup) == (8, 120, 0.1)
        assert (stage.scheduler, stage.max_grad_norm) == ("cosine", 0.5)
        assert (stage.logging_steps, stage.checkpoint_steps) == (5, 7)


def test_presets_take_changes_and_refuse_unknown_names():
    assert TrainingOptions.preset("default") == TrainingOptions()
    assert TrainingOptions.preset("paper", beta=0.5).beta == 0.5
    with pytest.raises(InputError, match="unknown preset 'Paper': choose one of default, paper"):
        TrainingOptions.preset("Paper")
    with pytest.raises(InputError, match="lr is not an option of TrainingOptions: known are reference, learning_rate"):
        TrainingOptions.preset("paper", lr=1.0)
    with pytest.raises(InputError, match="epochs must be"):
        TrainingOptions.preset("paper", epochs=0)


@pytest.mark.parametrize(
    ("targets", "names"),
    [("all-linear", "all-linear"), (" q_proj , v_proj ", ["q_proj", "v_proj"]), ("q_proj", ["q_proj"])],
)
def test_targets_become_module_names(targets, names):
    assert AdapterOptions(targets=targets).module_names() == names


def test_the_docstring_tells_every_option():
    text = AdapterOptions.__doc__
    assert text.startswith("Shape of the LoRA adapter that a task trains.\n\nArgs:\n    rank: Rank")
    assert all(f"\n    {name}: " in text for name in AdapterOptions.model_fields)
