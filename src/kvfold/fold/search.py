"""The fewest KV heads that keep a model within a limit on text that no step has seen.

More heads are taken never to lose more, so a limit is looked for by halves. Closed forms go first,
which cost a pass over the text each: what holds in closed form holds when it is fitted. Fits, which
take several times as long, decide between fewer heads than that only.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, inf
from pathlib import Path

from kvfold.arch.target import Target
from kvfold.checkpoint.records import TRIED, HeldOut, TriedRow
from kvfold.errors import RunError, ThresholdError
from kvfold.files import write_json

TRIED_NAME = "tried.json"
_TRIES = "tries"
CLOSED = "none"
_UTTERLY = 700.0  # nats: exp of more is no float

Attempt = Callable[[Target, str, Path], HeldOut]


@dataclass(frozen=True)
class Limit:
    """What is not to be exceeded on held-out text; see ``kvfold eval``."""

    max_ppl_ratio: float | None = None
    max_kl: float | None = None

    def holds(self, found: HeldOut) -> bool:
        """Whether both limits, as far as there are any, are kept.

        >>> Limit(max_ppl_ratio=1.1).holds({"nats_lost": 0.09, "kl": 0.2})
        True
        """
        most_ratio = inf if self.max_ppl_ratio is None else self.max_ppl_ratio
        most_kl = inf if self.max_kl is None else self.max_kl
        return _ratio(found) <= most_ratio and found["kl"] <= most_kl

    @property
    def words(self) -> str:
        given = {"--max-ppl-ratio": self.max_ppl_ratio, "--max-kl": self.max_kl}
        return ", ".join(f"{name} {value:g}" for name, value in given.items() if value is not None)


def _ratio(found: HeldOut) -> float:
    """Of perplexities; of a model that is utterly lost, more than any limit."""
    return exp(min(found["nats_lost"], _UTTERLY))


class Search:
    """Tries targets, keeping what was found and the layers of what holds.

    Args:
        folder: where that is kept, for a run that is taken up again.
        targets: fewest heads first. fit: what the result is fitted by.
        attempt: folds to a target by a fit, keeping layers in a folder; and what it lost.
    """

    def __init__(
        self, folder: Path, targets: Sequence[Target], fit: str, limit: Limit, attempt: Attempt
    ) -> None:
        self._file, self._tries = folder / TRIED_NAME, folder / _TRIES
        self._layers = folder / "layers"
        self._targets, self._fit, self._limit, self._attempt = targets, fit, limit, attempt
        self.rows: list[TriedRow] = TRIED.read(self._file) if self._file.exists() else []

    def run(self) -> Target:
        """The fewest heads that hold; their layers are where a conversion keeps its own.

        Raises:
            ThresholdError: if none do.
        """
        targets = list(self._targets)
        held = self._fewest(targets, CLOSED)
        if self._fit != CLOSED:
            fewer = targets if held is None else targets[: targets.index(held)]
            held = self._fewest(fewer, self._fit) or held
        if held is None:
            raise self._failure()
        self._found(held, self._fit)  # what holds in closed form may not have been fitted yet
        chosen = self._folder(held, self._fit)
        if chosen.exists():
            chosen.rename(self._layers)
        shutil.rmtree(self._tries, ignore_errors=True)
        return held

    def _fewest(self, targets: Sequence[Target], fit: str) -> Target | None:
        """The first that holds, where those behind one that holds do, too."""
        low, high = 0, len(targets)
        while low < high:
            middle = (low + high) // 2
            if self._holds(targets[middle], fit):
                high = middle
            else:
                low = middle + 1
        return targets[low] if low < len(targets) else None

    def _holds(self, target: Target, fit: str) -> bool:
        """Whether it keeps the limit; only the layers of the best result so far are left."""
        known = len(self.rows)
        holds = self._limit.holds(self._found(target, fit))
        if len(self.rows) > known:  # of what an earlier run has tried, what is left is right
            self._clear(self._folder(target, fit), best=holds and fit == self._fit)
        return holds

    def _clear(self, own: Path, *, best: bool) -> None:
        """Remove the layers of a try, or of all others if it is the best."""
        others = [folder for folder in self._tries.iterdir() if folder != own]
        for folder in others if best else [own]:
            shutil.rmtree(folder, ignore_errors=True)

    def _found(self, target: Target, fit: str) -> HeldOut:
        """What it lost, folded now unless it was before."""
        for row in self.rows:
            if (row["target"], row["fit"]) == (target.label, fit):
                return row["held_out"]
        found = self._attempt(target, fit, self._folder(target, fit))
        self.rows.append({"target": target.label, "fit": fit, "held_out": found})
        write_json(self._file, self.rows)
        return found

    def _folder(self, target: Target, fit: str) -> Path:
        return self._tries / f"{target.label.replace(' ', '-')}-{fit}"

    def _failure(self) -> ThresholdError:
        self._file.unlink()  # nothing is worth going on from
        shutil.rmtree(self._tries, ignore_errors=True)
        best = min(self.rows, key=lambda row: row["held_out"]["nats_lost"])
        lost = best["held_out"]
        return ThresholdError(
            f"no number of KV heads holds {self._limit.words}: {best['target']} (fit "
            f"{best['fit']}) gave a perplexity ratio of {_ratio(lost):.3g} and a KL of "
            f"{lost['kl']:.3g} on {lost['tokens']} held-out tokens",
            "allow more and heal the result, or give more calibration text",
        )


def measured(found: HeldOut | None) -> HeldOut:
    """What an attempt lost.

    Raises:
        RunError: if it was not measured.
    """
    if found is None:
        raise RunError("nothing was held out to measure on", "--force starts over")
    return found
