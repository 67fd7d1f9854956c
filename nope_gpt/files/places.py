"""Where this program keeps what is the user's own, by the customs of the system."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_directory() -> Path:
    """What can be made again: compiled code, ranks of tokenizers, what was measured.

    Raises:
        RuntimeError: There is no home directory.
    """
    chosen = os.environ.get("XDG_CACHE_HOME")
    return (Path(chosen) if chosen else Path.home() / ".cache") / "nope-gpt"


def state_directory() -> Path:
    """What lasts: what was typed.

    Raises:
        RuntimeError: There is no home directory.
    """
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "nope-gpt"
    chosen = os.environ.get("XDG_STATE_HOME")
    return (Path(chosen) if chosen else Path.home() / ".local" / "state") / "nope-gpt"
