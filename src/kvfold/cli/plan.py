"""``kvfold plan``"""

from textwrap import fill
from typing import TYPE_CHECKING

import click

from kvfold.cli.output import emit
from kvfold.cli.parse import asks
from kvfold.plan.request import PlanRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfold.plan.hardware import Hardware
    from kvfold.plan.model import Model
    from kvfold.plan.plan import Option, Plan
    from kvfold.plan.roofline import Load


@click.command("plan")
@asks(PlanRequest)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(request: PlanRequest, as_json: bool) -> None:
    """Predict memory and speed of SRC on a machine, by KV heads or latents, and cache format.

    SRC is a folder (config.json is enough), a config.json, or a hub name; no weights are read.
    Times are bounds: no step is faster than its bytes and its FLOPs allow. With --gpu here, --probe
    adds what a step is expected to take.
    """
    from kvfold.plan.plan import make_plan
    from kvfold.plan.source import open_model, read_config

    if request.gpu == "list" or request.source is None:
        _print_machines()
        return
    model = open_model(request.source)
    expect = _prober(request.source, model) if request.probe else None
    machine = _machine(request)
    plan = make_plan(
        model, request.load, machine, request.kv_heads, request.kv_dtypes, expect,
        request.targets, read_config(request.source),
    )  # fmt: skip
    emit(as_json, plan.as_dict(), lambda: _print(plan, request.fit))


def _prober(source: str, model: "Model") -> "Callable[[int, Load], float]":
    from kvfold.bench.probe import Prober
    from kvfold.plan.source import read_config

    return Prober(read_config(source), model).step


def _machine(request: PlanRequest) -> "Hardware":
    from kvfold.plan.hardware import corrected, hardware_of

    own = {"memory": request.memory, "bandwidth": request.bandwidth, "flops": request.flops}
    if request.gpu == "here":
        from kvfold.bench.this_machine import measure_this_machine

        return corrected(measure_this_machine(), **own)
    return hardware_of(request.gpu, **own)


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
        f"{load.batch:,} x {load.context:,} tokens"
        + (", each GPU" if load.gpus > 1 else "")
        + (f", {load.evict:.4g} of the tokens kept" if load.evict is not None else "")
        + (f", {load.select:.4g} of the cache read" if load.select is not None else ""),
        columns,
        rows,
        caption="> recommended. Times are the least possible, bound by bytes read or FLOPs.\n"
        + ("Here: expected of transformers with kvfold, by timing a few layers.\n" * probed)
        + "10% of the memory is left to the runtime.",
    )
    click.echo(f"{chosen.label}, {chosen.kv_dtype} cache:")
    for reason in plan.recommendation.reasons:
        click.echo(fill(reason, 78, initial_indent="- ", subsequent_indent="  "))


def _columns(fit: bool, probed: bool) -> list[str]:
    if fit:
        return ["max context", "max batch"]
    return ["step ms", "here ms", "prompt s"] if probed else ["tok/s", "bound", "prompt s"]


def _row(option: "Option", fit: bool, probed: bool, chosen: bool) -> list[str]:
    row = [
        f"{'> ' if chosen else ''}{option.latent or option.kv_heads}",
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
