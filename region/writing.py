"""Writing a file so that whoever looks, whenever the power fails, finds the old one or the new one, whole."""
from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from pathlib import Path

UNFINISHED, SUFFIX = ".safe_region-", ".tmp"  # the names of files that are being written
STALE = 600.0  # seconds after which such a file is what a killed process left: no write takes as long
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


def write_atomically(path: Path, content: bytes, overwrite: bool = True) -> None:
    """Write a file whole or not at all; several threads or processes may write the same one.

    A file that is replaced keeps its mode. A link at `path` is replaced, not what it points to.

    Args:
        overwrite: False writes only where nothing is: of several writers one gets the name.

    Raises:
        FileExistsError: only without `overwrite`: something of that name is there.
        OSError: it could not be written (full disk, read-only folder); everything is as before.
    """
    folder = path.parent
    with contextlib.suppress(FileExistsError):  # a file, found below: that is not the name that we want
        folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    _sweep(folder)
    temporary = folder / f"{UNFINISHED}{secrets.token_hex(8)}{SUFFIX}"
    mode = _mode(path) if overwrite else None
    handle = os.open(temporary, _NEW, 0o666 if mode is None else mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(temporary, mode)  # what the umask took away
        (os.replace if overwrite else _claim)(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _settle(folder)


def _mode(path: Path) -> int | None:
    """Who may read and write the file that is there, if there is one."""
    try:
        return stat.S_IMODE(path.stat().st_mode) & 0o777
    except OSError:
        return None


def _claim(temporary: Path, path: Path) -> None:
    """Give the file a name that nobody has. Raises FileExistsError."""
    if os.name == "nt":
        os.rename(temporary, path)  # refuses a name that is taken, there
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # exFAT and some network folders have no links: an empty file keeps the place for an instant
        os.close(os.open(path, _NEW, 0o666))
        try:
            os.replace(temporary, path)
        except BaseException:
            path.unlink()
            raise
    else:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _sweep(folder: Path) -> None:
    """Remove what killed processes left behind."""
    with contextlib.suppress(OSError):
        for left in folder.glob(f"{UNFINISHED}*{SUFFIX}"):
            with contextlib.suppress(OSError):
                if time.time() - left.lstat().st_mtime > STALE:
                    left.unlink()


def _settle(folder: Path) -> None:
    """See to it that the new name is on the disk, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
