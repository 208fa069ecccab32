"""The table of a verification."""

from kvfold.engines.outcome import Outcome
from kvfold.engines.run import Verification
from kvfold.report.tables import print_table


def print_verification(found: Verification) -> None:
    """A row for each engine: how it was given the checkpoint, and whether it gives the tokens."""
    tokens = sum(len(each.tokens) for each in found.reference)
    print_table(
        f"{found.source}: {tokens} greedy tokens after {len(found.reference)} prompts",
        ["engine", "version", "loaded", "equal", "first difference"],
        [
            ["transformers", found.version, "as it is", str(tokens), "reference, float32"],
            *(_row(outcome) for outcome in found.outcomes),
        ],
        caption=_caption(found),
    )


def _row(outcome: Outcome) -> list[str]:
    cells = [outcome.engine, outcome.version or "", outcome.how]
    if outcome.why:
        return [*cells, "", f"{outcome.status}: {outcome.why[:200]}"]
    return [*cells, f"{outcome.equal} of {outcome.compared}", difference(outcome)]


def difference(outcome: Outcome) -> str:
    """The first difference in words: the token, what came instead, and how close the call was."""
    if not outcome.differences:
        return "none"
    first = outcome.differences[0]
    place = f"prompt {first.prompt}, token {first.token}"
    if first.found is None:
        return f"{place}: ended before {first.expected!r}"
    gap = "far" if first.gap is None else f"{first.gap:.2g}"
    return f"{place}: {first.found!r} for {first.expected!r}, logits {gap} apart"


def _caption(found: Verification) -> str:
    ties = [o for o in found.outcomes if o.near_ties]
    words = f"engines compute in {found.dtype}"
    if ties:
        words += f"; {sum(o.near_ties for o in ties)} prompts end at logits within {found.near:g}"
    return words
