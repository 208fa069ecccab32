"""``kvfold plan``"""

from textwrap import fill
from typing import TYPE_CHECKING

import click

from kvfold import numbers
from kvfold.cli.options import Number, Source
from kvfold.cli.output import emit
from kvfold.errors import InputError
from kvfold.numbers import Wholes, parts

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfold.plan.hardware import Hardware
    from kvfold.plan.model import Model
    from kvfold.plan.plan import Option, Plan
    from kvfold.plan.roofline import Load


@click.command("plan")
@click.argument("source", metavar="SRC", type=Source(), required=False)
@click.option("--context", type=Number(numbers.CONTEXT), default="8k", show_default=True,
              help="Tokens of each sequence.")  # fmt: skip
@click.option("--batch", type=Number(numbers.BATCH), default="1", show_default=True,
              help="Sequences at once.")  # fmt: skip
@click.option("--gpu", help="A machine by name (--gpu list shows them), or here.")
@click.option("--probe", is_flag=True, help="Also time a few made-up layers on this machine.")
@click.option(
    "--gpus", type=Number(numbers.GPUS), default=1, show_default=True, help="That share each layer."
)
@click.option("--memory", type=Number(numbers.GIGABYTES), help="GB, if it is not listed.")
@click.option("--bandwidth", type=Number(numbers.BANDWIDTH), help="GB/s, of such a machine.")
@click.option("--flops", type=Number(numbers.FLOPS), help="TFLOP/s in bfloat16, of such.")
@click.option("--kv-heads", type=Number(Wholes(numbers.HEADS)),
              help="To compare, as 32,8,1.  [default: SRC's and usual ones]")  # fmt: skip
@click.option("--kv-dtype", default="bf16,int8,int4", show_default=True)
@click.option("--fit", is_flag=True, help="Show the largest context and batch that fit.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    source: str | None,
    context: int,
    batch: int,
    gpu: str | None,
    probe: bool,
    gpus: int,
    memory: float | None,
    bandwidth: float | None,
    flops: float | None,
    kv_heads: tuple[int, ...] | None,
    kv_dtype: str,
    fit: bool,
    as_json: bool,
) -> None:
    """Predict memory and speed of SRC on a machine, by KV heads and cache format.

    SRC is a folder (config.json is enough), a config.json, or a hub name; no weights are read.
    Times are bounds: no step is faster than its bytes and its FLOPs allow. With --gpu here, --probe
    adds what a step is expected to take.
    """
    from kvfold.plan.plan import make_plan
    from kvfold.plan.roofline import Load
    from kvfold.plan.source import open_model

    if gpu == "list":
        _print_machines()
        return
    if source is None:
        raise InputError("no model given", "kvfold plan SRC --gpu h100, or --gpu list")
    if probe and gpu != "here":
        raise InputError("--probe times layers on this machine", "use it with --gpu here")
    if probe and fit:
        raise InputError(
            "--fit shows no times, which --probe would measure", "leave one of them out"
        )
    model = open_model(source)
    expect = _prober(source, model) if probe else None
    machine = _machine(gpu, memory, bandwidth, flops)
    load = Load(context, batch, gpus=gpus)
    dtypes = parts(kv_dtype, "--kv-dtype")
    plan = make_plan(model, load, machine, kv_heads, dtypes, expect)
    emit(as_json, plan.as_dict(), lambda: _print(plan, fit))


def _prober(source: str, model: "Model") -> "Callable[[int, Load], float]":
    from kvfold.bench.probe import Prober
    from kvfold.plan.source import read_config

    return Prober(read_config(source), model).step


def _machine(
    gpu: str | None, memory: float | None, bandwidth: float | None, flops: float | None
) -> "Hardware":
    from kvfold.plan.hardware import corrected, hardware_of

    if gpu == "here":
        from kvfold.bench.here import measure_here

        here = measure_here()
        return corrected(here, memory=memory, bandwidth=bandwidth, flops=flops)
    return hardware_of(gpu, memory=memory, bandwidth=bandwidth, flops=flops)


def _print_machines() -> None:
    from kvfold.plan.hardware import GB, TABLE, TERA
    from kvfold.report.tables import print_table

    rows = [
        [h.name, f"{h.memory / GB:,.0f}", f"{h.bandwidth / GB:,.0f}",
         f"{h.flops / TERA:,.0f}" if h.flops else "", h.source]
        for h in TABLE.values()
    ]  # fmt: skip
    print_table("Machines", ["name", "GB", "GB/s", "TFLOP/s", "source"], rows)


def _print(plan: "Plan", fit: bool) -> None:
    from kvfold.report.tables import count, print_table, size

    model, machine, load = plan.model, plan.hardware, plan.load
    kinds = ", ".join(f"{number} {kind}" for kind, number in model.kinds.items())
    sparse = model.active_parameters < model.parameters
    parameters = f"{count(model.parameters)} parameters"
    parameters += f", {count(model.active_parameters)} active" if sparse else ""
    parameters += " (estimated from the config)" if model.estimated else ""
    shared = f", over {load.gpus} GPUs" if load.gpus > 1 else ""
    speed = f"{size(machine.memory)}, {machine.bandwidth / 1e9:,.0f} GB/s"
    facts = [
        ("model", f"{model.model_type}, {parameters}"),
        ("layers", f"{kinds}; {model.num_heads} query heads, {model.num_kv_heads} KV heads"),
        ("weights", f"{size(model.weight_bytes)}{shared}"),
        ("machine", f"{machine.name}: {speed}"),
        ("numbers from", machine.source),
    ]
    print_table(model.name, ["", ""], facts)
    columns = ["heads", "format", "KiB per token", "cache GiB", "total GiB", "fits"]
    probed = any(option.expected for option in plan.options)
    columns += _columns(fit, probed)
    chosen = plan.recommendation.option
    rows = [_row(option, fit, probed, option is chosen) for option in plan.options]
    print_table(
        f"{load.batch:,} x {load.context:,} tokens" + (", each GPU" if load.gpus > 1 else ""),
        columns,
        rows,
        caption="> recommended. Times are the least possible, bound by bytes read or FLOPs.\n"
        + ("Here: expected of transformers with kvfold, by timing a few layers.\n" * probed)
        + "10% of the memory is left to the runtime.",
    )
    plural = "s" if chosen.kv_heads > 1 else ""
    click.echo(f"{chosen.kv_heads} KV head{plural}, {chosen.kv_dtype} cache:")
    for reason in plan.recommendation.reasons:
        click.echo(fill(reason, 78, initial_indent="- ", subsequent_indent="  "))


def _columns(fit: bool, probed: bool) -> list[str]:
    if fit:
        return ["max context", "max batch"]
    return ["step ms", "here ms", "prompt s"] if probed else ["tok/s", "bound", "prompt s"]


def _row(option: "Option", fit: bool, probed: bool, chosen: bool) -> list[str]:
    row = [
        f"{'> ' if chosen else ''}{option.kv_heads}",
        option.kv_dtype,
        f"{option.kv_bytes_per_token / 1024:.3g}",
        _gib(option.memory.kv_cache),
        _gib(option.memory.total),
        "yes" if option.fits else "no",
    ]
    if fit:
        return [*row, f"{option.largest_context:,}", f"{option.largest_batch:,}"]
    prompt = f"{option.prefill.seconds:.3g}"
    if probed:
        expected = f"{1e3 * option.expected:.3g}" if option.expected else ""
        return [*row, f"{1e3 * option.decode.seconds:.3g}", expected, prompt]
    binds = "FLOPs" if option.decode.binds == "arithmetic" else "bytes"
    return [*row, f"{option.tokens_per_second:,.0f}", binds, prompt]


def _gib(number: float) -> str:
    gib = number / (1 << 30)
    return f"{gib:.3g}" if gib >= 0.1 else f"{gib:.3f}"
