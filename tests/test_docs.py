"""The pages: commands that exist, links that lead somewhere, messages that are said, figures."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from documented import (
    DOCS,
    GROUP,
    PAGES,
    ROOT,
    Block,
    blocks,
    check,
    commands,
    lines,
)
from test_cli import SEED

LINKED = [*PAGES, *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY"))]
SHELL = [block for page in LINKED for block in blocks(page, "sh")]
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(`+)(.+?)\1", re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


# Commands


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.name)
def test_every_command_of_a_shell_block_is_understood(block: Block) -> None:
    if bash := shutil.which("bash"):
        done = subprocess.run([bash, "-n"], input=block.text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    checked = 0
    for line in lines(block.text):
        for words in commands(line):
            checked += 1
            check(words)
    assert checked, "nothing in this block was looked at"


@pytest.mark.parametrize(
    "line",
    [
        "nope pretrain --no-such-flag 1",
        "nope pretrain --preset huge",
        "nope pretrain --batch-size none",
        "nope pretrain --optimizer sgd",
        "torchrun --nproc-per-node=2 -m nope_gpt.cli tune --max-stepz 1",
        "srun nope prepare",
        "printf 'Hi' | nope chat --temperature cold",
        "cat file > other && nope sizes",
        "make quickstrat",
        "python benchmarks/learn.py time text --worker 2",
        "curl example.com",
    ],
)
def test_a_command_that_does_not_exist_would_be_seen(line: str) -> None:
    with pytest.raises((Exception, SystemExit)):
        for words in commands(line):
            check(words)


def test_every_fence_says_what_it_holds() -> None:
    for page in PAGES:
        opened = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)[::2]
        assert set(opened) <= {"sh", "python", "text", "toml"}, page


def test_every_flag_and_command_in_the_prose_is_one_of_nopes() -> None:
    options = {
        name: {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
        for name, command in GROUP.commands.items()
    }
    every = set().union(*options.values(), {"--help", "--version"})
    elsewhere = {"--signal", "--requeue", "--signals-to-handle", "--n_ctx", "--model_args"}
    elsewhere |= {"--nodes", "--shutdown-grace"}
    for page in PAGES:
        if page.name in ("cli.md", "moving.md"):
            continue
        for _, span in SPAN.findall(prose(page)):
            words = span.split()
            used = {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)}
            if words[0] == "nope" and len(words) > 1:
                assert words[1] in options or words[1][0] == "-", (page.name, span)
                assert used <= options.get(words[1], set()) | {"--help"}, (page.name, span)
            elif words[0].startswith("--"):
                assert used <= every | elsewhere, (page.name, span)


def test_the_readme_lists_every_command_and_no_other() -> None:
    listed = re.findall(r"^\| `nope ([a-z]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    there = set(GROUP.commands)
    assert sorted(listed) == sorted(there)


def test_every_flag_of_the_old_scripts_is_in_the_page_on_moving() -> None:
    page = (DOCS / "moving.md").read_text(encoding="utf-8")
    titles = {"pretrain": "## pretrain", "tune": "## instruction", "generate": "## gen"}
    for command, flags in SEED.items():
        section = page[page.index(titles.get(command, "## gen")) :].split("\n## ")[0]
        for flag, (default, _) in flags.items():
            row = re.search(rf"^\|[^|]*`--{flag}`[^|]*\|([^|]*)\|", section, re.MULTILINE)
            assert row, (command, flag)
            if type(default) in (int, float) and default is not False:
                assert str(default) in row[1], (command, flag)


# Links


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    found: set[str] = set()
    for title in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", title.replace("`", "").strip().lower()).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_every_link_leads_to_a_page_and_a_heading_of_it(page: Path) -> None:
    for target in LINK.findall(SPAN.sub("", prose(page))):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.is_file(), f"{target} is not there"
        assert place.parent in (ROOT, DOCS, DOCS / "guides"), f"{target} is no page of the site"
        assert not anchor or anchor in anchors(place), f"{target} is no heading"


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for page in ("index", "security", "guides/cluster"):
        place = tmp_path / "site" / page.removesuffix("index") / "index.html"
        assert "https://" not in re.sub(r'href="[^"]*"', "", place.read_text(encoding="utf-8"))


def test_every_page_is_in_the_sites_navigation() -> None:
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    there = [page.relative_to(DOCS).as_posix() for page in PAGES if page.parent != ROOT]
    assert set(there) <= set(listed)
    assert len(listed) == len(set(listed))


# Facts


def test_the_tree_in_the_readme_has_every_module_and_no_other() -> None:
    tree = re.search(r"^nope_gpt/\n(.*?)^tests/", (ROOT / "README.md").read_text(), re.S | re.M)
    assert tree
    heads = [re.split(r"  +", line.strip())[0] for line in tree[1].splitlines() if line.strip()]
    package = ROOT / "nope_gpt"
    there = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    there |= {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert sorted(heads) == sorted(there)


ERRORS = "NopeError UsageError MissingError CapacityError NetworkError Interrupted".split()


def said() -> set[str]:
    """What every NopeError of the program says, with … for what differs."""
    found: set[str] = set()
    for path in (ROOT / "nope_gpt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ERRORS:
                found |= literals(node.args[0])
    return found


def literals(node: ast.expr) -> set[str]:
    """The texts that an expression can be."""
    if isinstance(node, ast.Constant):
        return {str(node.value)}
    if isinstance(node, ast.IfExp):
        return literals(node.body) | literals(node.orelse)
    if isinstance(node, ast.BinOp | ast.JoinedStr):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node.left, node.right]
        return {"".join(texts) for texts in product(*map(literals, parts))}
    return {"…"}


def test_every_message_in_the_page_on_troubleshooting_is_said() -> None:
    page = prose(DOCS / "troubleshooting.md")
    headings = [match[1].strip("` ") for match in re.finditer(r"^### (.+)$", page, re.MULTILINE)]
    messages = said()
    for heading in headings:
        beginning = heading.removesuffix("…").rstrip()
        assert len(re.sub(r"[…\W]", "", heading)) > 10, heading
        assert any(message.startswith(beginning) for message in messages), heading
    assert len(headings) > 30
    assert len(headings) == len(set(headings))


def test_the_exit_codes_in_the_page_on_troubleshooting_are_the_programs() -> None:
    from nope_gpt import errors

    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    codes = {getattr(errors, name).exit_code for name in ERRORS}
    assert listed == codes


def test_a_figure_in_the_readme_is_that_of_the_page_it_links_to() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = readme[readme.index("Measured on") : readme.index("## Use the published")]
    items = re.split(r"^- |^\*\*", told, flags=re.MULTILINE)[1:]
    figures = 0
    for item in items:
        page = re.search(r"\((docs/[\w-]+\.md)\)", item)
        numbers = re.findall(r"\d+\.\d+", item)
        assert not numbers or page, item
        source = (ROOT / page[1]).read_text(encoding="utf-8") if page else ""
        assert not [number for number in numbers if number not in source], item
        figures += len(numbers)
    assert figures > 5
