"""Fuzzing by atheris, which keeps what reaches new code: `make fuzz`.

What is damaged, and what reads it, is that of `tests/hostile_targets.py`. A finding ends it with a
traceback, and leaves its input as `crash-...` in the working directory: give that file to the
script to see it again.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


class Drawn:
    """Draws from the bytes that the fuzzer makes; see `hostile.Chance`."""

    def __init__(self, content: bytes) -> None:
        self.provider = atheris.FuzzedDataProvider(content)

    def randrange(self, stop: int) -> int:
        """A whole number below another."""
        return int(self.provider.ConsumeIntInRange(0, stop - 1))

    def choice(self, items: Sequence[Any]) -> Any:
        """One of some items; `IndexError` if there is none, as of `random.Random`."""
        if not items:
            raise IndexError
        return items[self.randrange(len(items))]

    def randbytes(self, count: int) -> bytes:
        """Bytes, fewer if there are none left."""
        return bytes(self.provider.ConsumeBytes(count))


def fuzz(*names: str) -> None:
    """Damage some of the targets for as long as the command line says, in libFuzzer's flags."""
    with atheris.instrument_imports(include=["nope_gpt"]):
        from hostile_targets import TARGETS

    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as root:
        targets = [TARGETS[name](Path(root) / str(index)) for index, name in enumerate(names)]

        def once(content: bytes) -> None:
            drawn = Drawn(content)
            drawn.choice(targets).attempt(drawn)

        limits = ["-timeout=30", "-rss_limit_mb=4096", "-max_len=4096", "-len_control=0"]
        atheris.Setup([*sys.argv, *limits], once)
        atheris.Fuzz()
