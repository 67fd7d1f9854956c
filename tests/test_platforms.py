"""The same program on every system: what no machine here can be, a process plays."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small import HELPED, RECIPE, byte_dataset
from torch.utils._python_dispatch import TorchDispatchMode

import nope_gpt
from nope_gpt.chat.tools import Call, carry_out, load_tools
from nope_gpt.cli.reading import read_text
from nope_gpt.config import PretrainConfig
from nope_gpt.device import (
    Ranks,
    has_bfloat16,
    memory_of,
    peak_flops,
    refuse_missing_gpus,
    refuse_small_memory,
    resolve_device,
    resolve_precision,
)
from nope_gpt.errors import CapacityError, UsageError
from nope_gpt.model import NoPEGPT
from nope_gpt.training import compilation
from nope_gpt.training.prefetching import Prefetcher
from nope_gpt.training.pretraining import pretrain

Nope = Callable[..., subprocess.CompletedProcess[str]]

ELSEWHERE = Path(__file__).with_name("elsewhere")

ASCII = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
"""A system whose own encoding is not UTF-8."""

SHAPE = [
    *("--embedding-dimensions", "16", "--num-q-heads", "2", "--num-kv-heads", "1"),
    *("--num-decoder-layers", "2", "--tokens-per-sample", "32"),
]

TINY = [
    *("--batch-size", "4", "--gradient-accumulation-steps", "1", "--num-eval-samples", "8"),
    *("--eval-interval", "2", "--checkpoint-interval", "2", "--device", "cpu"),
    *("--precision", "float32", "--seed", "1"),
]

EAGER = ["--compile", "off", "--seed", "1"]
"""Where there is a compiler, what is compiled rounds otherwise."""

STORY = [
    ["prepare", "corpus", "--token-encoding", "bytes", "--num-dataset-processes", "2"],
    ["pretrain", *SHAPE, *TINY, "--max-steps", "6"],
    ["pretrain", "--resume", "--max-steps", "8"],
    ["prepare", "chats.jsonl", "--token-encoding", "runs/pretrain"],
    ["tune", *TINY, "--model", "runs/pretrain"],
    ["export", "--model", "runs/tune", "--output", "exports/own"],
    ["export", "--model", "runs/tune", "--output", "exports/own", "--overwrite"],
    ["generate", *EAGER, "--input=prompts.jsonl", "--output=out.jsonl", "--model=exports/own"],
    ["generate", *EAGER, "--prompt-file", "prompt.txt", "--model", "runs/pretrain"],
]
"""From a corpus that is worth two workers to what the models say."""

WORDS = "Der Wert w\u00e4re na\u00efv. \u65e5\u672c\u8a9e \U0001f600\u2028\n\n"

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux plays the other systems")


def elsewhere() -> dict[str, str]:
    """The environment of a process that is not on a POSIX system."""
    package = str(Path(nope_gpt.__file__).parents[1])
    return ASCII | {"PYTHONPATH": os.pathsep.join([str(ELSEWHERE), package])}


def told(directory: Path, environment: dict[str, str]) -> tuple[list[bytes], dict[str, str]]:
    """Let the story happen in a directory: what it printed, and the hashes of what it made."""
    directory.mkdir()
    (directory / "corpus").mkdir()
    for number in range(2):
        content = f"{WORDS * 180_000}{number}\n"
        (directory / "corpus" / f"{number}.txt").write_bytes(content.encode())
    turns = [{"role": "user", "content": WORDS}, {"role": "assistant", "content": "Ja."}]
    row = json.dumps({"messages": turns}, ensure_ascii=False)
    (directory / "chats.jsonl").write_bytes((row + "\n").encode() * 40)
    (directory / "prompt.txt").write_bytes(WORDS.encode())
    (directory / "prompts.jsonl").write_bytes((json.dumps({"prompt": WORDS}) + "\n").encode())
    printed = []
    for words in STORY:
        done = subprocess.run(
            [sys.executable, "-m", "nope_gpt.cli", *words],
            cwd=directory,
            env=os.environ | environment,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        printed.append(done.stdout)
    made = {
        file.relative_to(directory).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in directory.rglob("*")
        if file.suffix == ".npy" or file.name in SAME
    }
    return printed, made


SAME = {
    *("config.json", "tokenizer.json", "out.jsonl"),
    *("model.safetensors", "optimizer.safetensors"),
}
"""What holds neither times nor dates, nor a header in any order, as an adapter does."""

IMPORTS = """
import importlib, pkgutil, nope_gpt
for module in pkgutil.walk_packages(nope_gpt.__path__, "nope_gpt."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


@linux
def test_every_module_imports_on_a_system_that_is_not_posix() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        env=os.environ | elsewhere(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@linux
@pytest.mark.slow
def test_a_system_that_is_not_posix_makes_the_same(tmp_path: Path) -> None:
    here = told(tmp_path / "here", {})
    there = told(tmp_path / "there", elsewhere())
    assert here == there
    assert sum(name.endswith("model.safetensors") for name in here[1]) > 4


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfOne.\r\nTwo.\r\n", b"One.\nTwo.\n"])
def test_a_text_is_the_same_from_every_system_s_editor(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    assert read_text(str(tmp_path / "text.txt")) == "One.\nTwo.\n"


def test_a_pipe_gets_utf8_whatever_the_system_s_own_encoding(nope: Nope) -> None:
    for words in (["size", "--help"], ["size", "--memory", "24GB", "--json"]):
        assert nope(*words, env=ASCII).stdout == nope(*words).stdout
    assert not nope("--help", env=ASCII).stdout.isascii()


def test_the_error_of_a_tool_is_told_whatever_the_system_s_own_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tool.py"
    code = 'def fail():\n    """Fail."""\n    raise ValueError("\u00e9\U0001f600")\n'
    file.write_text(code, encoding="utf-8")
    for name, value in ASCII.items():
        monkeypatch.setenv(name, value)
    answer = json.loads(carry_out(Call("fail", {}), load_tools([str(file)])))
    assert answer == {"error": "ValueError: \u00e9\U0001f600"}


def test_files_are_opened_as_bytes_or_as_utf8_with_newlines_as_they_are() -> None:
    """Windows would write its own encoding, and another end of each line."""
    for path in Path(nope_gpt.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            named = {keyword.arg for keyword in node.keywords}
            modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
            where = f"{path.name}:{node.lineno}"
            assert node.func.attr != "write_text", where
            if node.func.attr == "read_text" or "text" in named:
                assert "encoding" in named, where
            if node.func.attr == "open" and modes:
                assert "b" in str(modes[0]), where


def test_an_apple_gpu_is_used_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 16 << 30)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 1 << 30)
    device = resolve_device("auto")
    assert device == torch.device("mps") == resolve_device("mps")
    assert resolve_precision("auto", device) == torch.float32
    assert not has_bfloat16(device)
    assert compilation.obstacle(device) == "torch.compile is not used on Apple GPUs"
    assert not Prefetcher(None, Ranks(0, 0, 1), device).pinned  # type: ignore[arg-type]
    assert memory_of(device) == 15 << 30
    assert peak_flops(device, torch.float32) is None
    refuse_small_memory(device, 15 << 30, "this")
    with pytest.raises(CapacityError, match="and mps has 16.1 GB left"):
        refuse_small_memory(device, 16 << 30, "this")
    with pytest.raises(UsageError, match="this machine has 0 that can be used"):
        refuse_missing_gpus(2, "auto")


class NoFloat64(TorchDispatchMode):
    """A device without numbers of 64 bits, such as Apple's GPUs."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                assert value.dtype != torch.float64, function
        return result


def test_training_and_generating_need_no_numbers_of_64_bits(corpus: Path, tmp_path: Path) -> None:
    dataset = byte_dataset(corpus, tmp_path / "datasets")
    settings = RECIPE | HELPED | {"dataset_path": str(dataset.parent), "max_steps": 3}
    with NoFloat64():
        run = pretrain(PretrainConfig(**settings, run_dir_path=str(tmp_path / "runs")), [])
    model = NoPEGPT.from_pretrained(run)
    with NoFloat64():
        drawn = list(model.generate(torch.tensor([1, 2, 3]), max_tokens=8, temperature=0.7))
    assert drawn
