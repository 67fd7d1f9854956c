"""Whatever is in a file that is read, it is used or refused, and nothing else happens."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_targets import CONVERSATION, TARGETS, Target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nope_gpt.adaptation.adapters import Adapter, with_adapter
from nope_gpt.chat import transcripts
from nope_gpt.chat.tools import Call, carry_out, load_tools
from nope_gpt.cli import datasets, many
from nope_gpt.cli.terminal import fail
from nope_gpt.config import PretrainConfig
from nope_gpt.config.knobs import read_settings, resolve
from nope_gpt.data.catalog import subset_of
from nope_gpt.data.shards import Dataset
from nope_gpt.errors import NopeError, UsageError
from nope_gpt.export.legacy import read_checkpoint
from nope_gpt.files.json_files import DEEPEST, LARGEST, check, parse_json, read_json
from nope_gpt.hub import storage
from nope_gpt.tokenization import BaseTokenizer
from nope_gpt.training.checkpoints import read_progress
from nope_gpt.training.runs import stored_record

MEMORY = 1 << 30
"""Bytes of addresses that reading a small artefact may take beyond those there are."""

SECONDS = 30


class Late(BaseException):
    """What no reader takes for damage."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """End what takes too long, and have no memory for what allocates too much."""

    def late(*_: object) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        used = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def listing(root: Path) -> set[Path]:
    return set(root.rglob("*"))


NAMES = [
    # The old scripts had tiktoken's encodings alone.
    pytest.param(name, marks=pytest.mark.ranks) if name == "an old checkpoint" else name
    for name in TARGETS
]


@pytest.fixture(scope="module")
def made() -> dict[str, Target]:
    """The artefacts that were written so far."""
    return {}


def target_of(
    name: str, made: dict[str, Target], tmp_path_factory: pytest.TempPathFactory
) -> Target:
    if name not in made:
        made[name] = TARGETS[name](tmp_path_factory.mktemp("hostile") / "artefact")
    return made[name]


EXAMPLES = {"a run": 60, "settings": 100}
"""Of damage in the usual run of the tests; of all others `USUAL`."""

USUAL = 120


@pytest.mark.parametrize("name", NAMES)
def test_any_file_of_an_artefact_may_be_anything(
    name: str, made: dict[str, Target], tmp_path_factory: pytest.TempPathFactory
) -> None:
    target = target_of(name, made, tmp_path_factory)
    target.use(target.path)
    outside = listing(target.path.parent)

    @settings(
        max_examples=EXAMPLES.get(name, USUAL), deadline=None, suppress_health_check=HealthCheck
    )
    @given(chance=st.randoms(use_true_random=False))
    def damaged(chance: random.Random) -> None:
        with bounded():
            target.attempt(chance)

    damaged()
    assert listing(target.path.parent) - outside <= {target.path / "again.jsonl"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_any_file_of_an_artefact_may_be_anything_at_length(
    name: str, made: dict[str, Target], tmp_path_factory: pytest.TempPathFactory
) -> None:
    target = target_of(name, made, tmp_path_factory)
    for seed in range(600):
        with bounded():
            target.attempt(random.Random(seed))


# What fuzzing and reading found, by name


def published(tmp_path: Path) -> Path:
    return TARGETS["a published model"](tmp_path / "model").path


def test_a_tensor_that_is_described_twice_is_refused(tmp_path: Path) -> None:
    file = published(tmp_path) / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    name = next(name for name in json.loads(content[8 : 8 + length]) if name[0] != "_")
    header = json.loads(content[8 : 8 + length])
    text = b'{"%s": %s, ' % (name.encode(), json.dumps(header[name]).encode())
    text += content[9 : 8 + length]
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(NopeError, match="twice"):
        storage.load(file.parent)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such pipes")
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", storage.load),
        ("tokenizer.json", BaseTokenizer.load),
        ("tokenizer.tiktoken", BaseTokenizer.load),
        ("model.safetensors", storage.load),
        ("manifest.json", Dataset.open),
        ("run.json", lambda path: stored_record(path, "pretrain")),
        ("state.json", read_progress),
    ],
)
def test_a_pipe_in_the_place_of_a_file_is_never_waited_for(
    tmp_path: Path, name: str, read: Callable[[Path], object]
) -> None:
    path = published(tmp_path)
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    with bounded(), pytest.raises(NopeError):
        read(path)


def test_json_is_read_within_bounds(tmp_path: Path) -> None:
    deep = "[" * DEEPEST + "]" * DEEPEST
    assert parse_json(deep)
    with pytest.raises(ValueError, match="within each other"):
        parse_json(f"[{deep}]")
    with pytest.raises(ValueError, match="'a' twice"):
        parse_json('[{"a": 1, "b": 2, "a": 1}]')
    (tmp_path / "half.json").write_text(r'{"a\ud83d": "\ud83d\ude00"}')
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        read_json(tmp_path / "half.json")
    (tmp_path / "whole.json").write_text(r'{"a": "\ud83d\ude00"}')
    assert read_json(tmp_path / "whole.json") == {"a": "\N{GRINNING FACE}"}
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(LARGEST + 1)
    with bounded(), pytest.raises(ValueError, match="it has 536,870,913 bytes"):
        read_json(tmp_path / "large.json")


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": {"b": [1, 2]}}, ""),
        ({"a": {"b": [1, 2]}, "c": None}, ""),
        ({"a": {"b": [1, 2]}, "c": 1.5}, ""),
        ({"a": {"b": [1, True]}}, r"a.b\[1\]"),
        ({"a": {"b": [1, -1]}}, r"a.b\[1\]"),
        ({"a": {"b": [1, 1 << 63]}}, r"a.b\[1\]"),
        ({"a": {"b": {}}}, "a.b"),
        ({"a": {}, "d": {"b": 1}}, "d.b"),
        ({"d": {}}, "a"),
        ({"a": {}, "c": "x"}, "c"),
        ([], "it"),
    ],
)
def test_the_part_that_does_not_fit_its_pattern_is_named(value: Any, place: str) -> None:
    pattern = {"a": {...: [int]}, "c": (float,), ...: {"b": list}}
    if not place:
        check(value, pattern)
        return
    with pytest.raises(ValueError, match=rf"^{place} is wrong or missing"):
        check(value, pattern)


@pytest.mark.parametrize(
    "line",
    [
        f"seed = {'9' * 5000}",
        f"seed = 0x{'f' * 5000}",
        f"learning_rate = {'9' * 400}",
        f"{'.'.join(['seed'] * 1500)} = 1",
        f"seed = {[[]] * 3}",
        'run_name = "\\u0000"',
    ],
    ids=["digits", "hexadecimal", "beyond a float", "deep", "a list", "a byte that no name has"],
)
def test_a_setting_of_any_size_is_refused_in_a_few_words(tmp_path: Path, line: str) -> None:
    (tmp_path / "settings.toml").write_text(line)
    with pytest.raises(UsageError) as caught:
        resolve(PretrainConfig, [("settings.toml", read_settings(tmp_path / "settings.toml"))])
    assert len(str(caught.value)) < 400


def test_a_transcript_comes_back_whatever_was_said(tmp_path: Path) -> None:
    said = "a\u2028b\x85c\x0cd\x1ce\ud800f\r\n\x00"
    messages = [*CONVERSATION, {"role": "user", "content": said}]
    transcripts.save(tmp_path / "chat.jsonl", messages, {})
    assert transcripts.load(tmp_path / "chat.jsonl") == messages
    transcripts.add(tmp_path / "chat.jsonl", messages, {"model": said})
    assert transcripts.load(tmp_path / "chat.jsonl") == messages


OTHER_FILES = {
    "a note": b"The rent is due.\nCall the bank",
    "a picture": b"\x89PNG\r\n\x1a\n\xff\xfe",
    "an object": b'{"name": "project"}',
    "a line that is no next one": b'{"prompt": "a", "text": "b"}\n{"prompt": "z", "te',
    "more than is asked for": b'{"prompt": "a", "text": "b"}\n{"prompt": "c", "text": "d"}\n{"p',
}


@pytest.mark.parametrize("content", OTHER_FILES.values(), ids=OTHER_FILES.keys())
def test_an_output_that_is_something_else_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "output.jsonl"
    file.write_bytes(content)
    with pytest.raises(NopeError):
        many.kept_lines(file, [{"prompt": "a"}, {"prompt": "c"}], "text")
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    "rest", ["", "{", '{"prom', '{"prompt": "\\ud800', '{"prompt": "\\ud800", "t']
)
def test_a_line_that_a_kill_cut_short_is_cut_off(tmp_path: Path, rest: str) -> None:
    file = tmp_path / "output.jsonl"
    file.write_text('{"prompt": "a", "text": "b"}\n' + rest)
    assert many.kept_lines(file, [{"prompt": "a"}, {"prompt": "\ud800"}], "text") == 1
    assert file.read_text() == '{"prompt": "a", "text": "b"}\n'


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("os.write(1, b'hello')", "gave no result"),
        ("os._exit(0)", "gave no result"),
        ("os.write(2, bytes([255, 10])); os._exit(3)", "\ufffd"),
    ],
)
def test_a_tool_that_goes_past_its_streams_is_told_to_the_model(
    tmp_path: Path, body: str, told: str
) -> None:
    file = tmp_path / "tools.py"
    file.write_text(f'import os\n\ndef act() -> int:\n    """Act."""\n    {body}\n    return 1\n')
    answer = json.loads(carry_out(Call("act", {}), load_tools([str(file)])))
    assert told in answer["error"]


def test_no_escape_in_an_error_reaches_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    steering = "\x1b]0;title\x07\x9b31m\r"
    with pytest.raises(SystemExit):
        fail(NopeError(f"a{steering}b", where=f"c{steering}", hint=f"d{steering}"))
    shown = capsys.readouterr().err
    assert not set(steering[:1] + "\x07\x9b\r") & set(shown)
    assert "title" in shown


def edited(path: Path, change: Any) -> Path:
    """A data set whose manifest is another."""
    document = json.loads((path / "manifest.json").read_text())
    change(document)
    (path / "manifest.json").write_text(json.dumps(document))
    return path


def test_a_shard_is_never_read_from_another_directory(tmp_path: Path) -> None:
    path = TARGETS["texts"](tmp_path / "data").path
    name = json.loads((path / "manifest.json").read_text())["shards"][0]["name"]
    for part in ("tokens", "ends"):
        file = path / f"{name}.{part}.npy"
        (path.parent / file.name).write_bytes(file.read_bytes())
        file.unlink()
    edited(path, lambda m: m["shards"][0].update(name=f"../{name}"))
    edited(path, lambda m: [m["files"].pop(f"{name}.{part}.npy") for part in ("tokens", "ends")])
    with pytest.raises(NopeError, match="this shard cannot be read") as caught:
        Dataset.open(path).shards[0].document(0)
    assert Path(str(caught.value.where)).parent == path


@pytest.mark.parametrize("order", [[3, 2], [-1, 0], [0, 1]])
def test_documents_that_do_not_follow_each_other_are_refused(
    tmp_path: Path, order: list[int]
) -> None:
    import numpy as np

    path = TARGETS["texts"](tmp_path / "data").path
    (file,) = path.glob("*.ends.npy")
    ends = np.load(file)
    ends[:2] = order
    ends[-1] -= order == [0, 1]
    np.save(file, ends)
    with pytest.raises(NopeError, match="not in order"):
        Dataset.open(path).shards[0].document(0)


@pytest.mark.parametrize(
    "damage",
    [
        {"step": -1},
        {"step": "3"},
        {"tokens": None},
        {"recent_losses": ["x"]},
        {"more": 1},
        {"rotary": 1},
    ],
)
def test_a_run_whose_state_is_not_one_is_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"step": 3, "seconds": 1, "tokens": 48}))
    assert read_progress(tmp_path).data_step == 3
    (tmp_path / "state.json").write_text(json.dumps(damage))
    with pytest.raises(NopeError, match="the state of this run cannot be read"):
        read_progress(tmp_path)


@pytest.mark.parametrize("record", [[], {}, {"config": []}, {"config": {}, "facts": "x"}])
def test_a_run_whose_settings_are_none_is_refused(tmp_path: Path, record: Any) -> None:
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(NopeError, match="settings are damaged"):
        stored_record(tmp_path, "pretrain")


@pytest.mark.parametrize("change", [lambda m: m["shards"].pop(), lambda m: m["shards"].reverse()])
def test_shards_that_are_no_pairs_are_refused(tmp_path: Path, change: Any) -> None:
    path = TARGETS["pairs"](tmp_path / "data").path
    edited(path, lambda manifest: manifest["shards"][0].update(train_documents=0))
    with pytest.raises(NopeError, match="not pairs"):
        _ = Dataset.open(edited(path, change)).sides


def test_a_data_set_of_no_lengths_is_told_as_such(tmp_path: Path) -> None:
    path = edited(
        TARGETS["texts"](tmp_path / "data").path,
        lambda manifest: manifest["statistics"].update(lengths=[0, 0]),
    )
    assert datasets.report(Dataset.open(path).manifest).endswith(" 0")


def test_a_tokenizer_of_long_tokens_is_read_in_little_time(tmp_path: Path) -> None:
    from nope_gpt.tokenization.byte_pairs import GPT2_PATTERN, merges, tokenizer_json

    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"x" * 2**power: 255 + power for power in range(1, 15)}
    special = {"<|endoftext|>": len(ranks)}
    document = json.dumps(tokenizer_json(ranks, GPT2_PATTERN, special, {}))
    (tmp_path / "tokenizer.json").write_text(document)
    assert len(document) < 100_000
    with bounded():
        assert BaseTokenizer.load(tmp_path).vocabulary_size == 271
        assert merges(ranks)[-1] == (b"x" * 2**13, b"x" * 2**13)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("decoder.layers.0.attention.q_proj", 1 << 40, "1,099,511,627,476 tokens more than"),
        ("decoder.layers.0.attention.q_proj", 300, "does not fit the model"),
        ("decoder.layers.9.attention.q_proj", 300, "does not fit the model"),
    ],
)
def test_an_adapter_for_a_model_of_another_shape_is_refused(
    tmp_path: Path, name: str, size: int, message: str
) -> None:
    tensors = {f"{name}.lora_a": torch.ones(2, 31), f"{name}.lora_b": torch.ones(32, 2)}
    adapter = Adapter(tensors, 1.0, 0.0, "base", "", "", size)
    with bounded(), pytest.raises(NopeError, match=message):
        with_adapter(storage.load(published(tmp_path)), adapter)


def test_a_readme_that_stands_for_a_million_patterns_is_refused() -> None:
    files = "{a,b}" * 60 + ".jsonl"
    with bounded(), pytest.raises(ValueError, match="more than 1,000 patterns"):
        subset_of({"config_name": "all", "data_files": files}, "label")
    found = subset_of({"config_name": "all", "data_files": "{a,b}/{c,d}.jsonl"}, "label")
    assert found.splits["train"] == ("a/c.jsonl", "a/d.jsonl", "b/c.jsonl", "b/d.jsonl")


def test_few_numbers_that_are_said_to_be_many_are_refused(tmp_path: Path) -> None:
    many_rows = torch.zeros(1).expand(1 << 40)
    args = {"embedding_dimensions": 8, "num_q_heads": 1, "num_kv_heads": 1}
    args |= {"num_decoder_layers": 1, "hidden_ratio": 1}
    record = {"model": {"decoder.layers.0.norm1.weight": many_rows}, "model_args": args}
    torch.save(record, tmp_path / "old.pt")
    with bounded(), pytest.raises(NopeError, match="would take 4.4 TB"):
        read_checkpoint(tmp_path / "old.pt")
