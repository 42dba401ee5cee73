"""``pagedgen targets`` and ``pagedgen models``: what is known by name."""

from __future__ import annotations

from pagedgen.cli import console
from pagedgen.errors import Unsupported
from pagedgen.values import codec
from pagedgen.values.model import presets
from pagedgen.values.target import Target
from pagedgen.values.target_table import cpu_target, detect, table


def show_targets(*, as_json: bool) -> None:
    """The named targets with their published figures, and this machine's."""
    rows = [(row.target, row.aliases) for row in table()]
    try:
        here: Target | None = detect()
        rows.append((cpu_target(), ()))
    except Unsupported as error:
        here = None
        console.warn(str(error))
    if as_json:
        console.emit(
            {
                "targets": [{**codec.encode(target), "aliases": list(aliases)} for target, aliases in rows],
                "here": codec.encode(here) if here else None,
            }
        )
        return
    console.table(
        "Targets (vendors' figures; flop/s are dense)",
        ("name", "also", "arch", ">SMs/cores", ">GB", ">GB/s", ">L2 MB", ">f16 TF/s", ">fp8 TF/s", "source"),
        (
            (
                t.name,
                " ".join(aliases),
                t.arch,
                t.num_sms,
                f"{t.memory_bytes / 1e9:.0f}" if t.memory_bytes else "",
                f"{t.bandwidth_gbs:,.0f}" if t.bandwidth_gbs else "",
                f"{t.l2_bytes / 2**20:.0f}" if t.l2_bytes else "",
                f"{t.f16_tflops:,.0f}" if t.f16_tflops else "",
                f"{t.fp8_tflops:,.0f}" if t.fp8_tflops else "",
                t.source,
            )
            for t, aliases in rows
        ),
    )
    if here:
        console.out().print(f"this machine: [b]{here.name}[/] ({here.arch})")


def show_models(*, as_json: bool) -> None:
    """The model presets, with what their layers need beyond specs without masks."""
    if as_json:
        console.emit(
            [
                {**codec.encode(p.model), "aliases": list(p.aliases), "gaps": list(p.model.gaps())}
                for p in presets()
            ]
        )
        return
    console.table(
        "Models",
        (
            "name",
            "also",
            ">layers",
            ">query heads",
            ">KV heads",
            ">head_dim",
            "dtype",
            "not in the kernels yet",
        ),
        (
            (
                m.name,
                " ".join(p.aliases),
                m.num_layers,
                m.num_q_heads,
                m.num_kv_heads,
                m.head_dim,
                m.dtype,
                ", ".join(_short_gaps(m.window_layers, m.num_layers, m.logit_softcap, m.sinks)),
            )
            for p in presets()
            for m in (p.model,)
        ),
    )


def _short_gaps(window_layers: int, layers: int, softcap: float, sinks: bool) -> list[str]:
    gaps = [f"window ({window_layers}/{layers} layers)"] if window_layers else []
    return gaps + ["softcap"] * bool(softcap) + ["sinks"] * sinks
