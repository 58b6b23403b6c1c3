"""What MkDocs does not do by itself: see `hooks` in mkdocs.yml.

* The reference of the command line is written from the commands themselves.
* Pages that stand elsewhere in the repository (results, changelog) become pages of the site.
* A link to a repository file that is no page of the site becomes the file's name.
"""

import html
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = "docs"
COMMANDS = "reference/command-line.md"
# Files of the repository and the pages that they become.
MOUNTED = {"bench/RESULTS.md": "results.md", "bench/README.md": "benchmarks.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def mounted() -> dict[str, str]:
    """Return the repository's files that become pages, and the page of each."""
    more = sorted((ROOT / "bench" / "results").glob("*.md"))
    return MOUNTED | {f"bench/results/{path.name}": f"results/{path.name}" for path in more}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that have no file in the documentation's folder."""
    for source, page in mounted().items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, COMMANDS, content=command_line_page()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links at pages of the site; what is none of them becomes its name."""
    pages = {uri: source for source, uri in mounted().items()}
    uri = page.file.src_uri
    here = PurePosixPath(pages.get(uri, f"{DOCS}/{uri}")).parent
    homes = mounted()

    def resolved(match: re.Match[str]) -> str:
        text, target = match["text"], match["target"]
        if target.startswith(("#", "http://", "https://", "mailto:")):
            return match[0]
        path, _, anchor = target.partition("#")
        wanted = os.path.normpath(here / path)
        if wanted in homes:
            found = homes[wanted]
        elif wanted.startswith(f"{DOCS}/"):
            found = wanted.removeprefix(f"{DOCS}/")
        elif (ROOT / wanted).exists():
            return text if text.startswith("`") else f"`{wanted}`"
        else:
            return match[0]  # MkDocs reports it
        link = os.path.relpath(found, PurePosixPath(uri).parent)
        return f"[{text}]({link}{'#' + anchor if anchor else ''})"

    # Code keeps what it holds.
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else _LINK.sub(resolved, part) for part in parts)


# ---- the reference of the command line ----


def command_line_page() -> str:
    """Return the reference of all commands as Markdown."""
    from everalign.cli import app

    root = typer.main.get_command(app)
    lines = ["# Command line", "", "Every command and flag, as `--help` shows them.", ""]
    lines += ["| exit code | meaning |", "|---|---|"]
    codes = ((0, "done"), (1, "failed"), (2, "bad input"), (3, "refused by the gate"))
    lines += [f"| {code} | {meaning} |" for code, meaning in codes]
    lines += ["| 4 | too little evidence for the gate, or too little feedback for a task |", "| 130 | interrupted |"]
    for name, command in _commands(root, "everalign"):
        lines += ["", *_command(name, command)]
    return "\n".join(lines) + "\n"


def _commands(group: Any, name: str) -> list[tuple[str, Any]]:
    found = []
    for verb, command in group.commands.items():
        if hasattr(command, "commands"):
            found += _commands(command, f"{name} {verb}")
        else:
            found.append((f"{name} {verb}", command))
    return found


def _command(name: str, command: Any) -> list[str]:
    lines = [f"## {name}", "", _text(command.help or ""), ""]
    # "Example: COMMAND; more words".
    example, _, more = (command.epilog or "").removeprefix("Example: ").partition("; ")
    lines += ["```bash", example, "```", ""] if example else []
    lines += [_text(f"{more[0].upper()}{more[1:]}."), ""] if more else []
    context = command.context_class(command, info_name=name)
    panels: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None and "--help" not in parameter.opts:
            argument = parameter.param_type_name == "argument"
            panel = "Arguments" if argument else parameter.rich_help_panel or "Options"
            panels.setdefault(panel, []).append(record)
    for panel, records in panels.items():
        lines += [
            f"**{panel}**",
            "",
            "| flag | meaning |" if panel != "Arguments" else "| argument | meaning |",
            "|---|---|",
        ]
        lines += [f"| <code>{_names(names)}</code> | {_text(meaning)} |" for names, meaning in records]
        lines.append("")
    return lines


def _names(text: str) -> str:
    """Return flags and what a value is called as HTML: in a table, Markdown's own code cannot hold a bar."""
    return html.escape(text.replace(" <bool>", "").strip()).replace("|", "&#124;<wbr>")


def _text(text: str) -> str:
    """Return a help text as one paragraph of Markdown, without what would be taken for markup."""
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"([|<*_\[\]])", r"\\\1", text)
