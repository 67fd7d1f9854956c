"""How an export compares with its source, kept beside it as parity.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from nope_gpt.errors import NopeError
from nope_gpt.files.artefacts import DESCRIPTION, PARITY
from nope_gpt.files.json_files import DAMAGE, check, read_json
from nope_gpt.files.writing import write_json

NUM_CONTINUED = 24
"""Tokens that are continued with."""


@dataclass(frozen=True)
class Report:
    """How an artefact compares with its source.

    Attributes:
        read_by: What read it.
        num_tokens: Whose logits were compared.
        largest_error: Between two logits.
        largest_logit: Of the source.
        divergence: Nats from the source's distributions to the artefact's, in the mean.
        likeliest: Share of tokens after which both find the same one likeliest.
        continued: Of `NUM_CONTINUED` tokens that the artefact finds likeliest one after the other,
            those that are the source's likeliest too, or as likely within the tolerance.
        num_texts: Whose tokens were compared.
        texts: Those that have the same tokens in both.
        complaints: What is beyond the tolerance; empty if it passed.
    """

    read_by: str
    num_tokens: int
    largest_error: float
    largest_logit: float
    divergence: float
    likeliest: float
    continued: int
    num_texts: int
    texts: int
    complaints: tuple[str, ...]

    @property
    def line(self) -> str:
        """The report for people."""
        return (
            f"read by {self.read_by}: largest error {self.largest_error:.1e} of logits up to "
            f"{self.largest_logit:.1f} (KL {self.divergence:.1e}), {self.continued}/"
            f"{NUM_CONTINUED} greedy tokens, {self.texts}/{self.num_texts} texts with equal tokens"
        )

    @classmethod
    def of(cls, told: dict[str, Any]) -> Self:
        """What `as_dict` gave; what it does not know is passed over."""
        known = {field.name: told[field.name] for field in fields(cls)}
        return cls(**known | {"complaints": tuple(told["complaints"])})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"complaints": list(self.complaints)}


PATTERN = {
    "format": str,
    "version": str,
    "asked": dict,
    "reports": [
        {
            "read_by": str,
            **dict.fromkeys(("largest_error", "largest_logit", "divergence", "likeliest"), float),
            **dict.fromkeys(("num_tokens", "continued", "num_texts", "texts"), int),
            "complaints": [str],
        }
    ],
    "files": {...: DESCRIPTION},
}
"""What a record must hold."""


@dataclass(frozen=True)
class Record:
    """What is known of an export.

    Attributes:
        format: Of it.
        version: Of the program that wrote it.
        asked: What it depends on.
        reports: How it compares with its source, by each of its readers.
        files: The size and the sha256 of each, by name.
    """

    format: str
    version: str
    asked: dict[str, Any]
    reports: list[Report]
    files: dict[str, dict[str, Any]]

    def write(self, directory: Path) -> None:
        """Keep it beside the files."""
        value = {field: getattr(self, field) for field in PATTERN}
        write_json(
            directory / PARITY,
            value | {"reports": [report.as_dict() for report in self.reports]},
        )

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The record in a directory.

        Raises:
            NopeError: There is none, or it is damaged.
        """
        try:
            found = read_json(directory / PARITY)
            check(found, PATTERN)
            reports = [Report.of(report) for report in found["reports"]]
            files = {Path(name).name: entry for name, entry in found["files"].items()}
            told = {name: found[name] for name in ("format", "version", "asked")}
        except DAMAGE as error:
            raise NopeError(
                f"the record of the comparison is damaged ({type(error).__name__})",
                where=str(directory / PARITY),
            ) from None
        return cls(**told, reports=reports, files=files)
