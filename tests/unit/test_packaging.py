"""What is installed and shipped: extras, versions, and the container files, which are read but not built here."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import typer
import yaml

from everalign.cli import make_app

ROOT = Path(__file__).parents[2]
tomllib = pytest.importorskip("tomllib") if sys.version_info < (3, 11) else __import__("tomllib")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions():
    """Each instruction of the Dockerfile with its text, by target."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    target, found = "", {}
    for line in filter(None, text.splitlines()):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            target = rest.rpartition(" AS ")[2]
            found[target] = []
        found[target].append((word, rest))
    return found


def flags_of(verb: str) -> set[str]:
    command = typer.main.get_command(make_app()).commands[verb]
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}


def test_the_extra_all_names_every_extra_for_users():
    extras = PROJECT["optional-dependencies"]
    (one,) = extras["all"]
    assert set(re.search(r"\[(.*)\]", one).group(1).split(",")) == set(extras) - {"all", "test", "lint", "docs"}


def test_the_changelog_has_the_version_and_what_comes_after_it():
    versions = re.findall(r"^## \[?([^\]\s]+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert PROJECT["version"] in versions
    assert versions[0] == "Unreleased"
    assert len(versions) == len(set(versions))


def test_the_dockerfile_copies_what_is_there_and_installs_extras_that_exist():
    known = {
        "FROM",
        "ARG",
        "ENV",
        "RUN",
        "WORKDIR",
        "COPY",
        "USER",
        "VOLUME",
        "EXPOSE",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
    }
    found = instructions()
    assert list(found) == ["base", "train", "upstream", "gateway"]
    allowed = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    for word, rest in [one for part in found.values() for one in part]:
        assert word in known
        if word == "COPY":
            *sources, _ = rest.split()
            assert set(sources) <= allowed
            assert all((ROOT / source).exists() for source in sources)
        if word in ("ENTRYPOINT", "CMD"):
            assert yaml.safe_load(rest)
        for extras in re.findall(r'"\.\[(.*?)\]"', rest):
            assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    (entry,) = [yaml.safe_load(rest) for word, rest in found["gateway"] if word == "ENTRYPOINT"]
    assert entry[:2] == ["everalign", "serve"]
    assert {word for word in entry if word.startswith("--")} <= flags_of("serve")


def test_the_services_of_the_compose_file():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert set(services) == {"store", "upstream", "gateway"}
    targets = [service["build"]["target"] for service in services.values() if "build" in service]
    assert set(targets) <= set(instructions())
    gateway = services["gateway"]
    assert {word.partition("=")[0] for word in gateway["command"]} <= flags_of("serve")
    assert set(gateway["depends_on"]) == {"store", "upstream"}
    assert gateway["ports"] == ["127.0.0.1:8080:8080"]  # not to the world


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=left_out)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(tmp_path)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("everalign/")}
    wanted = {str(path.relative_to(tmp_path / "src")) for path in (tmp_path / "src").rglob("*") if path.is_file()}
    assert held == {name for name in wanted if not name.startswith("everalign.egg-info")}
