"""A checkpoint that was folded or healed, in a report."""

from pathlib import Path
from typing import Any

from kvfold.checkpoint.records import FOLDING, HEALING, RECORDS
from kvfold.fold.record import cached_numbers
from kvfold.healing.watch import read_metrics
from kvfold.record import METRICS, RECORD
from kvfold.report.figures import captured_energy, drift, healing_curve, kv_memory, layer_errors
from kvfold.report.page import Figure, Part, Section, Table
from kvfold.report.scored import quality
from kvfold.report.tables import size
from kvfold.report.verdict import Evidence


def checkpoint(run: Path) -> list[Section]:
    """How it was folded, and how it was healed.

    Raises:
        InputError: for a record that is none.
    """
    folding, heal = _records(run)
    sections = []
    if heal:
        sections.append(_healing(run, heal))
    if folding:
        sections.append(_folding(run.name, folding))
    return sections


def evidence(run: Path, found: Evidence) -> None:
    """Add what its record tells to what is known of the last model."""
    folding, heal = _records(run)
    found.name, found.quality = run.name, ()
    if folding:
        cache = folding["geometry"]["kv_bytes_per_token_16bit"]
        found.cache = (cache["source"], cache["folded"])
        held_out = folding.get("held_out")
        if held_out:
            text = "held-out calibration text"
            found.quality = [
                {"text": text, "name": "source", "nats_lost": 0.0},
                {"text": text, "name": run.name, "nats_lost": held_out["nats_lost"]},
            ]
    if heal:
        found.quality = heal["quality"]


def _records(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    path = run / RECORD
    record = RECORDS.read(path)
    folding = dict(FOLDING.check(record, str(path))) if "geometry" in record else {}
    heal = record.get("heal")
    return folding, dict(HEALING.check(heal, f"{path}, of healing")) if heal is not None else {}


def _folding(name: str, record: dict[str, Any]) -> Section:
    cache = record["geometry"]["kv_bytes_per_token_16bit"]
    parts: list[Part] = [f"Warning: {warning}." for warning in record.get("warnings", [])]
    parts.append(Figure(
        kv_memory(cache["source"], cache["folded"]),
        "KV cache of one sequence in 16 bits against its length.",
    ))  # fmt: skip
    parts += [*_layers(record["layers"]), *_facts(record)]
    return Section(f"Folding: {name}", parts, details=True)


def _layers(layers: list[dict[str, Any]]) -> list[Part]:
    parts: list[Part] = []
    known = [row for row in layers if {"captured_value", "captured_key"} <= row.keys()]
    if any(layer["stages"] for layer in known):
        parts.append(Figure(
            layer_errors(known),
            "Error of each layer's output as a share of what the layer adds (median over tokens), "
            "after each stage.",
        ))  # fmt: skip
    drifted = [layer for layer in layers if layer.get("drift") is not None]
    if drifted:
        parts.append(Figure(
            drift(drifted),
            "Drift: how far the hidden states after each layer are from the source's, as a share "
            "of their length (median over tokens).",
        ))  # fmt: skip
    if known:
        parts.append(Figure(
            captured_energy(known),
            "Energy that the shared heads keep of the source's keys and values, by layer. What is "
            "missing is what fitting and healing must make good.",
        ))  # fmt: skip
    return parts


def _facts(record: dict[str, Any]) -> list[Part]:
    geometry = record["geometry"]
    before, after = cached_numbers(geometry)
    cache = geometry["kv_bytes_per_token_16bit"]
    calibration = record.get("calibration")
    text = "none"
    if calibration:
        text = f"{calibration['tokens']:,} tokens of {', '.join(calibration['texts'])}"
    facts = [
        ("source", record["source"]["name"]),
        ("query heads", str(geometry["num_heads"])),
        ("KV heads", f"{before} → {after}"),
        ("KV cache per token, 16 bit", f"{size(cache['source'])} → {size(cache['folded'])}"),
        ("method, fit", f"{record['method']}, {record['fit']}"),
        ("calibration", text),
        *_lost(record),
        ("time, peak memory", f"{record['run']['seconds']:.0f} s, "
                              f"{size(record['run']['peak_memory_bytes'])}"),
    ]  # fmt: skip
    return [Table(["", ""], facts), f"$ {record['command']}"]


def _lost(record: dict[str, Any]) -> list[tuple[str, str]]:
    found = record.get("held_out")
    if not found:
        return []
    words = (
        f"{found['nats_lost']:.3f} ± {found['nats_lost_error']:.3f} ({found['tokens']:,} tokens)"
    )
    return [("nats lost, held-out calibration text", words)]


def _share(heal: dict[str, Any]) -> list[tuple[str, str]]:
    if "kept" not in heal:
        return []
    return [("kept of what training changed", f"{heal['kept']['share']:.0%}")]


def _healing(run: Path, heal: dict[str, Any]) -> Section:
    request = heal["request"]
    facts = [
        ("stages", ", ".join(request["stages"])),
        ("tokens", f"{request['tokens']:,} in {heal['steps']:,} updates"),
        ("trained", request["train"] + (", LoRA" if request["lora_rank"] else "")),
        ("peak learning rate", f"{request['lr']:g} (attention), {request['lr_rest']:g} (rest)"),
        *_share(heal),
        ("time", f"{heal['run']['seconds']:.0f} s on {heal['run']['device']}, "
                 f"{heal['run']['processes']} process(es)"),
    ]  # fmt: skip
    parts: list[Part] = quality(heal["quality"])
    if (run / METRICS).is_file():
        rows = read_metrics(run / METRICS)
        if rows:
            parts.append(Figure(healing_curve(rows), "Divergence from the source while healing."))
    return Section(f"Healing: {run.name}", [*parts, Table(["", ""], facts), f"$ {heal['command']}"])
