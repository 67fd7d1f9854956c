"""The guides are followed, and the lines of the other pages typed, at a small size.

Everything happens in a copy of a house that has what the pages speak of, with a hub of its own.
What needs another program, a GPU or several machines is only parsed, by test_docs.py.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub_datasets
import pytest
import smaller
from documented import DOCS, PAGES, ROOT, Block, blocks, commands, lines, nope_words
from loopback_hub import LoopbackHub
from small_chats import preferences, questions, written
from test_readme import write_models

pytestmark = [pytest.mark.slow, pytest.mark.ranks]

GUIDES = {
    "first-model": [],
    "own-chats": ["runs/pretrain"],
    "long-context": ["runs/pretrain", "datasets", "book.txt"],
    "serving": ["quickstart"],
    "one-gpu": [],
}
"""Followed from the first line to the last, each with no more than this at hand."""

ELSEWHERE = re.compile(r"(pretrain|tune) .*--gpus|torchrun|sbatch|SLURM|--shard|--merge|/shared/")
"""Lines for several GPUs or machines."""

SHELL = ("printf", "cat", "zcat")

REFERENCE = [page for page in PAGES if page.stem not in {*GUIDES, "cluster"}]

PYTHON = f"{sys.executable} - <<'END'\n{{}}\nEND"


def runs_here(line: str) -> bool:
    """Whether a line is for `nope` on a machine such as this one."""
    words = list(commands(line))
    ours = [nope_words(part) is not None for part in words]
    known = all(is_ours or part[0] in SHELL for is_ours, part in zip(ours, words, strict=True))
    return known and not ELSEWHERE.search(line)


def script_of(block: Block) -> str:
    """What of a block is run."""
    told = lines(block.text)
    if all(map(runs_here, told)):
        return block.text
    return "\n".join(filter(runs_here, told))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a base model, an assistant, an export, texts and conversations."""
    root = tmp_path_factory.mktemp("house")
    (root / "bin").mkdir()
    program = root / "bin" / "nope"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{smaller.__file__}" "$@"\n')
    program.chmod(0o755)
    work, home = root / "work", root / "home"
    for directory in (work, home / "my-texts", home / "books"):
        directory.mkdir(parents=True)
    text = "\n\n".join(hub_datasets.text_of("book", number) for number in range(700))
    for path in (work / "book.txt", home / "my-texts" / "a.txt", home / "books" / "b.txt"):
        path.write_text(text, encoding="utf-8")
    (work / "corpus.gz").write_bytes(gzip.compress(text.encode()))
    written(questions(30), work / "chats.jsonl")
    written(preferences(30), work / "pairs.jsonl")
    (work / "prompts.jsonl").write_text('{"prompt": "Once"}\n')
    (work / "mine.py").write_text(blocks(DOCS / "chatting.md", "python")[0].text)
    type_in(root, "nope quickstart", {})
    shutil.copytree(work / "quickstart" / "runs", work / "runs")
    prepared = "nope prepare python-docs --token-encoding runs/pretrain --holdout-fraction 0.1"
    type_in(root, f"{prepared}; nope export --model runs/pretrain --output exports/mine", {})
    write_models(root / "hub" / "models")
    hub_datasets.fineweb(root / "hub", documents=120)
    hub_datasets.smoltalk(root / "hub")
    hub_datasets.ultrafeedback(root / "hub")
    own = hub_datasets.own_texts(root / "hub").folder
    shutil.copytree(own, root / "hub" / "datasets" / "ORG" / "NAME")
    return root


def type_in(root: Path, script: str, env: dict[str, str]) -> None:
    """Run a script as it would be typed in a house, to its end."""
    place = {"HOME": str(root / "home"), "PATH": f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", re.sub(r"(?<!/)\.venv/bin/", "", script)],
        cwd=root / "work",
        env=os.environ | place | {"OMP_NUM_THREADS": "1"} | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"


def moved_in(house: Path, root: Path, things: list[str]) -> None:
    """Make a house of one's own with some of the things of another."""
    shutil.rmtree(root, ignore_errors=True)
    for name in ("bin", "home", *(f"work/{thing}" for thing in things)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (house / name).is_dir() else shutil.copy
        copy(house / name, root / name)
    (root / "work").mkdir(exist_ok=True)


@pytest.fixture
def hub(house: Path, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A hub that has the data sets and the models that the pages name."""
    shutil.copytree(house / "hub", tmp_path / "hub")
    with LoopbackHub(tmp_path / "hub") as served:
        yield served


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_can_be_followed_from_its_first_line_to_its_last(
    guide: str, house: Path, hub: LoopbackHub, tmp_path: Path
) -> None:
    page = DOCS / "guides" / f"{guide}.md"
    root, env = tmp_path / "mine", hub.environment(tmp_path / "hf")
    moved_in(house, root, GUIDES[guide])
    shell, python = blocks(page, "sh"), blocks(page, "python")
    for block in sorted([*shell, *python], key=lambda block: block.line):
        if block in shell:
            type_in(root, script_of(block), env)
        elif "openai" not in block.text:  # That one asks a server.
            type_in(root, PYTHON.format(block.text), env)


@pytest.mark.parametrize("page", REFERENCE, ids=lambda page: page.stem)
def test_every_line_of_a_page_runs_where_what_it_speaks_of_is_there(
    page: Path, house: Path, hub: LoopbackHub, tmp_path: Path
) -> None:
    root, env = tmp_path / "mine", hub.environment(tmp_path / "hf")
    scripts = [
        beginning_anew(line) + line
        for block in blocks(page, "sh")
        for line in filter(runs_here, lines(block.text))
    ]
    if page != ROOT / "README.md":  # Its Python is run by test_readme.py.
        scripts += [PYTHON.format(block.text) for block in blocks(page, "python")]
    for script in scripts:
        moved_in(house, root, [item.name for item in (house / "work").iterdir()])
        type_in(root, script, env)


def beginning_anew(line: str) -> str:
    """Remove what a line would make anew, unless it goes on with it."""
    words = line.split()
    if "prepare" in words:
        return "rm -rf datasets; "
    if words[1] not in ("pretrain", "tune") or "--resume" in words:
        return ""
    return f"rm -rf runs/{words[1]}; " if f"runs/{words[1]}" not in words else ""


def test_most_of_what_the_guides_say_is_run() -> None:
    told = [line for name in GUIDES for line in shell_lines(DOCS / "guides" / f"{name}.md")]
    left_out = [line for line in told if not runs_here(line)]
    others = "pip |python -m (llama_cpp|sglang)|mlx_lm|lm_eval|vllm|cd exports|llama-server"
    assert not [line for line in left_out if not re.match(others, line)]
    assert len(told) - len(left_out) > 40


def shell_lines(page: Path) -> list[str]:
    return [line for block in blocks(page, "sh") for line in lines(block.text)]
