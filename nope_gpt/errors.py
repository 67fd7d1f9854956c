"""The errors a user can cause, each with a message that ends in the next command.

Only `NopeError` is friendly: the command line prints it without a traceback and
exits with its code. Any other exception is a bug and shows where it happened.
"""

from __future__ import annotations


class NopeError(Exception):
    """Something the user can mend.

    Args:
        what: What was seen and what is wrong with it.
        where: The file, flag or address where it was seen.
        hint: The next thing to do, preferably a command to type.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.hint:
            lines.append(f"  next:  {self.hint}")
        return "\n".join(lines)


class UsageError(NopeError):
    """A flag, argument or setting that cannot be meant."""

    exit_code = 2


class MissingError(NopeError):
    """A model, data set, run or file that is not there."""

    exit_code = 3


class CapacityError(NopeError):
    """Something that does not fit in memory or on disk."""

    exit_code = 4


class NetworkError(NopeError):
    """A remote host that could not be reached or refused to answer."""

    exit_code = 5


class Interrupted(NopeError):
    """Work that a signal ended, after everything worth keeping was saved.

    Args:
        what: What was kept.
        exit_code: 130 for an interrupt from the keyboard, 143 for a termination.
    """

    def __init__(self, what: str, *, exit_code: int, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.exit_code = exit_code


def first_line(error: Exception) -> str:
    """What another library's error says, in a line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
