"""Ranks say the same in every tool's format, and damaged ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_export import CORPUS, exported, sharp

from nope_gpt.errors import NopeError
from nope_gpt.tokenization import BaseTokenizer, ChatTokenizer, byte_pairs, encodings


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("r50k_base", byte_pairs.GPT2_PATTERN),
        ("p50k_base", byte_pairs.GPT2_PATTERN),
        ("cl100k_base", byte_pairs.CL100K_PATTERN),
        ("o200k_base", byte_pairs.O200K_PATTERN),
    ],
)
def test_the_patterns_are_tiktokens_and_every_token_but_a_byte_is_one_merge(
    name: str, pattern: str
) -> None:
    encoding = encodings.published(name)
    assert encoding._pat_str == pattern
    ranks = encoding._mergeable_ranks
    merges = byte_pairs.merges(ranks)
    assert len(merges) == len(ranks) - 256
    assert all(left in ranks and right in ranks for left, right in merges)


@given(st.binary(max_size=40))
def test_bytes_are_spelled_in_letters_and_read_again(content: bytes) -> None:
    text = byte_pairs.spelled(content)
    assert byte_pairs.unspelled(text) == content
    assert not any(letter.isspace() for letter in text)


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "cannot be read": lambda document: document.pop("added_tokens"),
    "cuts text into words in an unknown way": lambda document: document["pre_tokenizer"].update(
        use_regex=False
    ),
    "it does not cut text into words as tiktoken does": lambda document: document[
        "pre_tokenizer"
    ].update(type="Whitespace"),
    "it is not a byte-level BPE": lambda document: document["model"].update(type="WordPiece"),
    "merges in another order than its ranks": lambda document: document["model"][
        "merges"
    ].reverse(),
    "the ranks are not whole": lambda document: document["model"]["vocab"].pop("a"),
    "has no <|endoftext|>": lambda document: (
        document["added_tokens"].pop(0),
        document["model"]["vocab"].pop("<|endoftext|>"),
    ),
    "gives <|endoftext|> the id 17": lambda document: document["added_tokens"][0].update(id=17),
    "gives <|endoftext|> the id -4": lambda document: document["added_tokens"][0].update(id=-4),
    "<|im_end|> is token 900": lambda document: document["added_tokens"][2].update(id=900),
    "AttributeError": lambda document: document.update(model={**document["model"], "vocab": []}),
    "not a whole number": lambda document: document["model"]["vocab"].update(a="b"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_tokenizer_of_hugging_faces_is_refused(tmp_path: Path, message: str) -> None:
    tokenizer = ChatTokenizer(BaseTokenizer.train(CORPUS, 300).encoding)
    model = sharp(tmp_path / "model", vocabulary_size=tokenizer.vocabulary_size)
    tokenizer.save(model)
    place = exported(model, "transformers", tmp_path / "out")
    document = json.loads((place / "tokenizer.json").read_text())
    DAMAGES[message](document)
    (place / "tokenizer.json").write_text(json.dumps(document))
    pattern = "invalid literal" if message == "not a whole number" else message
    with pytest.raises(NopeError, match=pattern.replace("|", r"\|")):
        ChatTokenizer.load(place)


@pytest.mark.parametrize(
    "content", ["null", "[]", "3", '"x"', '{"model": 3}', '{"model": {}}', "{"]
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(NopeError, match="the tokenizer"):
        BaseTokenizer.load(tmp_path)
