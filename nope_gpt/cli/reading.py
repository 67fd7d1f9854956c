"""Reading the texts that a command line names, as `nope prepare` reads them."""

from __future__ import annotations

import sys
from pathlib import Path

from nope_gpt.errors import MissingError, NopeError


def read_text(name: str) -> str:
    """The text of a file, or for - of standard input, from any system's editor.

    Raises:
        MissingError: There is no such file.
        NopeError: It cannot be read, or is not UTF-8.
    """
    from nope_gpt.data.reading import decoded

    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except FileNotFoundError:
        raise MissingError("there is no such file", where=name) from None
    except OSError as error:
        raise NopeError(f"cannot be read: {error.strerror}", where=name) from None
    return decoded(content, "standard input" if name == "-" else name)
