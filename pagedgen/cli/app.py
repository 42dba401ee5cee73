"""The commands, their options and their help. What they do is in a module each, imported when it is run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pagedgen import __version__
from pagedgen.errors import PagedgenError


class Group(TyperGroup):
    """Exit codes: 0 fine, 1 an error of ours (one line, no traceback), 2 usage, 130 interrupted."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PagedgenError as error:
            from pagedgen.cli.console import fail

            fail(str(error))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            from pagedgen.cli.console import fail

            fail("interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="pagedgen",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SERVING = "decode,extend,write_kv"  # what a serving stack calls
WHERE, WHAT, HOW, OUTPUT = "Where", "What", "How", "Output"

Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        "--target",
        metavar="NAME",
        help="Processor, see [b]pagedgen targets[/]. Default: this machine's GPU, else its CPU.",
        rich_help_panel=WHERE,
    ),
]
Cpu = Annotated[bool, typer.Option("--cpu", help="This machine's CPU.", rich_help_panel=WHERE)]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|PATH",
        help="Attention shape of a model: a name of [b]pagedgen models[/], or a config.json.  "
        "[dim]\\[default: llama-3-8b][/]",
        rich_help_panel=WHAT,
    ),
]
Tp = Annotated[
    int, typer.Option(metavar="N", help="Tensor parallelism: heads of one of N ranks.", rich_help_panel=WHAT)
]
HeadDim = Annotated[
    str | None, typer.Option(metavar="LIST", help="Instead of the model's: 128.", rich_help_panel=WHAT)
]
QHeads = Annotated[
    str | None,
    typer.Option("--num-q-heads", metavar="LIST", help="Instead of the model's: 32.", rich_help_panel=WHAT),
]
KvHeads = Annotated[
    str | None,
    typer.Option("--num-kv-heads", metavar="LIST", help="Instead of the model's: 8.", rich_help_panel=WHAT),
]
BlockSize = Annotated[
    str, typer.Option(metavar="LIST", help="Tokens a KV block: 16,64.", rich_help_panel=WHAT)
]
KvDtype = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="f32, f16, bf16, fp8_e4m3, fp8_e5m2. Default: that of the queries.",
        rich_help_panel=WHAT,
    ),
]
QDtype = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="f32, f16, bf16. Default: that of the cache, or the model's.",
        rich_help_panel=WHAT,
    ),
]
KvScale = Annotated[
    str, typer.Option(metavar="tensor|head", help="Granularity of fp8 scales.", rich_help_panel=WHAT)
]
KInner = Annotated[
    str | None,
    typer.Option(
        metavar="token|dim",
        help="Axis of K with stride 1. Default: token on a CPU, where that is fastest, else dim.",
        rich_help_panel=WHAT,
    ),
]
Lse = Annotated[bool, typer.Option("--lse", help="Return the log-sum-exp as well.", rich_help_panel=WHAT)]
Trace = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Request lengths to tune for: CSV, JSON lines or a histogram. Default: a grid of batch sizes "
        "and lengths; [b]sample[/] is the conversation traffic that ships with pagedgen.",
        rich_help_panel=HOW,
    ),
]
Seed = Annotated[int, typer.Option(help="Of every random choice.", rich_help_panel=HOW)]
ScheduleText = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        metavar="FIELD=VALUE,…",
        help="Fields that differ from the tuned schedule, or where none is known from the default one.",
        rich_help_panel=HOW,
    ),
]
Batch = Annotated[
    str | None,
    typer.Option(
        "--workload",
        metavar="NxLEN",
        help="Batch size x KV tokens of each; 4x512of4096: the last 512 are queries; parts are joined by +.  "
        "[dim]\\[default: 32x4096, or 4x512of4096][/]",
        rich_help_panel=HOW,
    ),
]
Operator = Annotated[
    str | None,
    typer.Option(
        "--op",
        metavar="NAME",
        help="decode, extend, verify or write_kv, with the window, soft cap and sinks of the model's "
        "layers.  [dim]\\[default: decode without][/]",
        rich_help_panel=WHAT,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="JSON on stdout, everything else on stderr.", rich_help_panel=OUTPUT)
]


def _version(value: bool) -> None:
    if value:
        print(f"pagedgen {__version__}")
        raise typer.Exit


@app.callback()
def pagedgen(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Generates, verifies, autotunes and packs paged-attention kernels.

    Say what attention you need and which processor you have:

    \b
      [b]pagedgen doctor[/]                          what is missing here?
      [b]pagedgen tune[/]                            this machine, Llama-3-8B
      [b]pagedgen tune[/] --gpu a100 --kv-dtype fp8_e4m3      no GPU here: predicted
      [b]pagedgen tune[/] --model qwen3-32b --tp 4 --out qwen3-32b.pack
      [b]pagedgen generate[/] --gpu h100 --block-size 64      read the kernel
      [b]pagedgen explain[/] --gpu h100 --workload 32x8192    why should it be fast?
      [b]pagedgen explore[/] --gpu h100 --trace chat.csv      which block size?

    \b
    Then, where the model is served:
      attention = pagedgen.load("qwen3-32b.pack")
      out = attention.decode(q, k, v, block_table, seq_lens)
    """


@app.command()
def tune(
    ops: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="decode, extend, verify, with the windows, soft cap and sinks of every layer of the model: "
            "what [b]build --model[/] looks for.  [dim]\\[default: decode without][/]",
            rich_help_panel=WHAT,
        ),
    ] = None,
    gpu: Gpu = None,
    cpu: Cpu = False,
    model: Model = None,
    tp: Tp = 1,
    head_dim: HeadDim = None,
    num_q_heads: QHeads = None,
    num_kv_heads: KvHeads = None,
    block_size: BlockSize = "16",
    kv_dtype: KvDtype = None,
    q_dtype: QDtype = None,
    kv_scale: KvScale = "tensor",
    k_inner: KInner = None,
    lse: Lse = False,
    trace: Trace = None,
    effort: Annotated[
        str, typer.Option(metavar="quick|standard|max", help="How long to search.", rich_help_panel=HOW)
    ] = "standard",
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Start no new batch after this long: 90s, 10m, 2h. The first is always tried.",
            rich_help_panel=HOW,
        ),
    ] = None,
    seed: Seed = 0,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL|FILE",
            help="Share the search with every worker that is given the same: a database "
            "(postgresql+psycopg://user@host/db), or a journal file on one host.",
            rich_help_panel=HOW,
        ),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The study's name in the storage. Default: made of spec, target, device and versions.",
            rich_help_panel=HOW,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="PACK", help="Build a pack here as well.", rich_help_panel=OUTPUT)
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Draw history, importance of the fields and roofline here, as PNG.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Find the fastest kernels for a spec on a processor, and record them.

    Where the processor is present, candidates are verified and timed. Where it is not, they are compiled for
    it and ranked by the cost model; such records say [b]predicted[/].

    \b
    Lists make a product, one kernel spec for each combination:
      [b]pagedgen tune[/]
      [b]pagedgen tune[/] --cpu --trace sample --effort quick --out llama.pack
      [b]pagedgen tune[/] --gpu a100 --model llama-3-8b --kv-dtype fp8_e4m3
      [b]pagedgen tune[/] --model ./config.json --tp 4 --kv-dtype bf16,fp8_e4m3
      [b]pagedgen tune[/] --model gemma-2-9b --ops decode,extend     prompts as well
      [b]pagedgen tune[/] --head-dim 80 --budget 5m --json > tuned.json
      [b]pagedgen tune[/] --storage postgresql+psycopg://tuner@db/studies     on every host alike
    """
    from pagedgen.cli.options import Job
    from pagedgen.cli.tune import run

    job = Job.of(
        gpu=gpu,
        cpu=cpu,
        model=model,
        tp=tp,
        head_dim=head_dim,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        q_dtype=q_dtype,
        kv_dtype=kv_dtype,
        kv_scale=kv_scale,
        k_inner=k_inner,
        lse=lse,
        ops=ops,
    )
    run(
        job,
        trace=trace,
        effort=effort,
        budget=budget,
        seed=seed,
        storage=storage,
        study=study,
        out=out,
        plots=plots,
        as_json=json,
    )


@app.command()
def build(
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PACK", help="The pack's folder. Default: MODEL.TARGET.pack.", rich_help_panel=OUTPUT
        ),
    ] = None,
    ops: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="decode, extend, verify, write_kv, with the windows, soft cap and sinks of every layer of "
            "the model; default schedules where nothing is recorded.  "
            "[dim]\\[default: decode,extend,write_kv with --model, else decode as tuned][/]",
            rich_help_panel=WHAT,
        ),
    ] = None,
    gpu: Gpu = None,
    cpu: Cpu = False,
    model: Model = None,
    tp: Tp = 1,
    head_dim: HeadDim = None,
    num_q_heads: QHeads = None,
    num_kv_heads: KvHeads = None,
    block_size: BlockSize = "16",
    kv_dtype: KvDtype = None,
    q_dtype: QDtype = None,
    kv_scale: KvScale = "tensor",
    k_inner: KInner = None,
    lse: Lse = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            help="Kernels of write_kv that leave out slots behind the pool's last and record one, in "
            "captured graphs too. For GPUs: on a CPU write_kv refuses them in any case.",
            rich_help_panel=WHAT,
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Make a pack from what tuning has recorded: kernels, dispatch table, manifest with SHA-256 of each file.

    \b
      [b]pagedgen build[/] --gpu h100 --model gemma-2-9b        [dim]all that serving it takes[/]
      [b]pagedgen build[/] --gpu a100 --kv-dtype fp8_e4m3 --out llama.a100.pack
    """
    from pagedgen.cli.build import run
    from pagedgen.cli.options import Job

    job = Job.of(
        gpu=gpu,
        cpu=cpu,
        model=model,
        tp=tp,
        head_dim=head_dim,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        q_dtype=q_dtype,
        kv_dtype=kv_dtype,
        kv_scale=kv_scale,
        k_inner=k_inner,
        lse=lse,
        ops=ops or (SERVING if model is not None else None),
    )
    run(job.checked() if debug else job, out=out, as_json=json)


@app.command()
def inspect(
    pack: Annotated[Path, typer.Argument(metavar="PACK", help="The pack's folder.")],
    json: Json = False,
) -> None:
    """Show what is in a pack, for any machine: kernels, verdicts, and what each choice rests on.

    \b
      [b]pagedgen inspect[/] llama-3-8b.h100-sxm.pack
    """
    from pagedgen.cli.inspect import run

    run(pack, as_json=json)


@app.command()
def generate(
    op: Operator = None,
    gpu: Gpu = None,
    cpu: Cpu = False,
    model: Model = None,
    tp: Tp = 1,
    head_dim: HeadDim = None,
    num_q_heads: QHeads = None,
    num_kv_heads: KvHeads = None,
    block_size: BlockSize = "16",
    kv_dtype: KvDtype = None,
    q_dtype: QDtype = None,
    kv_scale: KvScale = "tensor",
    k_inner: KInner = None,
    lse: Lse = False,
    schedule: ScheduleText = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it here instead.", rich_help_panel=OUTPUT)
    ] = None,
    json: Json = False,
) -> None:
    """Print the source of one kernel: short, specialised, every number a literal.

    \b
      [b]pagedgen generate[/] --gpu h100 --model llama-3-8b --kv-dtype fp8_e4m3
      [b]pagedgen generate[/] --gpu a100 --schedule tile=128,num_warps=8 --out kernel.py
      [b]pagedgen generate[/] --gpu h100 --op extend
    """
    from pagedgen.cli.generate import run
    from pagedgen.cli.options import Job

    job = Job.of(
        gpu=gpu,
        cpu=cpu,
        model=model,
        tp=tp,
        head_dim=head_dim,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        q_dtype=q_dtype,
        kv_dtype=kv_dtype,
        kv_scale=kv_scale,
        k_inner=k_inner,
        lse=lse,
        ops=op,
    )
    run(job, schedule=schedule, out=out, as_json=json)


@app.command()
def explain(
    op: Operator = None,
    gpu: Gpu = None,
    cpu: Cpu = False,
    model: Model = None,
    tp: Tp = 1,
    head_dim: HeadDim = None,
    num_q_heads: QHeads = None,
    num_kv_heads: KvHeads = None,
    block_size: BlockSize = "16",
    kv_dtype: KvDtype = None,
    q_dtype: QDtype = None,
    kv_scale: KvScale = "tensor",
    k_inner: KInner = None,
    lse: Lse = False,
    schedule: ScheduleText = None,
    workload: Batch = None,
    json: Json = False,
) -> None:
    """Print the schedule space, its constraints and the cost model, with the numbers put in.

    Times in it are [b]predicted[/].

    \b
      [b]pagedgen explain[/] --gpu a100 --kv-dtype fp8_e4m3 --workload 8x4096
      [b]pagedgen explain[/] --gpu h100 --op extend --workload 1x2048+31x1of4096
    """
    from pagedgen.cli.explain import run
    from pagedgen.cli.options import Job

    job = Job.of(
        gpu=gpu,
        cpu=cpu,
        model=model,
        tp=tp,
        head_dim=head_dim,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        q_dtype=q_dtype,
        kv_dtype=kv_dtype,
        kv_scale=kv_scale,
        k_inner=k_inner,
        lse=lse,
        ops=op,
    )
    run(job, schedule=schedule, workload=workload, as_json=json)


@app.command("predict-check")
def predict_check(
    source: Annotated[str, typer.Option("--from", metavar="NAME", help="Processor that is known.")],
    goal: Annotated[str, typer.Option("--to", metavar="NAME", help="Processor that is picked for.")],
    json: Json = False,
) -> None:
    """How good are predictions for a processor that is not here? Pick for it from another one's records.

    The cost model is calibrated on what was measured on the one, picks a schedule of each spec for the other,
    and the pick is held against the best that was measured there: its regret is how much slower it is.

    \b
      [b]pagedgen predict-check[/] --from h100 --to h200
    """
    from pagedgen.cli.predict_check import run

    run(source, goal, as_json=json)


@app.command()
def verify(
    pack: Annotated[
        Path | None, typer.Argument(metavar="[PACK]", help="A folder that tune or build wrote.")
    ] = None,
    records: Annotated[
        bool,
        typer.Option(
            "--records", help="Instead of a pack: what is on record for this machine's device, timed again."
        ),
    ] = False,
    gpu: Gpu = None,
    cpu: Cpu = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Check a pack: every file against its SHA-256, then every kernel against a float64 reference.

    A pack for another processor has its files checked, and no more; the output says so. With
    [b]--records[/], the kernels that records chose are compiled, checked against the reference and timed
    again, and those that have slipped (slower, as a share of the read bandwidth) are named. Exit status 1
    when a kernel is wrong or has slipped.

    \b
      [b]pagedgen verify[/] llama-3-8b.cpu.pack
      [b]pagedgen verify[/] llama-3-8b.h100.pack --seed 7 --json
      [b]pagedgen verify[/] --records --cpu
    """
    from pagedgen.cli.verify import run, run_records

    if records == (pack is not None):
        raise typer.BadParameter("either a PACK or --records is expected")
    if pack is not None:
        if gpu or cpu:
            raise typer.BadParameter("--gpu and --cpu go with --records: a pack names its processor")
        run(pack, seed=seed, as_json=json)
        return
    run_records(gpu, cpu, seed=seed, as_json=json)


@app.command()
def bench(
    suite: Annotated[str | None, typer.Option(metavar="NAME", help="Default: list the suites.")] = None,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Every sample and the environment, anew after every case."
        ),
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(
            "--case", "-k", metavar="TEXT", help="Only cases named so, or in part. May be repeated."
        ),
    ] = None,
    trace: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Request lengths, for the suite manager. May be repeated.",
        ),
    ] = None,
) -> None:
    """Run a named benchmark: roofline, this project's kernels and the peers that are installed, side by side.

    \b
      [b]pagedgen bench[/]
      [b]pagedgen bench[/] --suite decode-cpu --json decode-cpu.json
      [b]pagedgen bench[/] --suite decode-gpu --case 32x8192 --json rows.json
      [b]pagedgen bench[/] --suite manager --trace lengths.csv
    """
    from pagedgen.cli.bench import run

    run(suite, json, trace or (), case or ())


@app.command()
def stats(
    trace: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Request lengths: CSV (Azure, Sarathi) or JSON lines (Mooncake).",
        ),
    ],
    block_size: Annotated[int, typer.Option(help="Tokens a block.")] = 16,
    pool_tokens: Annotated[int, typer.Option(help="Tokens that the pool holds.")] = 1 << 18,
    requests: Annotated[int, typer.Option(min=1, help="At most this many of the trace.")] = 4000,
    steps: Annotated[int, typer.Option(min=1, help="At most this many decode steps.")] = 1000,
    json: Json = False,
) -> None:
    """Drive the block manager with a trace and print its statistics: utilisation, waste, evictions, refusals.

    No model runs: requests enter as memory allows and get a token each a step.

    \b
      [b]pagedgen stats[/] --trace lengths.csv --pool-tokens 131072
    """
    from pagedgen.cli.stats import run

    run(trace, block_size=block_size, pool_tokens=pool_tokens, requests=requests, steps=steps, as_json=json)


@app.command()
def explore(
    gpu: Gpu = None,
    model: Model = None,
    tp: Tp = 1,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="KV pool of a rank: 40GiB. Default: what the weights and a tenth of the GPU leave.",
            rich_help_panel=WHERE,
        ),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Host memory that preempted sequences may be swapped to. Default: none.",
            rich_help_panel=WHERE,
        ),
    ] = None,
    kv_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="f16, bf16, fp8_e4m3, fp8_e5m2. Default: the model's.", rich_help_panel=WHAT
        ),
    ] = None,
    block_sizes: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="Tokens a block. Default: 1,8,16,32,64,128,256.", rich_help_panel=WHAT
        ),
    ] = None,
    adaptive: Annotated[
        bool,
        typer.Option(
            "--adaptive",
            help="Adaptive blocks and a controller as well, judged against 64 and 128.",
            rich_help_panel=WHAT,
        ),
    ] = False,
    trace: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Requests: CSV (Azure, Sarathi, two columns), JSON lines (Mooncake) or a histogram "
            "(FILE#FAMILY). May be repeated. Default: [b]sample[/], which ships with pagedgen.",
            rich_help_panel="Traffic",
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many of each trace.", rich_help_panel="Traffic"),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Closed loop: N requests at a time, running or waiting. The default, with --max-num-seqs.",
            rich_help_panel="Traffic",
        ),
    ] = None,
    rate_factor: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Open loop: the trace's own times, at X times its rate.",
            rich_help_panel="Traffic",
        ),
    ] = None,
    request_rate: Annotated[
        float | None,
        typer.Option(
            metavar="R", help="Open loop: R requests a second, at random.", rich_help_panel="Traffic"
        ),
    ] = None,
    prefix_caching: Annotated[
        bool | None,
        typer.Option(
            help="Default: where the trace says which prompts begin alike.", rich_help_panel="Traffic"
        ),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Sequences that run at a time.", rich_help_panel=HOW)
    ] = 1024,
    max_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens a step, prompts in pieces.", rich_help_panel=HOW)
    ] = 2048,
    kernel_times: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Measured times: what [b]pagedgen bench --suite block-sizes-gpu --json[/] wrote. "
            "Without it, records of this GPU; where neither is known, times are predicted.",
            rich_help_panel=HOW,
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Processes. Default: 2, where there are cores.", rich_help_panel=HOW)
    ] = None,
    seed: Seed = 0,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A report with plots, in one file.", rich_help_panel=OUTPUT),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The plots as PNG.", rich_help_panel=OUTPUT)
    ] = None,
    json: Json = False,
) -> None:
    """Find the block size for a traffic: memory, batches and speed of every size, simulated.

    Requests run through the project's own block manager under a continuous-batching scheduler; the clock is
    that of measured kernel times where there are any, else of [b]predicted[/] ones, and a roofline.

    \b
      [b]pagedgen explore[/] --gpu h100 --trace azure.csv --html report.html
      [b]pagedgen explore[/] --gpu h100 --memory 40GiB --adaptive --trace chat.csv
      [b]pagedgen explore[/] --gpu a100 --trace mooncake.jsonl --rate-factor 0.5
    """
    from pagedgen.cli.explore import run

    run(
        gpu=gpu,
        model=model,
        tp=tp,
        memory=memory,
        kv_dtype=kv_dtype,
        block_sizes=block_sizes,
        adaptive=adaptive,
        traces=[Path(path) for path in trace or ()],
        requests=requests,
        concurrency=concurrency,
        rate_factor=rate_factor,
        request_rate=request_rate,
        prefix_caching=prefix_caching,
        host_memory=host_memory,
        max_num_seqs=max_num_seqs,
        max_batched_tokens=max_batched_tokens,
        kernel_times=kernel_times,
        jobs=jobs,
        seed=seed,
        html=html,
        plots=plots,
        as_json=json,
    )


@app.command()
def targets(json: Json = False) -> None:
    """List the processors known by name, and the one this machine has.

    \b
      [b]pagedgen targets[/] --json
    """
    from pagedgen.cli.lists import show_targets

    show_targets(as_json=json)


@app.command()
def models(json: Json = False) -> None:
    """List the models known by name; any Hugging Face config.json works as well.

    \b
      [b]pagedgen models[/]
    """
    from pagedgen.cli.lists import show_models

    show_models(as_json=json)


@app.command()
def doctor(json: Json = False) -> None:
    """Check what pagedgen needs on this machine, and say how to get what is missing.

    \b
      [b]pagedgen doctor[/]
    """
    from pagedgen.cli.doctor import run

    raise typer.Exit(run(as_json=json))
