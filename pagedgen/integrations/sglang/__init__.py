"""The SGLang plug-in: pagedgen's kernels as SGLang's attention backend ``pagedgen``.

``PAGEDGEN_PACK`` names the pack. SGLang finds :func:`register` by the entry point ``sglang.srt.plugins``;
``--attention-backend pagedgen`` selects it.
"""

from __future__ import annotations

from typing import Any

NAME = "pagedgen"


def register() -> None:
    """Add the backend to SGLang's table, and its name to the values of ``--attention-backend``."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    if NAME not in choices.ATTENTION_BACKEND_CHOICES:
        choices.add_attention_backend_choices([NAME])
    register_attention_backend(NAME)(create)


def create(runner: Any) -> Any:
    """The backend of a model runner; what it needs of SGLang is imported here."""
    from pagedgen.integrations.sglang.backend import PagedgenBackend

    return PagedgenBackend(runner)
