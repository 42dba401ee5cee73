"""Shipped tuning records, one readable file per target and spec. README.md says what is in a file."""

from pathlib import Path

SHIPPED = Path(__file__).parent
