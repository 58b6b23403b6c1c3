"""Blocks of code in Markdown pages, and a tutorial carried out as a reader would."""

import contextlib
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import typer

from everalign.cli import app, main

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(
    r"(?:^<!-- test: skip because (?P<skip>.*?) -->\n)?^```(?P<head>[^\n]*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_TITLE = re.compile(r'title="([^"]+)"')
PORT = re.compile(r"\b80[08][0-9]\b")


class Block(NamedTuple):
    """A block of code: its language, the file that it is (or None), why it is not executed (or None), its code."""

    language: str
    title: str | None
    skip: str | None
    code: str


def markdown_pages() -> list[str]:
    """The pages that people read, from the repository's root."""
    folders = [ROOT / "docs", ROOT / "examples"]
    found = [path for folder in folders for path in sorted(folder.rglob("*.md"))]
    return ["README.md", *(str(path.relative_to(ROOT)) for path in found)]


def blocks(page: str) -> list[Block]:
    """The blocks of code of a page, in order."""
    found = []
    for match in _BLOCK.finditer((ROOT / page).read_text(encoding="utf-8")):
        language, _, rest = match["head"].partition(" ")
        title = _TITLE.search(rest)
        found.append(Block(language, title and title[1], match["skip"], match["code"]))
    return found


def commands(page: str) -> list[str]:
    """The command lines of `everalign` in a page's blocks of shell code, without comments."""
    code = "".join(block.code for block in blocks(page) if block.language in ("", "bash", "sh"))
    lines = [re.sub(r"\s#\s.*", "", line).strip() for line in code.replace("\\\n", " ").splitlines()]
    return [line.removesuffix("&").strip() for line in lines if line.startswith("everalign ")]


def words(line: str) -> list[str]:
    """The arguments of a command line, without what stands in brackets."""
    return shlex.split(re.sub(r"\s\[[^\]\s]*\]", "", line))[1:]


def verb(arguments: list[str]) -> tuple[object, list[str]]:
    """The command's object and the arguments that are left for it."""
    command, left = typer.main.get_command(app), list(arguments)
    while hasattr(command, "commands") and left and not left[0].startswith("-"):
        command = command.commands[left.pop(0)]
    return command, left


class Reader:
    """Carries a page out in the current folder: writes its files, runs its commands and its Python, in order.

    Args:
        page: from the repository's root.
        shorter: texts of the page to replace, so that it takes seconds; each has to be there.
        codes: exit codes of `everalign` that are right, by a part of the command; 0 for all others.
        prepared: changes the arguments of a command of `everalign`.
        alone: commands with one of these texts are left out.
    """

    def __init__(
        self,
        page: str,
        shorter: Mapping[str, str] | None = None,
        codes: Mapping[str, tuple[int, ...]] | None = None,
        prepared: Callable[[list[str]], list[str]] = list,
        alone: tuple[str, ...] = (),
    ) -> None:
        self.page, self.shorter, self.codes = page, dict(shorter or {}), dict(codes or {})
        self.prepared, self.alone = prepared, alone
        self.replaced: dict[re.Pattern[str], str] = {}  # in Python
        self.done: list[str] = []
        self.used: set[str] = set()
        self.servers: list[subprocess.Popen[bytes]] = []
        self.ports: dict[str, str] = {}
        self.names: dict[str, object] = {"__name__": "page"}

    def run(self) -> None:
        """Carry out all blocks; servers are stopped at the end."""
        try:
            for block in blocks(self.page):
                if block.skip is None:
                    self._block(block)
        finally:
            for server in self.servers:
                server.terminate()
            for server in self.servers:
                server.wait(30)
        missing = set(self.shorter) - self.used
        assert not missing, f"{self.page} no longer has {missing}"

    def _block(self, block: Block) -> None:
        code = self._shortened(block.code)
        if block.title is not None:
            if not Path(block.title).exists():
                Path(block.title).write_text(code, encoding="utf-8")
        elif block.language == "python":
            for pattern, other in self.replaced.items():
                code = pattern.sub(other, code)
            exec(compile(code, self.page, "exec"), self.names)
            self.done.append("python")
        elif block.language == "bash":
            for line in code.replace("\\\n", " ").splitlines():
                line = re.sub(r"\s#\s.*", "", line).strip()
                if line and not any(text in line for text in self.alone):
                    self._line(line)
                    self.done.append(line)

    def _shortened(self, code: str) -> str:
        for text, other in self.shorter.items():
            if text in code:
                self.used.add(text)
                code = code.replace(text, other)
        return PORT.sub(lambda match: self._port(match[0]), code)

    def _port(self, port: str) -> str:
        if port not in self.ports:
            with socket.socket() as found:
                found.bind(("127.0.0.1", 0))
                self.ports[port] = str(found.getsockname()[1])
        return self.ports[port]

    def _line(self, line: str) -> None:
        """One command: in this process where it is ours, which saves the seconds of importing torch."""
        if line.endswith("&"):
            arguments = shlex.split(line.removesuffix("&"))
            module = ["-m", "everalign"] if arguments[0] == "everalign" else []
            with open("server.log", "ab") as log:
                self.servers.append(subprocess.Popen([sys.executable, *module, *arguments[1:]], stdout=log, stderr=log))
        elif line.startswith("everalign "):
            with _imports():
                code = main(self.prepared(words(line)))
            wanted = next((codes for text, codes in self.codes.items() if text in line), (0,))
            assert code in wanted, f"{self.page}: exit code {code} of {line}"
        elif line.startswith("python ") and line.split()[1].endswith(".py"):
            runpy.run_path(line.split()[1], run_name="__main__")
        else:
            subprocess.run(["bash", "-euo", "pipefail", "-c", line], check=True)


@contextlib.contextmanager
def _imports() -> Iterator[None]:
    """Modules of the current folder are forgotten afterwards: another page may have one of the same name."""
    here, before, path = os.getcwd(), set(sys.modules), list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - before:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(here + os.sep):
                del sys.modules[name]
