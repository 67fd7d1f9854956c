"""docs/formats.md names what is written."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from nope_gpt.adaptation import adapters
from nope_gpt.evaluation import record
from nope_gpt.files import artefacts
from nope_gpt.hub import locating, published_layout, storage
from nope_gpt.hub.history import METRICS, STATE
from nope_gpt.training.checkpoints import OPTIMIZER, Progress
from nope_gpt.training.objectives import Preference, Recalling
from nope_gpt.training.reporting import StepReport, hold_out_key, key_of

PAGE = (Path(__file__).parent.parent / "docs" / "formats.md").read_text(encoding="utf-8")


def named_after(beginning: str) -> set[str]:
    """What stands in code in the paragraph or the row that begins so."""
    start = PAGE.index(beginning)
    ends = [PAGE.find(end, start) for end in ("\n\n", "|\n")]
    return set(re.findall(r"`(\w+)`", PAGE[start : min(end for end in ends if end >= 0)]))


def test_the_state_of_a_checkpoint_is_named_whole() -> None:
    fields = {field.name for field in dataclasses.fields(Progress)}
    assert fields <= named_after("`state.json` holds")


def test_every_figure_of_a_log_is_named() -> None:
    named = named_after("| `metrics.jsonl` |")
    told = {field.name for field in dataclasses.fields(StepReport)} - {"objective", "figures"}
    assert told <= named
    assert {key_of(name) for name in (*Recalling.figures, *Preference.figures)} <= named
    assert hold_out_key("Recall Loss") in named


@pytest.mark.parametrize(
    "name",
    [
        artefacts.MANIFEST, artefacts.PARITY, locating.CONFIG, locating.WEIGHTS, locating.INDEX,
        locating.TOKENIZER, locating.RANKS, locating.RUN, locating.HISTORY, locating.HOLDER,
        locating.LOCK, METRICS, STATE, OPTIMIZER, adapters.TENSORS, adapters.SETTINGS,
        record.RECORD, record.PICTURE,
    ],
)  # fmt: skip
def test_every_file_is_named(name: str) -> None:
    assert f"`{name}`" in PAGE


@pytest.mark.parametrize(
    "key", [storage.ROTARY, published_layout.FIRST_TOKEN, "trained_context_length"]
)
def test_every_key_that_the_published_files_lack_is_named(key: str) -> None:
    assert f"`{key}`" in PAGE
