"""Fails on an import that goes up the floors or in a circle; prints how large the code is.

    python scripts/check_floors.py

The floors are those of docs/architecture.md: a room imports only rooms on lower floors, whether at the top of a module,
inside a function or for type checking.
"""

import ast
import statistics
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "everalign"
FLOORS = [
    ["errors", "lazy"],
    ["distributed"],
    ["options", "storage", "deadlines", "llm_reply", "notebook"],
    ["data", "objectives", "memory", "llm_client"],
    ["text", "modeling", "bulk"],
    ["training"],
    ["methods", "correction", "evaluation"],
    ["contrib"],
    ["learning"],
    ["reporting", "estimate"],
    ["demo", "serving"],
    ["bench"],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imports(tree: ast.AST, modules: set[str]) -> Iterator[tuple[int, str]]:
    """Yield the line and name of every module of the package that a module imports, at the top or later."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in submodules]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from ((node.lineno, name) for name in names if name.startswith("everalign."))


def main() -> int:
    """Print what is wrong and the figures; return how many imports are wrong."""
    paths = sorted(ROOT.rglob("*.py"))
    names = {path: ".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in paths}
    modules = {name.removesuffix(".__init__"): path for path, name in names.items()}
    trees = {name: ast.parse(path.read_text()) for name, path in modules.items()}
    wrong, graph = [], dict[str, set[str]]()
    for name, path in modules.items():
        if name == "everalign":
            continue
        room = name.split(".")[1]
        if room not in FLOOR:
            wrong.append(f"{path}: {room} stands on no floor: add it to {Path(__file__).name}")
            continue
        for line, target in imports(trees[name], set(modules)):
            graph.setdefault(name, set()).add(target)
            other = target.split(".")[1]
            if other != room and FLOOR.get(other, 0) >= FLOOR[room]:
                wrong.append(f"{path}:{line}: {room} (floor {FLOOR[room]}) imports {other} (floor {FLOOR[other]})")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        wrong.append("circle: " + " <- ".join(error.args[1]))
    lengths = sorted(
        node.end_lineno - node.lineno + 1
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    )
    lines = sum(path.read_text().count("\n") for path in paths)
    p90 = statistics.quantiles(lengths, n=10)[-1]
    print(f"{len(paths)} files, {lines} lines; {len(lengths)} functions of {statistics.median(lengths):.0f} lines")
    print(f"(median; one in ten has more than {p90:.0f}, the longest {lengths[-1]})")
    print("\n".join(wrong), end="\n" if wrong else "")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
