"""What the names that `prepare` is given mean, as far as they lie on this machine."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nope_gpt.config import PrepareConfig
from nope_gpt.data.corpus import groups_of
from nope_gpt.data.digests import Digest
from nope_gpt.data.documents import MESSAGES, PAIRS, document_of
from nope_gpt.data.opening import Request, open_sources
from nope_gpt.data.planning import base_name, plain
from nope_gpt.data.reading import PLAIN_TEXT, rows, spans
from nope_gpt.data.sources import Source
from nope_gpt.errors import MissingError, UsageError

NOTES: list[str] = []
"""What was left out, of all sources that were opened."""

CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]


def opened(*names: object, column: str = "text", spool: str = "spool") -> list[Source]:
    request = Request([str(name) for name in names], column)
    return open_sources(request, Path(spool), NOTES.append)


def documents(source: Source) -> list[Any]:
    """The documents of a source whose files are here."""
    found = []
    for file in source.files:
        assert file.path is not None
        assert file.schema is not None
        for span in spans(file.path, file.name, file.shown, file.schema):
            found += [document_of(row, span.schema) for _, row in rows(span)]
    return found


def write_lines(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def test_a_file_is_a_source_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (source,) = opened(tmp_path / "a.txt")
    (file,) = source.files
    assert (source.name, file.name, file.size, file.schema) == ("a", "a.txt", 5, PLAIN_TEXT)
    digest = hashlib.sha256(b"hello").hexdigest()
    assert file.record == {"path": "a.txt", "size": 5, "sha256": digest}
    assert source.record == {"name": "a", "files": [file.record]}


def test_a_digest_is_what_the_hub_and_git_state(tmp_path: Path) -> None:
    path = tmp_path / "hello.txt"
    path.write_bytes(b"hello\n")
    blob = Digest("git:ce013625030ba8dba906f756967f9e9ca394464a")  # By `git hash-object`.
    whole = Digest.of("sha256", hashlib.sha256(b"hello\n").hexdigest())
    assert blob.is_of(path) and whole.is_of(path) and Digest.of_file(path) == whole
    for digest in (blob, whole):
        assert digest.is_well_formed
        assert not Digest(digest[:-1]).is_well_formed
        assert Digest.in_record(digest.record | {"size": 6}) == digest
    path.write_bytes(b"hello!")
    assert not blob.is_of(path) and not whole.is_of(path)


def test_sources_keep_their_order(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("z.txt", "a.txt", "m.txt")]
    for path in paths:
        path.write_text(path.stem)
    assert [source.name for source in opened(*paths)] == ["z", "a", "m"]


def test_a_directory_is_one_source_for_each_kind_of_content(tmp_path: Path) -> None:
    root = tmp_path / "my corpus"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "b.txt").write_text("b")
    (root / "a.md").write_text("a")
    (root / "deep" / "er" / "c.TXT").write_text("c")
    (root / "picture.png").write_bytes(b"\x89PNG\xff")
    (root / "folder.txt").mkdir()
    write_lines(root / "chats.jsonl", [{"messages": CHAT}])
    write_lines(root / "more.jsonl", [{"text": "d"}])
    pair = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
    write_lines(root / "pairs.jsonl", [pair])
    found = {source.files[0].schema: source for source in opened(root)}
    assert {source.name for source in found.values()} == {"my corpus"}
    text = found[PLAIN_TEXT]
    assert [file.name for file in text.files] == ["a.md", "b.txt", "deep/er/c.TXT", "more.jsonl"]
    assert documents(text) == ["a", "b", "c", "d"]
    assert [file.name for file in found[MESSAGES].files] == ["chats.jsonl"]
    assert [file.name for file in found[PAIRS].files] == ["pairs.jsonl"]


def test_a_file_with_the_bytes_of_an_earlier_one_is_read_once(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("same" if name != "c.txt" else "other")
    (source,) = opened(tmp_path)
    assert [file.name for file in source.files] == ["a.txt", "c.txt"]
    assert NOTES[-1] == f"left out of {tmp_path.name}: 1 file is the same as an earlier one"


def test_standard_input_is_kept_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    piped = io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfone\r\ntwo \xc3\xa9"))
    monkeypatch.setattr(sys, "stdin", piped)
    (source,) = opened("-")
    assert (source.name, source.files[0].shown) == ("stdin", "standard input")
    for _ in range(2):  # To train a tokenizer, and to encode.
        assert documents(source) == ["one\ntwo é"]


@pytest.mark.slow
def test_python_docs_are_a_source_of_prose_and_one_of_conversations() -> None:
    prose, chats = opened("python-docs")
    assert (prose.name, chats.name) == ("python-docs", "python-docs")
    question = documents(chats)[0]
    assert [message["role"] for message in question.messages] == ["user", "assistant"]
    assert isinstance(documents(prose)[0], str)
    again = opened("python-docs", spool="elsewhere")
    assert [s.record for s in again] == [prose.record, chats.record], "the same every time"


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no such file or directory") as caught:
        opened(tmp_path / "nothing.txt")
    assert caught.value.where == str(tmp_path / "nothing.txt")
    assert "python-docs" in str(caught.value.hint)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match=r"no \.txt, \.md, \.jsonl, \.parquet file is in"):
        opened(tmp_path / "empty")


def test_a_file_of_another_kind_is_refused_with_a_way_to_read_it(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<p>")
    with pytest.raises(UsageError, match=r"end in '\.html' cannot be read") as caught:
        opened(tmp_path / "page.html")
    assert "nope prepare - < page.html" in str(caught.value.hint)


def test_small_files_in_a_row_are_encoded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nope_gpt.data.units.UNIT_SIZE", 100)
    for number, size in enumerate((40, 60, 1, 250, 99, 2)):
        (tmp_path / f"{number}.txt").write_text(str(number) * size)
    groups = groups_of(opened(tmp_path))
    found = [[file.name[0] for file in group.files] for group in groups]
    assert found == [["0", "1"], ["2"], ["3"], ["4"], ["5"]]
    assert [group.index for group in groups] == list(range(5))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("my corpus", "my-corpus"), ("../x", "x"), ("..", "data"), ("", "data"), ("a/b", "a-b"),
     ("über_1.5", "über_1.5"), ("-rf", "rf"), ("a\n", "a")],
)  # fmt: skip
def test_a_directorys_name_is_made_plain(name: str, expected: str) -> None:
    assert plain(name) == expected


@pytest.mark.parametrize(
    ("source", "subset", "expected"),
    [
        ("fineweb", None, "fineweb-sample-10BT-bytes"),
        ("fineweb", "none", "fineweb-bytes"),
        ("fineweb", "sample-100BT", "fineweb-sample-100BT-bytes"),
        ("smoltalk", None, "smoltalk-bytes"),
        ("smoltalk", "longalign", "smoltalk-longalign-bytes"),
        ("smoltalk", "longalign,smol-rewrite", "smoltalk-bytes"),
        ("smoltalk", "longalign:0.5", "smoltalk-bytes"),
        ("ultrafeedback", None, "ultrafeedback-bytes"),
        ("ultrafeedback", "prefs", "ultrafeedback-prefs-bytes"),
        ("HuggingFaceFW/fineweb", None, "fineweb-sample-10BT-bytes"),
        ("org/name", None, "name-bytes"),
        ("-", None, "stdin-bytes"),
        ("some/where/book.txt", None, "book-bytes"),
    ],
)
def test_a_data_set_is_named_after_source_subset_and_encoding(
    source: str, subset: str | None, expected: str
) -> None:
    config = PrepareConfig(token_encoding="bytes", dataset_subset=subset)
    assert base_name([source], config) == expected
