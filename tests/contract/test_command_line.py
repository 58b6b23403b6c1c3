"""What every verb keeps: its help says the defaults, a recipe's keys are its flags, a shell completes it."""

import inspect
import os
import subprocess
import sys
from importlib import import_module

import pytest
import typer

from everalign.cli import make_app
from everalign.learning.options import MethodOptions
from everalign.learning.recipe import SECTIONS, Recipe
from everalign.methods import METHODS
from everalign.options import declared


def verbs(command=None, name=()):
    """Every command with its words."""
    command = command or typer.main.get_command(make_app())
    for word, inner in command.commands.items():
        if hasattr(inner, "commands"):
            yield from verbs(inner, (*name, word))
        else:
            yield " ".join((*name, word)), inner


COMMANDS = dict(verbs())


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_says_every_default(verb):
    for parameter in COMMANDS[verb].params:
        if parameter.param_type_name == "argument" or parameter.required:
            continue
        if parameter.is_flag and not parameter.secondary_opts:  # off unless given
            continue
        words = ("default", "if not given", "left out")
        assert parameter.show_default or any(word in parameter.help for word in words), parameter.opts


def test_help_says_the_methods_own_defaults():
    """A number in the help is that of the signature, for those methods that the help names."""
    for name, field in MethodOptions.model_fields.items():
        text = declared(field).description
        for method, kind in METHODS.items():
            found = inspect.signature(kind).parameters.get(name)
            if found is None or found.default is None or name in ("space", "step", "online", "strength", "review"):
                continue
            assert f"{found.default:g} by default" in text or f"{found.default:g} for none, the default" in text, (
                method,
                name,
            )


# Flags of how the verb runs, not of what is learned.
ABOUT_THE_CALL = {"recipe", "print_recipe", "resume", "processes", "fsdp", "as_json", "trust_remote_code", "help"}
OF_FEEDBACK = {"from_feedback", "minimum", "key_share", "agreement", "held_out"}


def test_a_recipe_s_keys_are_the_flags_names():
    """Whatever mapping of the recipe a key is in; a task is a flag for each, and a method's name its flag."""
    flags = {parameter.opts[-1].removeprefix("--").replace("-", "_") for parameter in COMMANDS["learn"].params}
    keys = set(Recipe.model_fields) - set(SECTIONS) | {"task", "method"}
    for name, section in SECTIONS.items():
        keys |= set() if name == "tasks" else set(section.model_fields) - {"name"}
    assert flags - {"json"} - ABOUT_THE_CALL - OF_FEEDBACK == keys


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_verbs_and_flags(shell):
    def complete(words: str) -> str:
        environment = {**os.environ, "_EVERALIGN_COMPLETE": f"complete_{shell}", "COMP_WORDS": words}
        environment |= {"COMP_CWORD": str(len(words.split(" ")) - 1), "_TYPER_COMPLETE_ARGS": words}
        environment |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        command = [sys.executable, "-m", "everalign"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout

    assert "versions" in complete("everalign vers")
    assert "--learning-rate" in complete("everalign learn --learn")


def test_each_verb_is_in_the_module_that_the_table_names():
    cli = import_module("everalign.cli")
    for verb, (module, _) in cli._VERBS.items():
        assert hasattr(import_module(f"everalign.cli.{module}"), verb)


def test_no_bar_of_a_library_runs_through_the_output(tmp_path):
    code = (
        "from everalign.modeling.loading import load_model, tiny_assistant_path\nload_model(str(tiny_assistant_path()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout + done.stderr == ""
