"""Print the oldest versions that pyproject.toml allows, as constraints for pip."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def oldest(pyproject: Path) -> dict[str, str]:
    """The oldest version of each dependency that has one, extras included."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    wanted = [project["dependencies"], *project["optional-dependencies"].values()]
    found = (re.match(r"([\w-]+)>=([\d.]+)", line) for lines in wanted for line in lines)
    return {match[1]: match[2] for match in found if match}


if __name__ == "__main__":
    versions = oldest(Path(__file__).parents[1] / "pyproject.toml")
    sys.stdout.writelines(f"{name}=={version}\n" for name, version in versions.items())
