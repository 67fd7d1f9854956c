"""Amounts as people write and read them."""

from __future__ import annotations

import re

from nope_gpt.errors import UsageError

BYTE_UNITS: dict[str, int] = {"b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024))
}

MOST_MEMORY = 10**18
"""More than any machine has: what is above is a slip of the keyboard."""


def parse_memory(text: str) -> int:
    """Read an amount of memory such as 24GB, 1.5 TiB or 24g as whole bytes.

    KB, MB, GB and TB, or the letter alone, are powers of 1000; KiB to TiB of 1024.

    Raises:
        UsageError: The text is not a number with a unit, or no memory is as small or as large.
    """
    match = re.fullmatch(r"([0-9]{0,15}\.?[0-9]{1,15})\s*([a-z]+)", text.strip().lower())
    amount = round(float(match[1]) * BYTE_UNITS.get(match[2], 0)) if match else 0
    if amount < 1:
        raise UsageError(
            f"{text!r} is not an amount of memory",
            where="--memory",
            hint="write a number above zero and a unit, such as --memory 24GB or --memory 24GiB",
        )
    if amount > MOST_MEMORY:
        raise UsageError(
            f"{text!r} is more memory than there is",
            where="--memory",
            hint="write that of one device, such as --memory 80GB, and --gpus for how many",
        )
    return amount


def format_bytes(amount: int) -> str:
    """An amount of memory in decimal units, such as 24.0 GB."""
    return _shortened(amount, (" B", " KB", " MB", " GB", " TB"))


def format_count(amount: int) -> str:
    """A number of parameters, tokens or operations, such as 408.4M."""
    return _shortened(amount, ("", "K", "M", "B", "T"))


def format_seconds(seconds: float) -> str:
    """A time as people say it, such as 3 h 05 min; of more than two days only days."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{seconds / 86400:,.1f} days"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _shortened(amount: int, units: tuple[str, ...]) -> str:
    """The number to one decimal in the first unit that leaves it below 1000."""
    if amount < 1000:
        return f"{amount}{units[0]}"
    value, unit = float(amount), 0
    while round(value, 1) >= 1000 and unit < len(units) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.1f}{units[unit]}"
