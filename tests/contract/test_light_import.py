"""Importing the package and asking the command line for help cost little: no torch before it is needed."""

import subprocess
import sys

import pytest

from runs_for_tests import write_run

HEAVY = (
    *("torch", "transformers", "peft", "datasets", "pyarrow", "matplotlib", "numpy", "httpx", "scipy", "rapidfuzz"),
    *("fastapi", "uvicorn", "sqlalchemy"),
)
SEEN = f"[name for name in {HEAVY} if name in sys.modules]"
LOADED = f"print({SEEN})"


def child(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    "module",
    [
        "everalign",
        "everalign.cli",
        "everalign.correction",
        "everalign.errors",
        "everalign.data",
        "everalign.learning",
        "everalign.reporting",
        "everalign.serving",
        "everalign.serving.store",
        "everalign.serving.store.records",
    ],
)
def test_importing_loads_nothing_heavy(module):
    assert child(f"import {module}\n{LOADED}") == "[]\n"


HELP = [
    ["--help"],
    ["learn", "--help"],
    ["bench", "--help"],
    ["estimate", "--help"],
    ["evaluate", "--help"],
    ["rollback", "--help"],
    ["watch", "--help"],
    ["export", "--help"],
    ["reward", "train", "--help"],
    ["reward", "score", "--help"],
    ["correct", "train", "--help"],
    ["correct", "run", "--help"],
    ["correct", "data", "--help"],
    ["correct", "distill", "--help"],
    ["correct", "steer", "--help"],
    ["correct", "evaluate", "--help"],
    ["feedback", "stats", "--help"],
    ["feedback", "export", "--help"],
    ["serve", "--help"],
    ["--version"],
]


def test_help_loads_nothing_heavy():
    """Of all verbs in one process: the first that loads something is named."""
    out = child(f"from everalign.cli import main\nfor verb in {HELP}:\n    main(verb)\n    print(verb, {SEEN})")
    assert [line for line in out.splitlines() if line.startswith("['")] == [f"{verb} []" for verb in HELP]


LEARN = ["learn", "--model", "tiny", "--task", "a=pairs.csv", "--output", "run"]
MISTAKES = {
    "no model given": ["learn", "--task", "a=pairs.csv", "--output", "run"],
    "No such option: --modl": ["learn", "--modl", "tiny"],
    "lost.csv: no such file": [*LEARN, "--task", "b=lost.csv"],
    "lost.test.csv: no such file": [*LEARN, "--task", "b=pairs.csv,lost.test.csv"],
    "pairs.csv: row 2: field 'rejected'": [*LEARN, "--task", "b=bad/pairs.csv"],
    "--energy must be a number": [*LEARN, "--energy", "3"],
    "online means nothing to the method 'er'": [*LEARN, "--method", "er", "--online"],
    "energy is for consolidated updates": [*LEARN, "--energy", "0.9"],
    "unknown method 'ewx' (did you mean 'ewc'?)": [*LEARN, "--method", "ewx"],
    "unknown objective 'dpp' (did you mean 'dpo'?)": [*LEARN, "--objective", "dpp"],
    "would ignore label": [*LEARN, "--label", "customer"],
    "gate must be a share": [*LEARN, "--gate", "3"],
    "there is no model folder ./lost": [*LEARN, "--model", "./lost"],
    "full is not empty": [*LEARN, "--output", "full"],
    "full exists and is not empty": ["correct", "train", "--model", "tiny", "--data", "pairs.csv", "--output", "full"],
    "is not empty: choose another": ["reward", "train", "--model", "tiny", "--data", "pairs.csv", "--output", "full"],
    "recipe.yaml:2: unknown key 'metod'": ["learn", "--recipe", "recipe.yaml"],
}


def test_mistakes_are_found_before_anything_heavy_is_loaded(tmp_path, monkeypatch):
    """Of all in one process: the first that loads something is named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    for folder in ("bad", "full"):
        (tmp_path / folder).mkdir()
    (tmp_path / "bad" / "pairs.csv").write_text("prompt,chosen,rejected\na,b,c\na,b,b\n")
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "recipe.yaml").write_text("model: tiny\nmetod: er\n")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\nfrom everalign.cli import main\n"
            f"for mistake in {list(MISTAKES.values())}:\n    print(main(mistake), {SEEN})",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["2 []"] * len(MISTAKES)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for wanted, error in zip(MISTAKES, errors, strict=True):
        assert wanted in error


@pytest.mark.skipif(sys.platform == "win32", reason="reads the processor time of children")
def test_a_mistake_takes_half_a_second():
    """Twice the goal of half a second of processor time: machines differ, and are shared."""
    import resource

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "everalign", "learn", "--output", "x"], capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 1.0


def test_a_gateway_without_a_corrector_needs_no_torch():
    assert child("import everalign.serving.app\nprint('torch' in sys.modules)") == "False\n"


def test_listing_versions_needs_no_torch(tmp_path):
    path = write_run(tmp_path / "run")
    code = (
        f"from everalign.cli import main\nassert main(['versions', {str(path)!r}]) == 0\nprint('torch' in sys.modules)"
    )
    assert child(code).splitlines()[-1] == "False"


def test_rolling_back_needs_no_torch(tmp_path):
    path = write_run(tmp_path / "run")
    code = (
        f"from everalign.cli import main\nassert main(['rollback', {str(path)!r}]) == 0\nprint('torch' in sys.modules)"
    )
    assert child(code).splitlines()[-1] == "False"


def test_importing_the_package_takes_less_than_a_fifth_of_a_second():
    code = "import time\nstart = time.process_time()\nimport everalign\nprint(time.process_time() - start)"
    assert min(float(child(code)) for _ in range(5)) < 0.2


def test_names_are_loaded_when_first_used():
    first, second = "'everalign.data.readers' in sys.modules", "everalign.load_preferences.__module__"
    assert child(f"import everalign\nprint({first}, {second}, {first})") == "False everalign.data.readers True\n"


CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def test_caches_of_products_are_bounded_unless_the_user_says_otherwise(monkeypatch):
    shown = f"import os, everalign; print([os.environ[name] for name in {CAPACITIES}])"
    for name in CAPACITIES:
        monkeypatch.delenv(name, raising=False)
    assert child(shown) == "['64', '64']\n"
    monkeypatch.setenv(CAPACITIES[1], "500")
    assert child(shown) == "['64', '500']\n"


# Products of ever other shapes; what the process has grown by from the 64th on, in MB.
GROWING = """
import torch
torch.set_num_threads(1)
weight = torch.randn(512, 512, dtype=torch.bfloat16)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) / 256
for rows in range(1, 250):
    torch.nn.functional.linear(torch.ones(rows, 512, dtype=torch.bfloat16), weight)
    if rows == 64:
        before = resident()
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_products_of_ever_other_shapes_take_no_more_memory(monkeypatch):
    """Also where torch was imported first: it looks at the settings when it computes the first product."""
    for name in CAPACITIES:
        monkeypatch.setenv(name, "1024")
    unbounded = float(child(f"import torch, everalign{GROWING}"))
    for name in CAPACITIES:
        monkeypatch.delenv(name)
    bounded = float(child(f"import torch, everalign{GROWING}"))
    if unbounded < 20:
        pytest.skip(f"this processor's products are kept in {unbounded:.0f} MB without a bound")
    assert bounded < 0.6 * unbounded
