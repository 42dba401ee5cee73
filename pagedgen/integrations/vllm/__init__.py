"""The vLLM plug-in: pagedgen's kernels as vLLM's attention backend CUSTOM.

``PAGEDGEN_PACK`` names the pack. vLLM finds :func:`register` by the entry point ``vllm.general_plugins``, in
each of its processes.
"""

from __future__ import annotations

import os

from pagedgen.integrations.serving_pack import PACK_VARIABLE

BACKEND = "pagedgen.integrations.vllm.backend.PagedgenBackend"


def register() -> None:
    """Register the backend as CUSTOM, which ``--attention-backend CUSTOM`` selects.

    vLLM's CPU platform has one backend, CPU_ATTN, whatever is selected: there pagedgen takes the place of
    CPU_ATTN, if ``PAGEDGEN_PACK`` is set.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    if os.environ.get(PACK_VARIABLE) and current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
