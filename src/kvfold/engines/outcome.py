"""An engine's answer beside the reference's: where they part, and how close the call was there."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any, Literal

from kvfold.engines.ask import Reply
from kvfold.engines.reference import Continuation

_IDS = 1 << 31  # more than any vocabulary; one may be larger than its tokenizer's
Status = Literal["same", "differs", "absent", "refused", "failed"]


@dataclass(frozen=True)
class Difference:
    """Where an engine's tokens first part from the reference's.

    Attributes:
        prompt, token: counted from 1. expected, found: in words; nothing found where it ended.
        gap: between the reference's two logits, if the engine's token is among its likeliest.
    """

    prompt: int
    token: int
    expected: str
    found: str | None
    gap: float | None


@dataclass(frozen=True)
class Outcome:
    """What one engine made of the checkpoint.

    Attributes:
        status: ``same`` or ``differs`` if it answered; else ``absent`` if something is not on this
            machine, ``refused`` if it does not open the checkpoint, or ``failed``.
        version, how: which it is, and how the checkpoint was given to it.
        equal: tokens that are the reference's, of those compared; what follows a difference is not
            compared where that counts as a near tie, and not equal where it does not.
        near_ties: prompts whose comparison ended so. differences: of each prompt the first.
        why: it did not answer.
    """

    engine: str
    status: Status
    version: str | None = None
    how: str = ""
    equal: int = 0
    compared: int = 0
    near_ties: int = 0
    differences: tuple[Difference, ...] = ()
    why: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def judge(
    engine: str, reply: Reply, expected: Sequence[Continuation], tokenizer: Any, near: float
) -> Outcome:
    """Compare an engine's reply with what transformers says."""
    known: dict[str, Any] = {
        "version": reply.version, "how": reply.how, "seconds": reply.seconds
    }  # fmt: skip
    if reply.verdict != "answered":
        return Outcome(engine, reply.verdict, why=reply.why, **known)
    answer = _tokens(reply.answer, expected, tokenizer)
    if answer is None:
        return Outcome(engine, "failed", why="it answers in another form than asked", **known)
    equal = compared = near_ties = 0
    differences = []
    for number, (found, wanted) in enumerate(zip(answer, expected, strict=True), 1):
        same = _common(found, wanted.tokens)
        equal += same
        if same == len(wanted.tokens) or _ended(found, wanted, same):
            compared += same
            continue
        differences.append(_difference(number, same, found, wanted, tokenizer))
        gap = differences[-1].gap
        tie = gap is not None and gap <= near
        near_ties += tie
        compared += same if tie else len(wanted.tokens)
    status: Status = "differs" if len(differences) > near_ties else "same"
    return Outcome(
        engine, status, equal=equal, compared=compared, near_ties=near_ties,
        differences=tuple(differences), **known,
    )  # fmt: skip


def _common(found: Sequence[int], wanted: Sequence[int]) -> int:
    """How many tokens are the same, from the first on."""
    pairs = zip(found, wanted, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _ended(found: Sequence[int], wanted: Continuation, same: int) -> bool:
    """Whether an answer ends where the reference's next token is one that ends answers."""
    return len(found) == same and wanted.tokens[same] in wanted.special


def _difference(
    number: int, same: int, found: Sequence[int], wanted: Continuation, tokenizer: Any
) -> Difference:
    other = found[same] if same < len(found) else None
    return Difference(
        prompt=number,
        token=same + 1,
        expected=tokenizer.decode([wanted.tokens[same]]),
        found=None if other is None else tokenizer.decode([other]),
        gap=None if other is None else wanted.gap(same, other),
    )


def _tokens(
    answer: Any, expected: Sequence[Continuation], tokenizer: Any
) -> list[list[int]] | None:
    """An engine's tokens; of text, those of the reference that make it. None for another form."""
    if not isinstance(answer, list) or len(answer) != len(expected):
        return None
    if all(isinstance(each, str) for each in answer):
        return [_spelled(*pair, tokenizer) for pair in zip(answer, expected, strict=True)]
    good = all(
        isinstance(each, list) and all(type(token) is int and 0 <= token < _IDS for token in each)
        for each in answer
    )
    return answer if good else None


def _spelled(text: str, wanted: Continuation, tokenizer: Any) -> list[int]:
    """The reference's tokens that a text starts with, and a token of what follows them."""
    before = tokenizer.decode(wanted.ids)
    for same in range(len(wanted.tokens), -1, -1):
        begin = tokenizer.decode([*wanted.ids, *wanted.tokens[:same]])[len(before) :]
        if text.startswith(begin):
            rest = tokenizer(text[len(begin) :], add_special_tokens=False)["input_ids"]
            return [*wanted.tokens[:same], *rest[:1]]
    return []
