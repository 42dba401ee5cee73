"""pagedgen in transformers: ``attach(model, "model.pack")`` has ``generate_batch`` use a pack."""

from __future__ import annotations

from pagedgen.integrations.transformers.attach import attach, attached, detach

__all__ = ["attach", "attached", "detach"]
