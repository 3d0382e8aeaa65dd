"""Files that are whole or not there: written beside their place, flushed to the disk, moved there in one go.

A process that is killed, or a disk that is full, leaves what stood at the path before, bit for bit; what was
written by then of the new file is removed (after a kill it may stay: `.NAME.….part`, to be deleted).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block is through; OSError names `path`."""
    place = Path(os.path.realpath(path))
    if place.exists() and not place.is_file():
        raise OSError(f"path={str(path)!r}: it is there and is no plain file; give another path")
    part = place.with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        part.touch(exist_ok=False)
        mode = (place if place.exists() else part).stat().st_mode
        yield part
        part.chmod(stat.S_IMODE(mode))
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, place)
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"path={str(path)!r}: it could not be written ({reason}); what was there before still is"
        raise (type(error)(message) if error.errno is None else OSError(error.errno, message)) from error
    finally:
        part.unlink(missing_ok=True)
    _flush_folder(place.parent)


def _flush_folder(folder: Path) -> None:
    """The new name, too, survives a machine that stops now (where the system allows it)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
