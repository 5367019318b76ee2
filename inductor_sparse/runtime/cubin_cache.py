"""Compiled kernels on disk, shared by all processes of a machine.

An entry is a file named after everything that its content depends on: the source, the
options with the architecture, and the version of the compiler.  It starts with a
checksum, so that a file that a full disk or a crash cut short is never loaded, and it
is moved into place whole, so that processes may write the same one at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

VARIABLE = "INDUCTOR_SPARSE_CACHE_DIR"
"""Folder of the compiled CUDA kernels; unset: one inside Inductor's cache folder."""

_MAGIC = b"inductor_sparse cubin 1\n"
_warned: set[str] = set()


def folder() -> Path:
    """The folder of the entries; it need not exist."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen)
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "inductor_sparse"


def key(source: str, options: Sequence[str], version: str) -> str:
    """The name of an entry: a hash of what the compiler reads and of the compiler."""
    digest = hashlib.sha256()
    for part in (version, *options, source):
        text = part.encode()
        digest.update(b"%d:" % len(text))
        digest.update(text)
    return digest.hexdigest()


def load(key: str) -> bytes | None:
    """The cubin of an entry; ``None`` if there is none or it is damaged."""
    with contextlib.suppress(OSError):
        return _content(_path(key).read_bytes())
    return None


def store(key: str, cubin: bytes) -> None:
    """Write an entry; where that is impossible, say so once and go on."""
    try:
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(cubin).digest() + cubin)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        _warn_once(error)


def _path(key: str) -> Path:
    return folder() / f"{key}.cubin"


def _content(data: bytes) -> bytes | None:
    start = len(_MAGIC)
    digest, cubin = data[start : start + 32], data[start + 32 :]
    if not data.startswith(_MAGIC) or hashlib.sha256(cubin).digest() != digest:
        return None
    return cubin


def _warn_once(error: OSError) -> None:
    try:
        place = str(folder())
    except OSError:  # Inductor makes its folder when asked where it is
        place = "Inductor's cache folder"
    if place not in _warned:
        _warned.add(place)
        log.warning(
            "compiled kernels cannot be saved in %s (%s), so every process compiles "
            "its own; set %s to a writable folder",
            place,
            error.strerror or error,
            VARIABLE,
        )
