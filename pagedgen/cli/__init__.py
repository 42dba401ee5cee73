"""The ``pagedgen`` command. Modules here are imported when their command runs, so that help is instant."""

from __future__ import annotations

import signal
import sys

from pagedgen.errors import ToolMissing

# Packages that a serving process does without, by the extra that brings them.
EXTRAS = {
    "typer": "tune",
    "rich": "tune",
    "jinja2": "tune",
    "sympy": "tune",
    "optuna": "tune",
    "platformdirs": "tune",
    "triton": "tune",
    "tvm": "cpu",
    "matplotlib": "plot",
}


def main() -> None:
    """Entry point of the ``pagedgen`` script."""
    # A job that is ended (by a scheduler, say) cleans up like one that is interrupted.
    signal.signal(signal.SIGTERM, _end)
    try:
        from pagedgen.cli.app import app

        app()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        print(f"error: {ToolMissing(package, EXTRAS[package])}", file=sys.stderr)
        sys.exit(1)


def _end(number: int, frame: object) -> None:
    sys.exit(128 + number)
