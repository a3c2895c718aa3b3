"""The order of the folders: which may import which."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {
    "pipeline": [
        "errors messages progress files threads object_store tables table_files",
        "labels audio",
        "store",
        "datasets loading audit",
        "build report",
        "cli",
    ],
    "ajepa": [
        "model",
        "recipes",
        "training",
        "evaluate embed",
        "pretrain finetune",
        "report hear xares_encoder mteb_encoder",
        "cli",
    ],
}
PLACES = {
    (package, name): number
    for package, layers in LAYERS.items()
    for number, layer in enumerate(layers)
    for name in layer.split()
}
FILES = sorted(
    file for package in LAYERS for file in (ROOT / package).rglob("*.py") if file.name != "__init__.py"
)
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}


@cache
def imported_modules(module: str) -> set[str]:
    """Every file of the project that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & set(MODULES)


def place_of(module: str) -> tuple[str, str]:
    """The package and the folder, or file, at its top."""
    package, name = module.split(".")[:2]
    return package, name


@pytest.mark.parametrize("module", MODULES)
def test_a_folder_uses_only_what_stands_above_it(module):
    """Who reads a folder needs to know only the folders before it; `pipeline` knows nothing of `ajepa`."""
    package, name = place_of(module)
    for other in imported_modules(module):
        other_package, other_name = place_of(other)
        if other_package != package:
            assert package == "ajepa", f"{module} imports {other}"
        elif PLACES[package, name] == 0:  # the ground: single files, in the order of the list
            assert PLACES[package, other_name] == 0, f"{module} imports {other}"
        elif other_name != name:
            assert PLACES[package, other_name] < PLACES[package, name], f"{module} imports {other}"


def test_training_knows_nothing_of_how_stores_are_built():
    """A store is the only thing that passes between the stages."""
    for module in MODULES:
        if module.startswith("ajepa."):
            others = {place_of(other) for other in imported_modules(module)}
            assert not others & {("pipeline", "build"), ("pipeline", "audit")}, module


def test_no_two_files_import_each_other():
    """Inside a folder too there is a first file to read."""
    imports = {module: imported_modules(module) for module in MODULES}
    while free := [module for module, others in imports.items() if not others & set(imports)]:
        for module in free:
            del imports[module]
    assert not imports, f"these import each other: {', '.join(imports)}"


def test_every_folder_has_its_place():
    """A folder that is not listed would be held to nothing."""
    assert {place_of(module) for module in MODULES} == set(PLACES)
