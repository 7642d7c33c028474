"""The package is layered: a module imports only modules of its own layer and below, and nothing imports losses."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the bottom: modules in no folder (constants, images, files, devices, the command line), then the folders.
LAYERS = ("", "models", "data", "inference", "training")
COMMANDS = ("check", "download", "export")  # thin modules at the top of the package, which may import all of it


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
    parts = module.split(".")[1:]
    return (
        len(LAYERS)
        if parts and parts[0] in COMMANDS
        else LAYERS.index(parts[0] if parts and parts[0] in LAYERS else "")
    )


def test_modules_import_no_layer_above():
    wrong = {(module, name) for module, names in imports().items() for name in names if layer(module) < layer(name)}
    assert not wrong


def test_there_is_no_import_cycle():
    list(TopologicalSorter(imports()).static_order())  # raises CycleError


def test_the_package_imports_no_losses():
    assert not {(module, name) for module, names in imports().items() for name in names if name.startswith("losses")}
