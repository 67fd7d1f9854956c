"""What SECURITY.md promises where no other test holds it, and that the tests it names are there."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_faults import Fault
from loopback_hub import LoopbackHub
from small import small_model

import nope_gpt
from nope_gpt.tokenization import BaseTokenizer

PACKAGE = Path(nope_gpt.__file__).parent
ROOT = PACKAGE.parent

RUNS_CODE = re.compile(
    r"eval|exec|__import__|compile|(subprocess|ctypes|runpy|pickle|marshal|torch\.hub)\..+"
    r"|torch\.load|os\.(system|popen|exec.*|spawn.*|startfile)|.*\.(exec_module|import_module)"
)
"""What a file calls to run something, or to make objects of what it is told."""

KNOWN = {
    "device.py": {"ctypes.CDLL"},
    "network/native.py": {"subprocess.run", "subprocess.Popen", "ctypes.CDLL"},
    "chat/tools.py": {"subprocess.run", "spec.loader.exec_module"},
    "export/llama_cpp.py": {"subprocess.run"},
    "export/legacy.py": {"torch.load"},
}
"""The C library's own settings; the compiler and what it made; the user's tools; llama-quantize;
and the old checkpoints."""

HARMLESS = {"ctypes.addressof", "ctypes.byref"}

NETWORKS = {"huggingface_hub", "requests", "httpx", "urllib", "http", "socket", "aiohttp", "ssl"}


def nodes_of(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def sources() -> Iterator[tuple[str, Path]]:
    for path in PACKAGE.rglob("*.py"):
        yield path.relative_to(PACKAGE).as_posix(), path


def test_code_is_run_in_known_places_alone() -> None:
    found: dict[str, set[str]] = {}
    for name, path in sources():
        called = {ast.unparse(node.func) for node in nodes_of(path) if isinstance(node, ast.Call)}
        runs = {text for text in called if RUNS_CODE.fullmatch(text)} - HARMLESS
        if runs:
            found[name] = runs
    assert found == KNOWN
    assert "weights_only=True" in (PACKAGE / "export" / "legacy.py").read_text()
    for _, path in sources():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"import (pickle|dill|joblib|shelve)|allow_pickle=True", text), path
        assert not re.search(r"trust_remote_code\W+True|weights_only=False", text), path


def test_the_network_is_reached_from_known_places_alone() -> None:
    found = set()
    for name, path in sources():
        for node in nodes_of(path):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                imported = [str(node.module)]
            if NETWORKS & {each.partition(".")[0] for each in imported}:
                found.add(name)
    assert found == {
        "diagnosis.py",
        *("hub/storage.py", "hub/locating.py", "hub/remote.py"),
        *("data/catalog.py", "data/downloads.py"),
    }


@pytest.mark.slow
def test_a_token_is_nowhere_after_a_download_and_an_upload(
    tmp_path: Path, nope: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    model = small_model(vocabulary_size=257)
    model.save_pretrained(tmp_path / "hub" / "models" / "org" / "model")
    BaseTokenizer.of_bytes().save(tmp_path / "hub" / "models" / "org" / "model")
    said = []
    with LoopbackHub(tmp_path / "hub") as hub:
        environment = hub.environment(tmp_path / "cache") | {"NOPE_DEBUG": "1"}
        export = ["export", "--model=org/model", "--output=out", "--push-to-hub=me/mine"]
        for words, code in ((["generate", "x", "--model=org/model", "--max-tokens=2"], 0),
                            (export, 0)):  # fmt: skip
            done = nope(*words, env=environment)
            assert done.returncode == code, done.stderr
            said.append(done.stdout + done.stderr)
        with hub.fault(Fault(method="POST", status=403, times=None)):
            refused = nope(*export, "--overwrite", env=environment)
        assert refused.returncode
        said.append(refused.stdout + refused.stderr)
    assert not any("hf_loopback" in text for text in said)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not any(b"hf_loopback" in path.read_bytes() for path in files)


@pytest.mark.skipif(not (ROOT / "SECURITY.md").is_file(), reason="the package is installed alone")
def test_every_test_that_the_page_names_is_there() -> None:
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    places = re.findall(r"`(tests/\w+\.py)`: ((?:`\w+`(?:, )?)+)", page)
    assert len(places) > 15
    for file, names in places:
        for name in re.findall(r"\w+", names):
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), name
