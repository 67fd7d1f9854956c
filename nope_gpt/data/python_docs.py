"""The text that every CPython carries: its language reference and its docstrings.

A corpus that needs no network. It is read from the source files of the standard
library and nothing is imported, so no module can open a window or print a poem.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from nope_gpt.errors import MissingError

SKIPPED_FOLDERS = frozenset({"__pycache__", "idle_test", "test", "tests", "turtledemo"})
SHORTEST = 40  # Characters; anything shorter is "See base class." and its kin.
LONGEST_ANSWER = 600

QUESTIONS = (
    "What does {name} do?",
    "What is the {kind} {name} for?",
    "How do I use {name}?",
    "Explain {name}.",
    "Tell me about the {kind} {name}.",
)

# The rule under a heading changes with its depth, so it says nothing about the text.
HEADING_RULE = re.compile(r"^([^\w\s])\1+$", re.MULTILINE)
PARAGRAPH_END = re.compile(r"\s*\n\s*\n")
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?=\s+[A-Z])")
NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
OWN_TEXT = "use text of your own: `nope prepare FILE`"

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True)
class Documented:
    """A module, class, property, method or function, and its docstring."""

    name: str
    kind: str
    heading: str
    text: str


def documents(stdlib: Path | None = None) -> Iterator[str]:
    """Yield each page of the language reference, then each docstring under what it documents.

    No document repeats another, so some can be held out by their hashes.

    Args:
        stdlib: The folder of the standard library; this interpreter's if None.

    Raises:
        MissingError: The interpreter came without the reference or the sources.
    """
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    yield from reference_pages(root)
    seen: set[str] = set()
    for thing in documented_things(root):
        if thing.text not in seen:
            seen.add(thing.text)
            yield f"{thing.heading}\n\n{thing.text}"


def conversations(stdlib: Path | None = None) -> Iterator[list[dict[str, str]]]:
    """Yield a question and its answer about each public part of the standard library.

    Args:
        stdlib: The folder of the standard library; this interpreter's if None.

    Raises:
        MissingError: The interpreter came without the sources.
    """
    seen: set[str] = set()
    for thing in documented_things(stdlib or Path(sysconfig.get_path("stdlib"))):
        is_public = not any(part.startswith("_") for part in thing.name.split("."))
        answer = opening(thing.text)
        # The variants for each platform share a name, and overridden methods an answer.
        if is_public and answer and seen.isdisjoint({thing.name, answer}):
            seen |= {thing.name, answer}
            yield [
                {"role": "user", "content": question(thing)},
                {"role": "assistant", "content": answer},
            ]


def question(thing: Documented) -> str:
    """Ask about a thing in words that depend on its name alone, not on the order or the seed."""
    template = QUESTIONS[hashlib.sha256(thing.name.encode()).digest()[0] % len(QUESTIONS)]
    return template.format(kind=thing.kind, name=thing.name)


def opening(text: str) -> str | None:
    """The paragraphs, or failing that the sentences, that a text begins with and that fit."""
    if len(text) <= LONGEST_ANSWER:
        return text
    for end in (PARAGRAPH_END, SENTENCE_END):
        cuts = [text[: match.start()] for match in end.finditer(text, 0, LONGEST_ANSWER)]
        # A colon announces something that would be missing.
        whole = [cut for cut in cuts if len(cut) >= SHORTEST and not cut.endswith(":")]
        if whole:
            return whole[-1]
    return None


def reference_pages(root: Path) -> list[str]:
    """The topics of the language reference, without those that a longer one contains.

    Raises:
        MissingError: This Python came without them.
    """
    path = root / "pydoc_data" / "topics.py"
    for statement in getattr(parsed(path), "body", ()):
        match statement:
            case ast.Assign(targets=[ast.Name(id="topics")], value=ast.Dict(values=values)):
                texts = [str(text.value).strip() for text in values if type(text) is ast.Constant]
                pages = {HEADING_RULE.sub("", text): text for text in texts if is_prose(text)}
                within = {bare for bare in pages for page in pages if page != bare and bare in page}
                return [text for bare, text in pages.items() if bare not in within]
    raise MissingError("this Python has no language reference", where=str(path), hint=OWN_TEXT)


@functools.cache  # Parsing takes seconds, and the documents and conversations share it.
def documented_things(root: Path) -> tuple[Documented, ...]:
    """Everything in the standard library that has a docstring worth reading.

    Raises:
        MissingError: This Python came without its sources.
    """
    things: list[Documented] = []
    for path in source_files(root):
        if tree := parsed(path):
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            things += documented(tree, module.removesuffix(".__init__"), "module")
    if not things:
        raise MissingError("this Python has no library sources", where=str(root), hint=OWN_TEXT)
    return tuple(things)


def documented(node: ast.Module | Definition, name: str, kind: str) -> Iterator[Documented]:
    """Yield what is documented in a node, itself first, except what a function hides inside."""
    text = (ast.get_docstring(node) or "").rstrip()
    if is_prose(text):
        yield Documented(name, kind, heading(node, name, kind), text)
    if kind in ("module", "class"):
        for inner in definitions(node):
            yield from documented(inner, f"{name}.{inner.name}", kind_of(inner, kind))


def definitions(node: ast.AST) -> Iterator[Definition]:
    """Yield the definitions right inside a node, also where `if` or `try` guards them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from definitions(child)


def kind_of(node: Definition, owner: str) -> str:
    """What a reader would call the thing that is defined inside a module or class."""
    if isinstance(node, ast.ClassDef):
        return "class"
    if any(ast.unparse(decorator).endswith("property") for decorator in node.decorator_list):
        return "property"
    return "method" if owner == "class" else "function"


def heading(node: ast.Module | Definition, name: str, kind: str) -> str:
    """The line above a docstring: the name of what it documents, and how to call it."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and kind != "property":
        returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"{name}({ast.unparse(node.args)}){returned}"
    return f"{kind} {name}"


def source_files(root: Path) -> Iterator[Path]:
    """Yield the files of the library's modules in the order of their names."""
    for folder, subfolders, files in os.walk(root):
        # What an import statement cannot name is no package: site-packages, for one.
        subfolders[:] = sorted(filter(str.isidentifier, {*subfolders} - SKIPPED_FOLDERS))
        for path in (Path(folder, name) for name in sorted(files)):
            if path.suffix == ".py" and path.stem.isidentifier():
                yield path


def parsed(path: Path) -> ast.Module | None:
    """Parse a source file in the encoding it declares; None if that cannot be done."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The library's old escapes are not the user's.
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def is_prose(text: str) -> bool:
    """Whether a text says something, in characters that can be written and shown."""
    return len(text) >= SHORTEST and not NOT_TEXT.search(text)
