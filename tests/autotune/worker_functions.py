"""What test_worker.py has workers do: good work, and every way of going wrong."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time

from pagedgen.autotune.worker import say
from pagedgen.errors import CompileError, InvalidValue


def double(value: int) -> int:
    print("noise on stdout must not reach the pipe")
    return 2 * value


def pid() -> int:
    return os.getpid()


def variable(name: str) -> str | None:
    return os.environ.get(name)


def segfault(word: object = None) -> None:
    say("starting")
    if word is not None:
        say(word)
    ctypes.string_at(0)


def hang(seconds: float = 3600) -> None:
    say("hanging")
    time.sleep(seconds)


def hang_with_child(path: str) -> None:
    code = f"import os, time; open({path!r}, 'w').write(str(os.getpid())); time.sleep(3600)"
    subprocess.Popen([sys.executable, "-c", code])
    time.sleep(3600)


def leave(status: int) -> None:
    os._exit(status)


def fail(kind: str) -> None:
    if kind == "ours":
        raise CompileError("tile64: out of registers")
    if kind == "fields":
        raise InvalidValue("tile", 3, "a power of two")
    raise ZeroDivisionError("by zero")


def crash_on_three(value: int) -> int:
    if value == 3:
        ctypes.string_at(0)
    if value == 5:
        time.sleep(3600)
    if value == 7:
        raise CompileError("seven")
    return 10 * value


def unpicklable() -> object:
    return lambda: None
