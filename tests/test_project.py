"""What the project says of itself is said alike everywhere, and what it needs it names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from dist_check import EXTRAS
from oldest import oldest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text("utf-8"))
REQUIRED = [Requirement(line) for line in PROJECT["dependencies"]]
OPTIONAL = [Requirement(x) for lines in PROJECT["optional-dependencies"].values() for x in lines]
MODULES = {requirement.name.replace("-", "_") for requirement in REQUIRED + OPTIONAL}
SELDOM = {"jinja2", "llama_cpp"}
"""llama-cpp-python and what it brings, which no extra installs; used where they are."""


def versions(found: list[str]) -> list[tuple[int, ...]]:
    """Of Python, in order."""
    return sorted(tuple(map(int, text.split("."))) for text in found)


def test_the_oldest_and_the_newest_python_are_the_same_everywhere() -> None:
    language = "Programming Language :: Python :: "
    classified = versions(
        [x.removeprefix(language) for x in PROJECT["classifiers"] if x.startswith(language)]
    )
    oldest_python, newest_python = classified[0], classified[-1]
    dotted = ".".join(map(str, oldest_python))
    matrix = WORKFLOW["jobs"]["quick"]["strategy"]["matrix"]["include"]
    assert PROJECT["requires-python"] == f">={dotted}"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{dotted.replace('.', '')}"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == dotted
    assert f"sys.version_info < {oldest_python}" in MAKEFILE
    assert f"Python {dotted} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert versions(sorted({run["python"] for run in matrix})) == classified
    with_oldest = [run for run in matrix if run["constraints"] == "build/oldest.txt"]
    with_newest = [run for run in matrix if run["constraints"] == "/dev/null"]
    assert versions([run["python"] for run in with_oldest]) == [oldest_python]
    assert versions([run["python"] for run in with_newest]) == [newest_python]
    others = {step["with"]["python-version"] for _, step in steps() if "with" in step}
    assert others == {dotted, "${{ matrix.python }}"}


def steps() -> list[tuple[str, dict[str, Any]]]:
    """The steps of all jobs of the workflow, each with its job's name."""
    return [(name, step) for name, job in WORKFLOW["jobs"].items() for step in job["steps"]]


def test_the_workflow_runs_what_a_contributor_runs() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.MULTILINE))
    for name, step in steps():
        if "run" in step:
            program, target, *_ = step["run"].split()
            assert (program, target in targets) == ("make", True), name
    declared = re.search(r"\.PHONY: (.*)", MAKEFILE)
    assert declared
    assert set(declared[1].split()) == targets


def test_a_fresh_checkout_gets_versions_that_are_allowed_and_all_of_them_said() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    pinned = {name.lower().replace("_", "-"): v for name, v in (x.split("==") for x in lines)}
    for requirement in REQUIRED:
        assert requirement.specifier.contains(pinned[requirement.name]), requirement.name
    for requirement in OPTIONAL:
        if requirement.name in pinned:
            assert requirement.specifier.contains(pinned[requirement.name]), requirement.name


def test_the_oldest_versions_are_those_that_are_allowed() -> None:
    found = oldest(ROOT / "pyproject.toml")
    assert {requirement.name for requirement in REQUIRED} <= found.keys()
    for requirement in REQUIRED + OPTIONAL:
        if requirement.specifier:
            assert requirement.specifier.contains(found[requirement.name])
            below = SpecifierSet(f"<{found[requirement.name]}")
            assert not (requirement.specifier & below).contains("0"), requirement.name


def test_every_import_of_another_package_is_declared() -> None:
    for path in (ROOT / "nope_gpt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for top in {name.split(".")[0] for name in names}:
                known = top in sys.stdlib_module_names or top in MODULES | SELDOM | {"nope_gpt"}
                assert known, f"{path.name} imports {top}"


WITHOUT = f"""
import sys
for name in {(*EXTRAS, *SELDOM, "accelerate", "psutil")}:
    sys.modules[name] = None  # As if it were not installed.
"""

IMPORTS = """
import importlib, pkgutil, nope_gpt
for module in pkgutil.walk_packages(nope_gpt.__path__, "nope_gpt."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""

CALL = """
from nope_gpt.cli import main
main(sys.argv[1:])
"""


def without_extras(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python as if no extra were installed."""
    command = [sys.executable, "-c", WITHOUT + code, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_module_imports_without_the_extras() -> None:
    done = without_extras(IMPORTS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("line", "extra"),
    [
        ("size --memory 24GB --plot a.png", "plots"),
        ("eval --model m --text t --library transformers", "transformers"),
        ("export --model MODEL --format gguf --output out", "gguf"),
    ],
)
def test_what_needs_an_extra_says_which(line: str, extra: str, tmp_path: Path) -> None:
    from small import small_model

    model = small_model(vocabulary_size=257)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text('{"name": "bytes"}')
    done = without_extras(CALL, *line.replace("MODEL", str(tmp_path / "model")).split())
    assert done.returncode in (1, 2), done.stderr
    assert f"pip install 'nope-gpt[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert extra in PROJECT["optional-dependencies"]


def test_every_fault_that_mutants_plants_is_in_a_place_that_is_there() -> None:
    table = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text(encoding="utf-8"))
    for module, entry in table.items():
        text = (ROOT / "nope_gpt" / f"{module}.py").read_text(encoding="utf-8")
        assert len(entry["faults"]) >= 5, module
        for what, (old, _) in entry["faults"].items():
            assert text.count(old) == 1, f"{module}: {what}"
