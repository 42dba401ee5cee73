"""Worker processes: what may crash or hang runs in one of these, and costs only itself.

A worker is a fresh interpreter that answers calls of importable functions over a pipe, one at a time, each
with a time limit. When it dies (segmentation fault, lost CUDA context, out of memory) or runs past the limit
it is killed, the call raises :class:`WorkerLost`, and the next call starts a new one. A function may say
where it is through :func:`say`; the last word of a lost worker tells who was running.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from pagedgen.errors import PagedgenError

T = TypeVar("T")
A = TypeVar("A")

START_S = 120.0  # for importing torch on a busy machine


class WorkerLost(PagedgenError):
    """The worker died or was killed in a call. ``last`` is what it said last, None when it said nothing."""

    def __init__(self, reason: str, last: object = None) -> None:
        super().__init__(reason)
        self.reason, self.last = reason, last


class WorkerFailed(PagedgenError):
    """The function raised; the message is the remote traceback's last line, ``trace`` all of it."""

    def __init__(self, message: str, trace: str) -> None:
        super().__init__(message)
        self.trace = trace


@dataclass(frozen=True, slots=True)
class _Said:
    word: object


@dataclass(frozen=True, slots=True)
class _Returned:
    value: object


@dataclass(frozen=True, slots=True)
class _Raised:
    error: PagedgenError | None  # ours travel whole, others as text
    message: str
    trace: str


class Worker:
    """A process that outlives good calls and is replaced after a bad one. One caller at a time.

    ``environment`` is laid over this process's: thread counts have to be set before a library loads.
    Every process begins with ``first``, a replacement too: what is imported for it and what it sets up (cores
    to stay on) holds for all calls, and counts against none of their time limits.

    >>> with Worker() as worker:
    ...     worker.call(len, "abc", timeout_s=60)
    3
    """

    def __init__(
        self, environment: Mapping[str, str] | None = None, first: Callable[[], object] | None = None
    ) -> None:
        self._environment, self._first = dict(environment or {}), first
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether a process is running; a call starts one where none is."""
        return self._process is not None and self._process.poll() is None

    def call(self, function: Callable[..., T], *arguments: object, timeout_s: float) -> T:
        """``function(*arguments)`` in the worker. Function and arguments are pickled.

        Raises:
            WorkerLost: the worker did not start, crashed, or ran past ``timeout_s`` and was killed.
            WorkerFailed: the function raised an exception.
            PagedgenError: the function raised this one.
        """
        if not self.alive or self._pipe is None:
            self._start()
            try:
                if self._first is not None:
                    self._exchange(self._first, (), START_S)
            except PagedgenError:
                self.kill()  # the next call tries again
                raise
        result: T = self._exchange(function, arguments, timeout_s)
        return result

    def _exchange(self, function: Callable[..., Any], arguments: tuple[object, ...], timeout_s: float) -> Any:
        """One call over the pipe of a running process."""
        pipe = self._pipe
        assert pipe is not None
        last: object = None
        try:
            pipe.send((function, arguments))
            deadline = time.monotonic() + timeout_s
            while True:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    self.kill()
                    raise WorkerLost(f"timed out after {timeout_s:g} s", last)
                message = pipe.recv()
                if isinstance(message, _Said):
                    last = message.word
                elif isinstance(message, _Raised):
                    raise message.error or WorkerFailed(message.message, message.trace)
                else:
                    return message.value
        except (EOFError, BrokenPipeError, ConnectionResetError, pickle.UnpicklingError) as error:
            raise WorkerLost(self._how_it_died(), last) from error
        except KeyboardInterrupt:
            self.kill()
            raise

    def kill(self) -> None:
        """End the process, and whatever it started, now."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._forget()

    def close(self) -> None:
        """Let an idle process end by itself; kill it if it does not within two seconds."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._process is not None:
            try:
                self._process.wait(2)
            except subprocess.TimeoutExpired:
                self.kill()
        self._forget()

    def _start(self) -> None:
        self._forget()
        ours, theirs = socket.socketpair()
        with theirs:
            path = os.pathsep.join(p for p in sys.path if p)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pagedgen.autotune.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": path, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # ^C goes to us, and a kill takes its children along
            )
        self._pipe = Connection(ours.detach())
        try:
            ready = self._pipe.poll(START_S)
            if ready:
                self._pipe.recv()
        except EOFError:
            ready = False
        if not ready:
            how = self._how_it_died()
            raise WorkerLost(f"a worker did not start: {how}")

    def _how_it_died(self) -> str:
        process = self._process
        if process is None:
            return "crashed"
        try:
            code = process.wait(5)
        except subprocess.TimeoutExpired:
            self.kill()
            return "crashed (pipe closed)"
        self._forget()
        if code < 0:
            return f"crashed ({signal.Signals(-code).name})"
        return f"crashed (exit status {code})"

    def _forget(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        self._pipe, self._process = None, None


@dataclass(frozen=True, slots=True)
class Done:
    """One result of :meth:`Pool.map`: the argument, and the value or the error."""

    argument: Any
    value: Any = None
    error: PagedgenError | None = None


class Pool:
    """Several workers that share a queue of calls; a lost one costs its own call only."""

    def __init__(self, size: int, environment: Mapping[str, str] | None = None) -> None:
        self._workers = [Worker(environment) for _ in range(max(1, size))]
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)
        self._threads = ThreadPoolExecutor(len(self._workers), thread_name_prefix="pagedgen-pool")

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._threads.shutdown(wait=not any(exception), cancel_futures=True)
        for worker in self._workers:
            if any(exception):
                worker.kill()
            else:
                worker.close()

    def map(
        self, function: Callable[[A], object], arguments: Iterable[A], timeout_s: float
    ) -> Iterator[Done]:
        """``function`` of every argument, in order, as they complete in turn; errors are results too."""

        def one(argument: A) -> Done:
            worker = self._free.get()
            try:
                return Done(argument, worker.call(function, argument, timeout_s=timeout_s))
            except PagedgenError as error:
                return Done(argument, error=error)
            finally:
                self._free.put(worker)

        yield from self._threads.map(one, arguments)


_to_parent: Connection | None = None


def say(word: object) -> None:
    """In a worker: tell the caller where this call is, in case the worker is lost. Elsewhere: nothing."""
    if _to_parent is not None:
        _to_parent.send(_Said(word))


def serve(pipe: Connection) -> None:
    """Answer calls until the caller hangs up."""
    global _to_parent
    _to_parent = pipe
    pipe.send("ready")
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        except Exception as error:  # a function that does not import here
            pipe.send(_Raised(None, f"{type(error).__name__}: {error}", traceback.format_exc()))
            continue
        try:
            reply: object = _Returned(function(*arguments))
            pickle.dumps(reply)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            reply = _Raised(_whole(error), message, traceback.format_exc())
        pipe.send(reply)


def _leave_with(parent: int) -> None:
    """End this process once its parent is gone, even in the middle of a call."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _whole(error: Exception) -> PagedgenError | None:
    """The error itself, when it is ours and survives pickling."""
    if isinstance(error, PagedgenError):
        with contextlib.suppress(Exception):
            copy = pickle.loads(pickle.dumps(error))
            if type(copy) is type(error) and str(copy) == str(error):
                return error
    return None


if __name__ == "__main__":
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    # This module is __main__ here, another one than functions import: serve from the one they see.
    from pagedgen.autotune import worker as _imported

    _imported.serve(Connection(int(sys.argv[1])))
