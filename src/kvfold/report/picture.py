"""Drawings as files."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from kvfold.files import write_bytes
from kvfold.report.labels import any_letters


def save(figure: Figure, path: Path) -> None:
    """Write a drawing as PNG or SVG, by the name's end: whole, or not at all."""
    buffer, kind = io.BytesIO(), path.suffix[1:]
    metadata = {"Date": None} if kind == "svg" else None
    with any_letters():
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    write_bytes(path, buffer.getvalue())
