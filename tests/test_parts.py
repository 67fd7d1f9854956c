"""Several processes at one data set, and what lies in its place: nobody loses anything."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from nope_gpt.config import PrepareConfig
from nope_gpt.data import planning, reading, units
from nope_gpt.data.commit import Prepared
from nope_gpt.data.opening import local_file
from nope_gpt.data.planning import part_of
from nope_gpt.data.prepare import prepare
from nope_gpt.data.schedule import Progress
from nope_gpt.data.shards import Dataset
from nope_gpt.errors import CapacityError, NopeError, UsageError
from nope_gpt.files.artefacts import MANIFEST


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_SIZE", 2_000)
    monkeypatch.setattr(reading, "SPAN_SIZE", 1_000)
    monkeypatch.setattr(planning, "SMALLEST_SHARE", 10**12)


def config(root: Path, **more: Any) -> PrepareConfig:
    return PrepareConfig(**{"dataset_path": str(root), "token_encoding": "bytes"} | more)


def made(names: list[Path], root: Path, **more: Any) -> list[Prepared]:
    return prepare([str(name) for name in names], config(root, **more))


def write(path: Path, count: int = 30, word: str = "line") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"text": f"{word} {number} " * 20} for number in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chats(path: Path) -> Path:
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    return path


def tree(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file()
    }


@contextmanager
def held(root: Path, name: str, part: str) -> Iterator[Path]:
    """What a process that encodes a part holds."""
    staging = root / f"{name}.partial"
    staging.mkdir(parents=True, exist_ok=True)
    with FileLock(staging / f"part-{part}.lock"):
        yield staging


def test_a_part_at_work_keeps_everybody_else_from_its_files(tmp_path: Path) -> None:
    source, root = write(tmp_path / "a.jsonl"), tmp_path / "root"
    made([source], root, shard="0/2")
    with held(root, "a-bytes", "1-of-2") as staging:
        before = tree(staging)
        for more, merge in (({}, False), ({}, True), ({"shard": "0/3"}, False)):
            with pytest.raises(UsageError, match="another process prepares part 1 of 2") as caught:
                prepare([str(source)], config(root, **more), merge=merge)
            assert "--shard I/2" in str(caught.value.hint)
        with pytest.raises(UsageError, match="others prepare this, and its holdout fraction"):
            made([source], root, shard="0/2", holdout_fraction=0.3, overwrite=True)
        assert {name: before[name] for name in before if "lock" not in name} == {
            name: content for name, content in tree(staging).items() if "lock" not in name
        }
    made([source], root, shard="1/2")
    (result,) = prepare([str(source)], config(root), merge=True)
    assert result.statistics["documents"] == 30


def test_a_merge_of_nothing_leaves_nothing(tmp_path: Path) -> None:
    source, root = write(tmp_path / "a.jsonl"), tmp_path / "root"
    with pytest.raises(NopeError, match="groups of files are not encoded yet"):
        prepare([str(source)], config(root), merge=True)
    assert list(root.iterdir()) == []


def test_a_merge_that_comes_too_early_removes_nothing(tmp_path: Path) -> None:
    sources, root = [write(tmp_path / "in" / f"{n}.jsonl", word=str(n)) for n in "ab"], tmp_path
    made([tmp_path / "in"], root, shard="1/2")
    before = tree(root / "in-bytes.partial")
    with pytest.raises(NopeError, match="1 of 2 groups of files are not encoded yet"):
        prepare([str(tmp_path / "in")], config(root), merge=True)
    after = tree(root / "in-bytes.partial")
    assert {name for name in before if "/" in name} == {name for name in after if "/" in name}
    assert len(sources) == 2


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, (3, 4)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "6",
                "SLURM_ARRAY_TASK_COUNT": "8",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            (3, 8),
        ),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        ({"RANK": "1"}, (0, 1)),
        ({}, (0, 1)),
    ],
)
def test_a_job_engines_variables_say_the_part(
    environment: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    part, origin = part_of(PrepareConfig())
    assert part == expected
    assert bool(origin) == (expected != (0, 1))
    assert part_of(PrepareConfig(shard="2/5")) == ((2, 5), "")


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "abc", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "3"},
        {
            "SLURM_ARRAY_TASK_ID": "3",
            "SLURM_ARRAY_TASK_COUNT": "3",
            "SLURM_ARRAY_TASK_STEP": "2",
        },
    ],
)
def test_variables_that_say_no_part_are_named(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=next(iter(environment))) as caught:
        made([write(tmp_path / "a.jsonl")], tmp_path / "root")
    assert "--shard 0/4" in str(caught.value.hint)


def test_one_task_of_an_array_started_again_is_not_taken_for_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, root = write(tmp_path / "a.jsonl"), tmp_path / "root"
    made([source], root, shard="0/4")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "1")
    with pytest.raises(UsageError, match="begun in 4 parts, and SLURM_ARRAY_TASK_ID") as caught:
        made([source], root)
    assert "--shard I/4" in str(caught.value.hint)
    assert made([source], root, shard="3/4") == []


def test_a_part_that_is_from_the_environment_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    notes: list[str] = []
    source = write(tmp_path / "a.jsonl")
    prepare([str(source)], config(tmp_path / "root"), lambda progress: notes.extend(progress.notes))
    assert "part 1 of 2, from RANK and WORLD_SIZE" in notes


def test_standard_input_is_nobodys_part(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="standard input cannot be shared out"):
        prepare(["-"], config(tmp_path / "root", shard="0/2"))


@pytest.mark.parametrize("name", ["mine.partial", "mine.tmp-12ab", "mine.old-7"])
def test_a_name_of_unfinished_work_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="names that end so are of unfinished work"):
        made([write(tmp_path / "a.jsonl")], tmp_path / "root", name=name)


@pytest.mark.parametrize("manifest", [None, {"kind": "checkpoint"}, {"kind": "dataset"}])
def test_only_data_sets_are_replaced_by_data_sets(tmp_path: Path, manifest: Any) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl")
    chats(tmp_path / "in" / "b.jsonl")
    for taken in ("in-bytes", "in-chat-bytes"):
        root = tmp_path / f"root of {taken}"
        (root / taken).mkdir(parents=True)
        (root / taken / "thesis.txt").write_text("years of work")
        if manifest:
            (root / taken / MANIFEST).write_text(json.dumps(manifest))
        if manifest == {"kind": "dataset"}:  # A damaged one, which --overwrite mends.
            assert len(made([tmp_path / "in"], root, overwrite=True)) == 2
            continue
        with pytest.raises(UsageError, match="this holds something else, and is not replaced"):
            made([tmp_path / "in"], root, overwrite=True)
        assert (root / taken / "thesis.txt").read_text() == "years of work"
        assert sorted(path.name for path in root.iterdir()) == [taken]


def test_a_data_set_half_of_which_was_replaced_is_not_already_prepared(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl")
    chats(tmp_path / "in" / "b.jsonl")
    root = tmp_path / "root"
    made([tmp_path / "in"], root)
    old = tree(root / "in-chat-bytes")
    made([tmp_path / "in"], root, holdout_fraction=0.2, overwrite=True)
    for name in tree(root / "in-chat-bytes"):
        (root / "in-chat-bytes" / name).unlink()
    for name, content in old.items():
        (root / "in-chat-bytes" / name).write_bytes(content)
    with pytest.raises(UsageError, match="this already exists") as caught:
        made([tmp_path / "in"], root, holdout_fraction=0.2)
    assert caught.value.where == str(root / "in-chat-bytes")
    results = made([tmp_path / "in"], root, holdout_fraction=0.2, overwrite=True)
    assert [result.existed for result in results] == [False, False]


def test_a_file_that_changes_while_it_is_encoded_is_never_taken_for_what_it_was(
    tmp_path: Path,
) -> None:
    source, root = write(tmp_path / "a.jsonl", 300), tmp_path / "root"
    changed = False

    def change(progress: Progress) -> None:
        nonlocal changed
        if progress.documents and not changed:
            changed = True
            content = source.read_text()
            source.write_text(content.replace("line", "LINE"))

    with pytest.raises(NopeError, match="this file changed while it was being prepared") as caught:
        prepare([str(source)], config(root), change)
    assert caught.value.where == str(source)
    (again,) = made([source], root)
    (fresh,) = made([source], tmp_path / "fresh")
    assert tree(again.path) == tree(fresh.path)


def test_a_trained_tokenizer_follows_the_files_also_after_they_changed(tmp_path: Path) -> None:
    first, second = write(tmp_path / "in" / "a.jsonl"), write(tmp_path / "in" / "b.jsonl", 20, "b")
    root = tmp_path / "root"
    made([tmp_path / "in"], root, token_encoding="bpe:270", shard="0/2")
    write(first, 30, "quite different words")
    (again,) = made([tmp_path / "in"], root, token_encoding="bpe:270")
    (fresh,) = made([tmp_path / "in"], tmp_path / "fresh", token_encoding="bpe:270")
    assert tree(again.path) == tree(fresh.path)
    assert second.exists()


def test_a_mistyped_column_is_mended_by_typing_it_right(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"body": "Some text."}\n')
    for column, error in (("boddy", UsageError), ("body", None)):
        if error:
            with pytest.raises(error, match="neither `messages` nor 'boddy'"):
                made([source], tmp_path / "root", text_column=column)
        else:
            assert len(made([source], tmp_path / "root", text_column=column)) == 1


def test_the_same_text_under_two_names_is_read_once_and_that_is_said(tmp_path: Path) -> None:
    notes: list[str] = []
    names = [str(write(tmp_path / name)) for name in ("a.jsonl", "b.jsonl")]
    root = tmp_path / "root"
    (result,) = prepare(names, config(root), lambda progress: notes.extend(progress.notes))
    assert result.statistics["documents"] == 30
    assert "left out of b: 1 file is the same as an earlier one" in notes
    assert [entry["name"] for entry in result.manifest["recipe"]["sources"]] == ["a"]


def test_what_a_directory_holds_besides_is_said_and_links_are_followed(tmp_path: Path) -> None:
    root = tmp_path / "in"
    write(root / "a.jsonl", word="a")
    write(root / ".cache" / "hidden.jsonl", word="hidden")
    write(tmp_path / "elsewhere" / "b.jsonl", word="b")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "linked" / "back").symlink_to(root)
    (root / "table.csv").write_text("a,b")
    (root / "c.jsonl.gz").write_bytes(b"\x1f\x8b")
    notes: list[str] = []
    (result,) = prepare(
        [str(root)], config(tmp_path / "root"), lambda progress: notes.extend(progress.notes)
    )
    (source,) = result.manifest["recipe"]["sources"]
    assert [file["path"] for file in source["files"]] == ["a.jsonl", "linked/b.jsonl"]
    assert f"left out of {root}: 2 files of other kinds (.csv, .gz)" in notes


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([""], "a source has no name"),
        (["-", "-"], "standard input can be read once"),
        (["pipe"], "this is neither a file nor a directory"),
        (["data/typo.csv"], "there is no such file or directory"),
    ],
)
def test_a_source_that_cannot_be_meant_is_refused(
    tmp_path: Path, names: list[str], message: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NopeError, match=message):
        prepare(names, config(tmp_path / "root"))
    assert not (tmp_path / "root").exists() or not list((tmp_path / "root").iterdir())


def test_a_file_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))
    write(file)
    with pytest.raises(UsageError, match="the name of this file is not UTF-8"):
        made([file], tmp_path / "root")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1_000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(CapacityError, match=r"be prepared takes .*, and the disk has 1.0 KB"):
        made([write(tmp_path / "a.jsonl", 500)], tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []


def test_the_work_of_a_whole_file_has_its_hash_as_its_name(tmp_path: Path) -> None:
    (result,) = made([write(tmp_path / "a.jsonl", 300)], tmp_path / "root")
    (file,) = result.manifest["recipe"]["sources"][0]["files"]
    shards = Dataset.open(result.path).shards
    assert len(shards) > 5
    assert [s.name for s in shards] == [
        f"shard-{file['sha256'][:16]}-{number:04d}" for number in range(len(shards))
    ]


def test_a_merge_leaves_what_parts_have_only_begun(tmp_path: Path) -> None:
    source, root = write(tmp_path / "a.jsonl"), tmp_path / "root"
    assert made([source], root, shard="3/4") == [], "a part of no file"
    with pytest.raises(NopeError, match="groups of files are not encoded yet"):
        prepare([str(source)], config(root), merge=True)
    assert (root / "a-bytes.partial" / "plan.json").is_file()


def test_two_shares_of_the_same_file_are_units_of_different_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    file = local_file(path, path.name, reading.PLAIN_TEXT)
    (whole, *_), rows = reading.spans(path, "a", "a", reading.PLAIN_TEXT), 30
    names = {
        units.digest_of(source, [(file, [dataclasses.replace(whole, selection=selection)])])
        for source, selection in (
            ("x", None),
            ("x", reading.Selection(rows, 10, 7)),
            ("x", reading.Selection(rows, 20, 7)),
            ("y", reading.Selection(rows, 20, 7)),
        )
    }
    assert len(names) == 4
