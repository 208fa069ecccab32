"""``kvfold convert``"""

from math import exp
from pathlib import Path
from shlex import quote
from typing import Any

import click

from kvfold import numbers
from kvfold.cli.options import NewFolder, Number
from kvfold.cli.output import emit, say
from kvfold.cli.parse import asks
from kvfold.cli.signals import resumable
from kvfold.errors import InputError
from kvfold.fold.request import ConvertRequest
from kvfold.record import RECORD


@click.command("convert")
@asks(ConvertRequest)
@click.argument("out", metavar="OUT", type=NewFolder())
@click.option(
    "--heal",
    "heal_tokens",
    type=Number(numbers.TOKENS),
    help="Then heal for N tokens (k 1,000, Ki 1,024) on the calibration text; see `kvfold heal`. "
    "The folded model stays beside OUT, as OUT.folded.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, show sizes, write nothing.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    request: ConvertRequest,
    out: Path,
    heal_tokens: int | None,
    dry_run: bool,
    resume: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Fold SRC to fewer KV heads, or to a latent, and write OUT, an ordinary Hugging Face folder.

    SRC is a Hugging Face folder, a hub name, or a GGUF file; it is only read.
    Under `torchrun ... -m kvfold convert ...` processes share the calibration text.
    """
    from kvfold.checkpoint.places import working_folder
    from kvfold.cli.progress import progress_bar
    from kvfold.fold.convert import run_request
    from kvfold.fold.preview import preview
    from kvfold.quality.launched import launched_rank, launched_size

    if heal_tokens is not None and launched_size() > 1:
        raise InputError(
            "--heal heals in one process", "convert first, then `torchrun … -m kvfold heal`"
        )
    if heal_tokens is not None and not dry_run:
        convert_and_heal(request, out, heal_tokens, resume, force, as_json)
        return
    if dry_run:
        found = preview(request, out, force=force)
        emit(as_json, found.as_dict(), lambda: _print_preview(found.as_dict()))
        return
    with resumable(lambda: working_folder(out)), progress_bar() as progress:
        record = run_request(request, out, resume=resume, force=force, progress=progress)
    if launched_rank() != 0:
        return
    emit(as_json, record, lambda: _print_record(record, out))
    for warning in record.get("warnings", []):
        say(f"warning: {warning}", err=True)
    if not as_json:
        for line in _next(request, out):
            say(line, err=True)


def _next(request: ConvertRequest, out: Path) -> list[str]:
    """What could be done now, and what that gained where it was measured."""
    from kvfold.plan.evidence import FOLDED, MODEL

    source, folded = quote(request.source), quote(str(out))
    texts = " ".join(f"--text {quote(name)}" for name in request.files or ("TEXT.txt",))
    lines = [
        f"next: kvfold eval {source} {folded} --text YOUR.txt",
        f"next: kvfold heal {folded} HEALED --teacher {source} {texts} --tokens 700k",
    ]
    if request.fit == "local":
        fitted, shortly, healed = FOLDED
        lines.append(
            f"{MODEL} with a third of its heads lost {fitted.similar:.2f} nats on text like the "
            f"calibration's and {fitted.other:.2f} on other text; {shortly.similar:.2f} and "
            f"{shortly.other:.2f} once healed with 60k tokens, {healed.similar:.2f} and "
            f"{healed.other:.2f} with 700k of five kinds of text"
        )
    return lines


def convert_and_heal(
    request: ConvertRequest, out: Path, tokens: int, resume: bool, force: bool, as_json: bool
) -> None:
    """Fold to OUT.folded (unless that is there from an interrupted run), heal it to OUT."""
    from kvfold.checkpoint.gguf import is_gguf
    from kvfold.checkpoint.language import language_config
    from kvfold.checkpoint.places import check_out, working_folder
    from kvfold.checkpoint.source import read_config, resolve
    from kvfold.checkpoint.workspace import is_begun, opened
    from kvfold.cli.heal import heal_and_show
    from kvfold.cli.progress import progress_bar
    from kvfold.errors import InputError
    from kvfold.fold.convert import run_request
    from kvfold.healing.request import HealRequest, default_rate, default_updates

    if not request.files:
        raise InputError("--heal needs text to train on", "give a file with --calibration")
    folded = out.with_name(out.name + ".folded")
    # The folded model, whose size tells, is not there yet.
    config = {} if is_gguf(request.source) else read_config(resolve(request.source))
    healing = HealRequest.asked(
        folded=folded,
        teacher=request.source,
        texts=request.files,
        tokens=tokens,
        stages=("kl",) if request.fit == "local" else None,
        context=request.context,
        lr=default_rate(language_config(config), default_updates(tokens, request.context)),
        device=request.device,
        dtype=request.dtype,
        seed=request.seed,
    )
    check_out(out, request.paths, force or resume)
    with opened(out) as work:  # for both steps: a second run would fold again what is healed here
        if resume and folded.exists():
            _check_same_fold(request, folded)
        else:
            again = resume and is_begun(folded)
            if folded.exists() and not (folded / RECORD).is_file():
                raise InputError(f"{folded} is in the way", "move it away, or choose another OUT")
            with resumable(lambda: working_folder(folded)), progress_bar() as progress:
                run_request(request, folded, resume=again, force=force, progress=progress)
        again = resume and is_begun(out)
        with resumable(lambda: folded):
            heal_and_show(healing, out, resume=again, force=force, as_json=as_json, work=work)


def _check_same_fold(request: ConvertRequest, folded: Path) -> None:
    """Refuse to heal what another request has folded, or another source."""
    from kvfold.errors import InputError
    from kvfold.fold.convert import made_now
    from kvfold.fold.record import read_record

    record = read_record(folded) if (folded / RECORD).is_file() else {}
    if not made_now(record, request):
        raise InputError(
            f"{folded} was made by another command ({record.get('command', 'unknown')}), or from "
            "other weights or text",
            "repeat the first command's arguments, or --force without --resume to start over",
        )


def _print_preview(preview: dict[str, Any]) -> None:
    from kvfold.report.tables import print_table, size

    request, geometry = preview["request"], preview["geometry"]
    rows = [
        *(_geometry_rows(geometry) if geometry else []),
        *([] if geometry else [("one of these", target) for target in preview["targets"]]),
        ("method, fit", f"{request['method']}, {request['fit']}"),
        ("output", size(preview["output_bytes"])),
        ("disk space needed meanwhile", size(preview["disk_bytes_needed"])),
        ("disk space free", size(preview["disk_bytes_free"])),
    ]
    if preview["memory_bytes_at_least"]:
        rows.append(("memory, at least", size(preview["memory_bytes_at_least"])))
    print_table("Dry run: nothing was written", ["", ""], rows)


def _print_record(record: dict[str, Any], out: Path) -> None:
    from kvfold.report.tables import print_table, size

    rows = [*_geometry_rows(record["geometry"])]
    for each in record.get("compared", []):
        lost = ", ".join(f"{e:.4f} at {int(n):,}" for n, e in each["kl"].items())
        rows.append((f"KL with some layers of {each['target']}", lost))
    for each in record.get("tried", []):
        name = f"tried {each['target']}" + ("" if each["fit"] == "none" else f", {each['fit']}")
        rows.append((name, _lost(each["held_out"])))
    summary = record.get("summary", {})
    for what, key in (("V", "captured_value"), ("K", "captured_key")):
        if key in summary:
            rows.append((f"{what} energy kept (mean over layers)", f"{summary[key]:.1%}"))
    for name, stage in summary.get("stages", {}).items():
        change = f"{stage['error_before']:.3f} -> {stage['error_after']:.3f}"
        rows.append((f"layer error, {name.replace('_', ' ')}", change))
    held_out = record.get("held_out")
    if held_out:
        rows.append((f"nats lost, {held_out['tokens']:,} held-out tokens", _lost(held_out)))
    rows.append(("peak memory", size(record["run"]["peak_memory_bytes"])))
    rows.append(("time", f"{record['run']['seconds']:.0f} s"))
    print_table(f"Folded to {out}", ["", ""], rows)


def _lost(held_out: dict[str, Any]) -> str:
    nats = f"{held_out['nats_lost']:.3f} ± {held_out['nats_lost_error']:.3f}"
    return f"{nats} (perplexity × {exp(held_out['nats_lost']):.2f})"


def _geometry_rows(geometry: dict[str, Any]) -> list[tuple[str, str]]:
    from kvfold.fold.record import cached_numbers
    from kvfold.report.tables import size

    before, after = cached_numbers(geometry)
    cache = geometry["kv_bytes_per_token_16bit"]
    return [
        ("KV heads", f"{before} -> {after}"),
        ("KV cache per token (16 bit)", f"{size(cache['source'])} -> {size(cache['folded'])}"),
    ]
