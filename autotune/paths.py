"""Where the user cache is, and how a file is put there so that readers never see half of one."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pagedgen.errors import CacheUnwritable, InvalidValue

CACHE_VARIABLE = "PAGEDGEN_CACHE_DIR"


def user_cache() -> Path:
    """The user cache: ``$PAGEDGEN_CACHE_DIR``, else the platform's cache folder. It need not exist yet.

    Raises:
        InvalidValue: the variable names a file.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        path = Path(named).expanduser().absolute()
    else:
        import platformdirs

        path = Path(platformdirs.user_cache_dir("pagedgen", appauthor=False))
    if path.exists() and not path.is_dir():
        raise InvalidValue(CACHE_VARIABLE, str(path), "a folder is expected, this is a file")
    return path


def publish(path: Path, data: bytes) -> None:
    """Write a file atomically: a reader, or a crash at any moment, sees the old file or the new one.

    Raises:
        CacheUnwritable: read-only folder, full disk, no permission.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private; a cache may be shared
        temporary.replace(path)
    except BaseException as error:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
        if isinstance(error, OSError):
            raise CacheUnwritable(f"{path}: {error.strerror or error}") from error
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel releases it when the holder dies, however it dies.

    Raises:
        CacheUnwritable: the lock file cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise CacheUnwritable(f"{folder}: {error.strerror or error}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
