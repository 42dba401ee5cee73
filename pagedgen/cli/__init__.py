"""The ``pagedgen`` command. Modules here are imported when their command runs, so that help is instant."""

from __future__ import annotations


def main() -> None:
    """Entry point of the ``pagedgen`` script."""
    from pagedgen.cli.app import app

    app()
