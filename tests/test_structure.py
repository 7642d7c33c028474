"""The package is layered: a module imports only modules of its own layer and below, and nothing imports losses."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the bottom: modules in no folder (constants, images, files, devices, the command line), then the folders.
LAYERS = ("", "models", "data", "inference", "evaluation", "training")
COMMANDS = (
    "check",
    "download",
    "dub",
    "evaluate",
    "export",
)  # thin modules at the top of the package, which may import all of it


def imports() -> dict[str, set[str]]:
    """Maps each module of musetalk/ to the modules of the project that it imports."""
    graph = {}
    for path in (ROOT / "musetalk").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[module] |= names | {node.module}
            elif isinstance(node, ast.Import):
                graph[module] |= {alias.name for alias in node.names}
    return {
        module: {name for name in names if name in graph or name.startswith("losses")}
        for module, names in graph.items()
    }


def layer(module: str) -> int:
    top = f"{module}.".split(".")[1]
    return len(LAYERS) if top in COMMANDS else LAYERS.index(top) if top in LAYERS else 0


def test_modules_import_neither_higher_layers_nor_losses_nor_each_other_in_cycles():
    graph = imports()
    arrows = {(module, name) for module, names in graph.items() for name in names}
    assert not {(module, name) for module, name in arrows if name.startswith("losses") or layer(module) < layer(name)}
    list(TopologicalSorter(graph).static_order())  # raises CycleError
