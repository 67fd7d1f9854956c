"""What a data set holds, from its manifest: for `nope prepare` and `nope inspect`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Json = dict[str, Any]

COUNTS = ("documents", "holdout_documents", "tokens", "text_bytes", "cut", "duplicates", "dropped")

STATISTICS: dict[str, Any] = dict.fromkeys(COUNTS, int)
STATISTICS |= {"refused": {...: {"count": int, "first": str}}, "lengths": [int]}
FILE = {"path": str, "size": int, "sha256": (str,), "git": (str,)}
SOURCE = {"name": str, "files": [FILE], "repo": (str,), "revision": (str,)}
"""What a manifest says of what is in it, and of where that comes from."""


def statistics(units: Iterable[Json]) -> Json:
    """Add up the records of units.

    Returns:
        `documents`, those of them held out, `tokens`, `text_bytes` (of their text, in UTF-8),
        `cut` (conversations that lost their last messages), `duplicates` (documents that
        repeat another of the same unit), `dropped` (repeated ones left out), `refused` (how
        many by reason, and where the first is) and `lengths` (documents of 2^k to
        2^(k+1) - 1 tokens, for k from 0).
    """
    result: Json = dict.fromkeys(COUNTS, 0) | {"refused": {}, "lengths": []}
    for unit in units:
        for name in COUNTS:
            result[name] += unit[name]
        for reason, (count, where) in unit["refused"].items():
            entry = result["refused"].setdefault(reason, {"count": 0, "first": where})
            entry["count"] += count
        longer, other = sorted((result["lengths"], unit["lengths"]), key=len, reverse=True)
        result["lengths"] = [
            count + (other[power] if power < len(other) else 0)
            for power, count in enumerate(longer)
        ]
    return result


def num_refused(stats: Json) -> int:
    """Documents that were not used."""
    return sum(entry["count"] for entry in stats["refused"].values())


def bytes_per_token(stats: Json) -> float:
    """How much text a token holds."""
    return float(stats["text_bytes"] / max(stats["tokens"], 1))


def used_sources(manifest: Json) -> list[Json]:
    """The sources that a data set has documents of; its siblings have the others."""
    names = {shard["source"] for shard in manifest["shards"]}
    sources = (manifest.get("recipe") or {"sources": []})["sources"]
    return [source for source in sources if source["name"] in names]
