"""Plug-ins for serving stacks, between their calls and those of ``Attention``. None imports a compiler."""
