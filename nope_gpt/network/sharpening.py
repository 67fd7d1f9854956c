"""How much sharper attention is to be in contexts that are longer than was trained.

Among more keys the same scores spread attention wider. A factor on the scores makes up for some
of that: one for the whole context (Wang et al. 2024, section 2.4), or one that grows with the keys
that a token sees (as in Llama 4). `nope eval --calibrate` finds which, if any, helps a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nope_gpt.errors import NopeError
from nope_gpt.files.json_files import DAMAGE

SETTING = "attention_scales"
"""The key of config.json."""

LOWEST, HIGHEST = 0.1, 10.0
"""That a scale can be."""


class Growth(NamedTuple):
    """A factor that grows with the keys that a query sees, from 1 at some length.

    Attributes:
        rate: What it grows by where the keys are e times as many.
        length: Keys up to which it is 1.
    """

    rate: float
    length: int

    def factors(self, num_keys: Tensor) -> Tensor:
        """1 + rate * ln(keys / length) for each number of keys beyond the length, float32."""
        return 1.0 + self.rate * torch.log((num_keys / self.length).clamp(min=1.0))

    def applied(self, q: Tensor) -> Tensor:
        """Queries [B, H, T, D] that each see the tokens up to their own, multiplied by theirs."""
        num_keys = torch.arange(1, q.size(2) + 1, device=q.device)
        return q * self.factors(num_keys)[:, None].type_as(q)


class Sharpening(NamedTuple):
    """What scores are multiplied by.

    Attributes:
        scale: All of them.
        growth: The rate of a `Growth` from the trained length on.
    """

    scale: float = 1.0
    growth: float = 0.0

    @property
    def told(self) -> str:
        """For people."""
        if self.growth:
            return f"1 + {self.growth:g} ln(n/T)"
        return f"{self.scale:g}"

    def as_setting(self) -> dict[str, float]:
        """What config.json says of it: what is not as it always was."""
        return {
            name: value
            for name, value in self._asdict().items()
            if value != self._field_defaults[name]
        }


NONE = Sharpening()


def scaled_heads(weight: Tensor, scales: Tensor) -> Tensor:
    """Queries' weights [H * D, C] that make each head's scores `scales` [H] times as large."""
    rows = scales.float().repeat_interleave(len(weight) // len(scales))
    return (weight.float() * rows[:, None]).type_as(weight)


def for_context(
    known: Mapping[int, Sharpening], trained_length: int | None, length: int
) -> Sharpening:
    """What a context of some length asks for.

    Within what was trained that is nothing; else it is what was found for the next length that
    any was found for, or for the longest.
    """
    if not known or trained_length is None or length <= trained_length:
        return NONE
    return known[min((found for found in known if found >= length), default=max(known))]


def stated_in(settings: Mapping[str, Any], where: str) -> dict[int, Sharpening]:
    """What a config.json says, by length in tokens.

    Raises:
        NopeError: Something else than positive numbers of lengths.
    """
    try:
        found = {
            int(length): Sharpening(**{name: float(value) for name, value in dict(stated).items()})
            for length, stated in dict(settings.get(SETTING, {})).items()
        }
    except DAMAGE as error:
        reason = f"{type(error).__name__}: {error}"
        raise NopeError(f"{SETTING} are no scales ({reason})", where=where) from None
    for length, (scale, growth) in found.items():
        if length < 1 or not LOWEST <= scale <= HIGHEST or not 0.0 <= growth <= HIGHEST:
            raise NopeError(
                f"{SETTING} say scale {scale:g} and growth {growth:g} for {length}, and must be "
                f"from {LOWEST:g} to {HIGHEST:g}, and from 0 to {HIGHEST:g}",
                where=where,
            )
    return found


def as_setting(known: Mapping[int, Sharpening]) -> dict[str, dict[str, float]]:
    """What a config.json is to say."""
    return {str(length): known[length].as_setting() for length in sorted(known)}
