"""What docs/serving.md tells its readers to type, for the tests that type it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text below a heading, up to the next of its level or a higher one."""
    (found,) = re.finditer(rf"^(#+) {re.escape(title)}\n", PAGE, re.MULTILINE)
    end = re.compile(rf"^#{{1,{len(found[1])}}} ", re.MULTILINE).search(PAGE, found.end())
    return PAGE[found.end() : end.start() if end else None]


def block(title: str) -> str:
    """The one Python block of a section."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", section(title), re.MULTILINE | re.DOTALL)
    return code


def commands(title: str) -> list[str]:
    """The commands of a section in order, its indented lines: without comments, continued lines as one."""
    prose = re.sub(r"^```.*?^```$", "", section(title), flags=re.MULTILINE | re.DOTALL)
    text = "\n".join(re.findall(r"^    (.*)$", prose, re.MULTILINE)).replace("\\\n", " ")
    return [" ".join(re.sub(r"\s+# .*", "", line).split()) for line in text.splitlines()]


@contextmanager
def served(command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server's process, started by the page's command in this folder and ended with all of its own."""
    with log.open("wb") as out:
        server = subprocess.Popen(
            ["bash", "-c", command], stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield server
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(30)
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def ask(request: str, server: subprocess.Popen[bytes], log: Path, seconds: float = 400) -> dict[str, Any]:
    """What the page's ``curl`` prints once the server answers.

    Raises:
        RuntimeError: the server ended, or gives no answer in time; shows the end of its log.
    """
    end = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < end:
        done = subprocess.run(["bash", "-c", request], capture_output=True, text=True, check=False)
        with suppress(ValueError):
            answer: dict[str, Any] = json.loads(done.stdout)
            return answer
        time.sleep(2)
    raise RuntimeError(f"no answer:\n{log.read_text(errors='replace')[-6000:]}")
