"""``pagedgen explain``: a family's space, constraints and cost formulas, with the numbers put in."""

from __future__ import annotations

import math
from dataclasses import replace

import sympy
from rich.markup import escape

from pagedgen.autotune.calibration import RankError, rank_errors
from pagedgen.autotune.database import recorded
from pagedgen.cli import console
from pagedgen.cli.options import Job, schedule_of
from pagedgen.compiler.cost import predict
from pagedgen.compiler.families import family_for
from pagedgen.compiler.space import feasible
from pagedgen.values import codec
from pagedgen.values.spec import KernelSpec, Op
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload

WORKLOAD = {Op.DECODE: "32x4096", Op.VERIFY: "64x8of4096"}  # of other operators, a chunk of some prompts
CHUNKS = "4x512of4096"


def run(job: Job, *, schedule: str | None, workload: str | None, as_json: bool) -> None:
    """Print four tables: fields, constraints, costs and the symbols behind them."""
    job.warn()
    spec, target = job.only, job.target
    work = Workload.parse(workload or WORKLOAD.get(spec.op, CHUNKS), spec.op)
    family = family_for(spec, target)
    chosen, origin = schedule_of(spec, target, schedule)
    legal = feasible(spec, target)
    prediction = predict(spec, target, chosen, work)
    values = dict(family.symbols(spec, target, chosen, work))
    best = min(legal, key=lambda s: (predict(spec, target, s, work).time_us, s))
    best_us = predict(spec, target, best, work).time_us
    ranked = _rank_errors(spec, target)
    fields = family.fields(spec, target)
    points = math.prod(len(f.values) for f in fields)
    figures = {**values, **dict(prediction.figures)}

    def numbers(expression: sympy.Basic) -> str:
        names = sorted(str(symbol) for symbol in expression.free_symbols)
        return ", ".join(f"{name} {_number(figures[name])}" for name in names)

    if as_json:
        console.emit(
            {
                "spec": codec.encode(spec),
                "target": codec.encode(target),
                "family": family.name,
                "workload": codec.encode(work),
                "schedule": codec.encode(chosen),
                "origin": origin,
                "space": {"product": points, "legal": len(legal)},
                "fields": [
                    {"name": f.name, "values": list(f.values), "default": f.default, "meaning": f.meaning}
                    for f in fields
                ],
                "constraints": [
                    {"name": c.name, "holds": str(c.holds), "why": c.why} for c in family.constraints()
                ],
                "costs": [
                    {
                        "name": c.name,
                        "unit": c.unit,
                        "formula": str(c.formula),
                        "meaning": c.meaning,
                        "predicted": prediction[c.name],
                    }
                    for c in family.costs()
                ],
                "symbols": values,
                "best_predicted": {"schedule": codec.encode(best), "time_us": best_us},
                "rank_errors": [
                    {
                        "workload": e.workload.name,
                        "schedules": e.schedules,
                        "spearman": e.correlation,
                        "regret": e.regret,
                    }
                    for e in ranked
                ],
            }
        )
        return
    out = console.out()
    gbs = work.kv_bytes(spec) / prediction.time_us / 1e3
    out.print(
        f"[b]{spec.name}[/] on [b]{target.name}[/] ({target.arch}), family [b]{family.name}[/], {work.name}"
    )
    out.print(f"schedule {chosen.name} ({origin})\n", markup=False)
    console.table(
        f"Space: {points} points, {len(legal)} of them legal",
        ("field", "values", ">chosen", ">default", "meaning"),
        ((f.name, " ".join(map(str, f.values)), chosen[f.name], f.default, f.meaning) for f in fields),
    )
    out.print("[b]Constraints[/]")
    for constraint in family.constraints():
        out.print(f"  [b]{constraint.name}[/]: {escape(constraint.why)}")
        out.print(f"      {escape(str(constraint.holds))}", soft_wrap=True)
        out.print(f"      [dim]{numbers(constraint.holds)}[/]", soft_wrap=True)
    out.print("\n[b]Cost model[/] (predicted, not measured)")
    for cost in family.costs():
        value = f"{_number(prediction[cost.name])} {cost.unit}"
        out.print(f"  [b]{cost.name}[/] = {value}: {escape(cost.meaning)}")
        out.print(f"      {escape(str(cost.formula))}", soft_wrap=True)
        out.print(f"      [dim]{numbers(cost.formula)}[/]", soft_wrap=True)
    out.print()
    out.print(
        f"predicted {prediction.time_us:,.1f} µs, {gbs:,.0f} GB/s of KV; "
        f"best of the space predicted {best_us:,.1f} µs: {best.name}",
        markup=False,
    )

    if ranked:
        out.print()
        console.table(
            "The model against what is on record: its favourite's regret, and its rank correlation",
            ("batch", ">measured", ">regret", ">Spearman"),
            ((e.workload.name, e.schedules, f"{e.regret:.1%}", f"{e.correlation:.2f}") for e in ranked),
        )
    else:
        out.print("[dim]nothing measured is on record, so how well the model ranks is not known[/]")


def _rank_errors(spec: KernelSpec, target: Target) -> tuple[RankError, ...]:
    """How today's model ranks the measured records that hold here; what they say was predicted is that of
    the model they were tuned with."""
    found = recorded(spec, target)
    records = found.entry.records if found is not None else ()
    return rank_errors(
        replace(r, predicted_us=predict(spec, target, r.schedule, r.workload).time_us) for r in records
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"
