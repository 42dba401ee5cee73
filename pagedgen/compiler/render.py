"""spec × target × schedule → source text. ``StrictUndefined``: a misspelt name is an error, not a blank."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pagedgen
from pagedgen.compiler.binary import Source
from pagedgen.compiler.families import family_for
from pagedgen.templates.family import TEMPLATES
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target

if TYPE_CHECKING:
    import jinja2


@cache
def environment() -> jinja2.Environment:
    """The Jinja environment of all templates: strict, no escaping, block lines leave no blank lines."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )


def render(spec: KernelSpec, target: Target, schedule: Schedule) -> Source:
    """Render the kernel source of one schedule.

    Raises:
        Unsupported: no template covers the spec on this target.
    """
    family = family_for(spec, target)
    template = environment().get_template(family.source.relative_to(TEMPLATES).as_posix())
    context = family.context(spec, target, schedule)
    return Source(spec, target, schedule, template.render(**context, version=pagedgen.__version__))
