"""The house keeps its shape: imports point one way, and starting is cheap."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import nope_gpt

PACKAGE = Path(nope_gpt.__file__).parent

FLOORS = [
    {"errors", "places"},
    {"json_files"},
    {"knobs"},
    {"config"},
    {"hardware"},
    {"sizing", "memory", "sampling", "signals", "tools", "example_tools"},
    {"artifacts"},
    {"sharpening"},
    {"device", "initialization", "attention", "rotary"},
    {"cross_entropy", "quantization", "embedding"},
    {"caching"},
    {"blocks", "native", "replaying", "generation"},
    {"recall"},
    {"remote", "byte_pairs", "transformers_layout"},
    {"locating"},
    {"published_layout"},
    {"hub", "splitting", "history", "encodings"},
    {"tokenization"},
    {"model"},
    {"lora", "streaming", "beams", "data", "reach"},
    {"evaluation"},
    {"chat", "batching", "adapters", "transcripts"},
    {"training", "export"},
    {"inspection", "diagnosis"},
    {"cli"},
]
"""Each module may import those on lower floors, and within a package its own."""

FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imports_of(path: Path) -> set[str]:
    """The parts of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "nope_gpt" and len(parts) > 1 and parts[1] in FLOOR_OF:
                found.add(parts[1])
    return found


def test_imports_point_one_way() -> None:
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            assert not imports_of(path)
            continue
        seen.add(own)
        for name in imports_of(path) - {own}:
            assert FLOOR_OF[name] < FLOOR_OF[own], f"{path.name} imports {name}"
    assert seen == FLOOR_OF.keys()


def test_only_the_command_line_knows_a_terminal() -> None:
    for path in PACKAGE.rglob("*.py"):
        if "cli" not in path.relative_to(PACKAGE).parts:
            for library in ("typer", "rich", "prompt_toolkit", "click"):
                text = path.read_text(encoding="utf-8")
                assert f"import {library}" not in text, path
                assert f"from {library}" not in text, path


def test_every_module_imports() -> None:
    for module in pkgutil.walk_packages(nope_gpt.__path__, "nope_gpt."):
        if not module.name.endswith("__main__"):
            import_module(module.name)


@pytest.mark.parametrize("name", ["cli", "config", "sizing"])
def test_the_command_line_the_config_and_the_calculator_start_without_torch(name: str) -> None:
    code = f"import sys, nope_gpt.{name}; print({{'torch', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("arguments", [["--help"], ["size", "--memory", "24GB"]])
def test_help_and_size_answer_in_under_three_tenths_of_a_second(arguments: list[str]) -> None:
    # Processor time, the best of several: the clock on the wall also counts the neighbours.
    resource = pytest.importorskip("resource")
    spent = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "nope_gpt.cli", *arguments], capture_output=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.3
