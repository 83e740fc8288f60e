"""Files that are never seen half-written: a reader gets the old content or the new one, whatever dies in between.

Covers atomic replacement, content hashes and keys made of plain data. Does not cover locks (see `locks`) or what a
run folder holds (see `manifest`). Keys hash JSON values and file contents only, never function objects or times.
"""

import contextlib
import hashlib
import json
import os
import threading
import uuid
from pathlib import Path


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Write `data` beside `path`, flush it to the disk, then rename it over `path`.

    Text is stored as UTF-8. The parent folder is made if it is missing; an existing file keeps its mode. On any error
    the old file is untouched and the temporary one is gone. Raises OSError as the file system gives it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomic(Path(folder) / "a" / "note.txt", "hello")
    ...     (Path(folder) / "a" / "note.txt").read_text()
    'hello'
    """
    target = Path(os.path.realpath(path))  # through a symbolic link, so that the link stays a link
    target.parent.mkdir(parents=True, exist_ok=True)
    unique = f"{os.getpid()}-{threading.get_ident()}-{uuid.uuid4().hex[:8]}"
    beside = target.parent / f".{target.name[:100]}.{unique}.tmp"
    try:
        with beside.open("wb") as handle:
            handle.write(data.encode("utf-8") if isinstance(data, str) else data)
            handle.flush()
            os.fsync(handle.fileno())
        if target.exists():
            beside.chmod(target.stat().st_mode & 0o7777)
        beside.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut; systems that can't open folders are left as they are."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path: Path | str) -> str:
    """Return the SHA-256 of a file's content as 64 hex digits, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def to_json(value: object, *, indent: int | None = None) -> str:
    """Serialise plain data so that equal values give equal text: sorted keys, no NaN, no foreign objects.

    Raises TypeError for anything that is not a JSON value and ValueError for NaN and infinities.
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=indent)


def content_key(**json_values: object) -> str:
    """Return a key (64 hex digits) of named JSON values; the order of names and of dictionary keys does not matter.

    >>> content_key(a=1, b={"x": 1, "y": 2}) == content_key(b={"y": 2, "x": 1}, a=1)
    True
    >>> content_key(a=1) == content_key(a="1")
    False
    """
    return hashlib.sha256(to_json(json_values).encode("utf-8")).hexdigest()
