"""The command as a process: start-up, what help imports, interrupts."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

MAIN = "from pagedgen.cli import main; main()"
HEAVY = ("torch", "triton", "tvm", "optuna", "sympy", "jinja2", "numpy")


def test_help_imports_nothing_heavy():
    code = f"""
import sys
sys.argv = ["pagedgen", "--help"]
try:
    {MAIN}
except SystemExit as end:
    assert not end.code, end.code
heavy = sorted(set(sys.modules) & {set(HEAVY)!r})
sys.exit(f"help imported {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_is_fast():
    """The goal is 300 ms; a bare interpreter takes 20 ms. Of the processor's time: others may be at work."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def best(*arguments: str) -> float:
        times = []
        for _ in range(5):
            start = spent()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
            times.append(spent() - start)
        return min(times)

    assert best("-c", MAIN, "--help") < 15 * best("-c", "pass")


def test_the_installed_script_answers():
    script = Path(sys.executable).with_name("pagedgen")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("pagedgen ")


def test_json_on_stdout_is_json_alone_even_with_warnings():
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "generate", "--gpu", "h100", "--model", "gemma-2-9b", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and json.loads(done.stdout)["spec"]["head_dim"] == 256
    assert "capped at 50" in done.stderr


def test_an_interrupt_is_130_without_a_traceback():
    code = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits "ignore"
import pagedgen.cli.lists as lists
lists.show_models = lambda **_: os.kill(os.getpid(), signal.SIGINT)
sys.argv = ["pagedgen", "models"]
from pagedgen.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130, (done.returncode, signal.SIGINT, done.stderr)
    assert done.stderr == "error: interrupted\n"


def test_an_ended_job_cleans_up(tmp_path):
    """What a scheduler or ``timeout`` sends leaves no folder and no process behind."""
    code = f"""
import os, signal, sys, tempfile
import pagedgen.cli.lists as lists
def show(**_):
    with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):
        os.kill(os.getpid(), signal.SIGTERM)
lists.show_models = show
sys.argv = ["pagedgen", "models"]
{MAIN}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "extra", "command"),
    [
        ("typer", "tune", "--help"),
        ("rich", "tune", "targets"),
        ("jinja2", "tune", "generate --gpu h100"),
        ("sympy", "tune", "explain --gpu h100"),
        ("optuna", "tune", "tune --gpu h100"),
    ],
)
def test_a_missing_package_is_one_line_that_names_its_extra(package, extra, command):
    code = f"""
import sys
sys.modules[{package!r}] = None
sys.argv = ["pagedgen", *{command.split()!r}]
{MAIN}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: {package} is not installed: pip install 'pagedgen[{extra}]'\n"
