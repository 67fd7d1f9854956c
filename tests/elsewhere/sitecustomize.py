"""A system that is not POSIX, as far as this one can play it.

Python runs this first where this directory is on PYTHONPATH, in workers as well. POSIX-only
modules and names are gone, links cannot be made, and below the working directory the rules of
Windows hold: some names are refused, and what is open or mapped is neither moved nor removed.
"""

import asyncio  # noqa: F401  Python's own needs fcntl, as this is no Windows.
import errno
import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path

MODULES = "fcntl grp pty pwd resource syslog termios tty"

CALLS = (
    "fork forkpty getegid geteuid getgid getuid killpg mkfifo nice sched_getaffinity setsid sysconf"
)

SIGNALS = "SIGALRM SIGHUP SIGQUIT SIGSTOP SIGUSR1 SIGUSR2 SIGXFSZ alarm"

FILES = {"/proc/cpuinfo", "/proc/meminfo", "/proc/self/statm"}

HERE = Path.cwd()

NO_NAME = re.compile(r'[<>:"|?*\\\x00-\x1f]|[. ]$|^(aux|con|nul|prn)(\.|$)', re.IGNORECASE)


def placed(path: object, directory: int = -1) -> Path | None:
    """A path in full, if it is below the working directory."""
    if isinstance(path, int) or path is None:
        return None
    root = HERE if directory < 0 else Path(f"/proc/self/fd/{directory}").readlink()
    full = root / os.fsdecode(path)  # type: ignore[call-overload]
    return full if HERE in full.parents else None


def in_use() -> set[Path]:
    """The files that this process has open or mapped."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if descriptor.is_file():
                found.add(descriptor.readlink())
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return found | {Path(line.split(maxsplit=5)[-1]) for line in maps if "/" in line}


def refuse_in_use(path: Path | None) -> None:
    """Refuse to move or remove what is in use, or holds what is."""
    for used in in_use() if path else ():
        if path in (used, *used.parents):
            raise PermissionError(errno.EACCES, f"in use: {used}", str(path))


def follow_rules(event: str, arguments: tuple[object, ...]) -> None:
    """Look at what is about to be done to files."""
    if event == "os.remove":
        refuse_in_use(placed(*arguments))
    if event == "os.rename":
        refuse_in_use(placed(arguments[0]))
        refuse_in_use(placed(arguments[1]))
    if event == "open" and arguments[0] in FILES:
        raise FileNotFoundError(errno.ENOENT, "this is not Linux", arguments[0])
    if event in ("os.link", "os.symlink"):
        raise OSError(errno.EPERM, event)
    if event in ("open", "os.mkdir", "os.rename"):
        path = placed(arguments[1 if event == "os.rename" else 0])
        if path and any(map(NO_NAME.search, path.relative_to(HERE).parts)):
            raise OSError(errno.EINVAL, "no name for a file", str(path))


for name in MODULES.split():
    sys.modules[name] = None  # type: ignore[assignment]
for module, names in ((os, CALLS), (signal, SIGNALS)):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
sys.addaudithook(follow_rules)
