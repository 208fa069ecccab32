"""What the demo measured, and where it keeps it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvfold.arch.target import heads_or_latent
from kvfold.quality.scores import Quality

SOURCE = "source"


@dataclass(frozen=True)
class DemoRow:
    """One model of the demo: the source, or one of its folds.

    Attributes:
        latent: in place of KV heads, as ``24+8``; all heads read it then.
    """

    kv_heads: int
    method: str
    quality: Quality
    latent: str | None = None

    @property
    def cached(self) -> str:
        """What the cache holds of a token, in a few words."""
        return heads_or_latent(self.kv_heads, self.latent).label


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured; its files are in ``out``.

    Attributes:
        rows: the source first.
        training_tokens: tokens the source was trained on, repetitions included.
    """

    rows: tuple[DemoRow, ...]
    seed: int
    parameters: int
    training_tokens: int
    out: Path

    @property
    def source(self) -> Path:
        """The trained model and its tokenizer, for further commands."""
        return self.out / SOURCE

    @property
    def plot(self) -> Path:
        """The plot; an SVG of the same lies beside it."""
        return self.out / "demo.png"

    @property
    def calibration(self) -> Path:
        return self.out / "calibration.txt"

    @property
    def held_out(self) -> Path:
        return self.out / "held-out.txt"

    def as_dict(self) -> dict[str, Any]:
        """For ``--json`` and the record in the folder."""
        paths = {name: str(getattr(self, name)) for name in ("source", "plot", "held_out")}
        return asdict(self) | {"out": str(self.out), **paths}
