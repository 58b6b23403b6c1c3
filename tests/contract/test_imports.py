"""Every module imports, exclusive and in any order: no name that is gone, no circle."""

import importlib
import pkgutil

import pytest

import everalign

MODULES = sorted(module.name for module in pkgutil.walk_packages(everalign.__path__, "everalign."))


@pytest.mark.parametrize("module", MODULES)
def test_module_imports(module):
    importlib.import_module(module)


@pytest.mark.parametrize(
    "package",
    [
        "everalign",
        "everalign.correction",
        "everalign.data",
        "everalign.learning",
        "everalign.reporting",
        "everalign.methods",
        "everalign.memory",
        "everalign.objectives",
        "everalign.serving.store",
    ],
)
def test_every_promised_name_is_there(package):
    module = importlib.import_module(package)
    names = [*getattr(module, "__all__", ()), *(name for name in dir(module) if not name.startswith("_"))]
    assert len(names) > 3
    for name in names:
        assert getattr(module, name) is not None


def test_the_list_of_modules_is_not_empty():
    assert {"everalign.cli", "everalign.learning.learner", "everalign.demo.world"} <= set(MODULES)
