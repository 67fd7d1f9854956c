"""What `make dist-check` does: look into dist/, install the wheel alone elsewhere, and use it.

The wheel was built from the sdist, so what it holds the sdist held as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

EXTRAS = ("gguf", "matplotlib", "peft", "transformers")

WITHOUT = f"""
import importlib, importlib.util, pkgutil, nope_gpt
assert not [name for name in {EXTRAS} if importlib.util.find_spec(name)]
for module in pkgutil.walk_packages(nope_gpt.__path__, "nope_gpt."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(nope_gpt.__file__)
"""


def check_contents(wheel: Path) -> None:
    """The package as it is in the repository, its metadata and its licence, and nothing else."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "nope_gpt"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    package = {name: (ROOT / name).read_bytes() for name in listed.decode().split("\0") if name}
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info/"
    about = {name.removeprefix(info) for name in held if name.startswith(info)}
    assert about == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}, about
    found = {name: content for name, content in held.items() if not name.startswith(info)}
    assert found == package, found.keys() ^ package.keys()
    assert {"nope_gpt/py.typed", "nope_gpt/network/native.cpp"} <= found.keys()


def check_use(wheel: Path, constraints: Path, place: Path) -> None:
    """Install the wheel into an environment of its own, and make a model far from everything."""
    venv.create(place / "venv", with_pip=True)
    programs = place / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    install = [programs / "python", "-m", "pip", "install", "--quiet", "-c", constraints, wheel]
    subprocess.run([*install, "--disable-pip-version-check"], check=True)
    work, home = place / "work", place / "home"
    work.mkdir()
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "SYSTEMROOT")}
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    own = {"HOME": str(home), "USERPROFILE": str(home), "HF_HUB_OFFLINE": "1", **nowhere, **kept}
    for words in (
        ["python", "-c", WITHOUT],
        ["nope", "--version"],
        ["nope", "size", "--memory", "24GB"],
        ["nope", "quickstart", "--pretrain-steps", "2", "--tune-steps", "2"],
    ):
        subprocess.run([programs / words[0], *words[1:]], cwd=work, env=own, check=True)


if __name__ == "__main__":
    (own_wheel,) = (ROOT / "dist").glob("*.whl")
    check_contents(own_wheel)
    with tempfile.TemporaryDirectory() as directory:
        check_use(own_wheel, Path(sys.argv[1]).absolute(), Path(directory))
