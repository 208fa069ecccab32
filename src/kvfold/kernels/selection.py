"""Choosing the pages that a step of decoding reads; by PyTorch, where no kernel does it."""

from typing import NamedTuple

import torch

from kvfold.kernels.view import Rows
from kvfold.ops.formats import decode
from kvfold.ops.select import Reading, estimates, weights


class Question(NamedTuple):
    """Which pages of each sequence and KV head queries should read.

    Attributes:
        q: ``[B, Hq, T, D]``. summaries: two rows of each page, ``[P, Hkv, 2, row]``.
        table: int32 ``[B, pages]`` on the CPU. readings: of each sequence. by: how pages are
            summarised.
    """

    q: torch.Tensor
    summaries: Rows
    table: torch.Tensor
    readings: list[Reading]
    by: str
    scale: float
    softcap: float | None
    top_p: float | None


class Chosen(NamedTuple):
    """Pages in order of their positions.

    Attributes:
        table: int32 ``[B, Hkv, most]``, of which the first ``counts[b, h]`` are chosen.
        counts: int32 ``[B, Hkv]``.
    """

    table: torch.Tensor
    counts: torch.Tensor


def choose_by_pytorch(question: Question) -> Chosen:
    """The pages that are always read, and those whose summaries promise most."""
    heads = question.summaries.data.shape[1]
    return chosen_of(question, [_logits(question, b) for b in range(len(question.q))], heads)


def _logits(question: Question, b: int) -> torch.Tensor:
    """``[Hkv, queries, pages]`` of a sequence's pages that may be left out."""
    rows, reading = question.summaries, question.readings[b]
    pages = question.table[b, reading.always : reading.last].to(rows.data.device, torch.long)
    return capped(question, estimates(
        queries_of(question, b), decoded_summaries(rows, pages), question.by
    ))  # fmt: skip


def queries_of(question: Question, b: int) -> torch.Tensor:
    """Float32 ``[Hkv, queries, D]``: those that share a KV head."""
    heads = question.summaries.data.shape[1]
    return question.q[b].float().unflatten(0, (heads, -1)).flatten(1, 2)


def capped(question: Question, scores: torch.Tensor) -> torch.Tensor:
    """Scores scaled and capped."""
    scores = scores * question.scale
    if question.softcap is None:
        return scores
    return question.softcap * torch.tanh(scores / question.softcap)


def decoded_summaries(rows: Rows, pages: torch.Tensor) -> torch.Tensor:
    """Float32 ``[Hkv, pages, 2, D]``."""
    scales = rows.data.new_empty(0) if rows.scales is None else rows.scales[pages]
    data = rows.data[pages].contiguous().view(torch.uint8)
    return decode(data, scales, rows.fmt, rows.dim).transpose(0, 1)


def chosen_of(question: Question, logits: list[torch.Tensor], heads: int) -> Chosen:
    """The best pages by logits ``[Hkv, queries, pages]`` of each sequence."""
    readings = question.readings
    most = max((r.always + r.keep for r in readings), default=0)
    table = torch.zeros(len(readings), heads, most, dtype=torch.int32, device="cpu")
    counts = torch.zeros(len(readings), heads, dtype=torch.int32, device="cpu")
    for b, reading in enumerate(readings):
        pages = question.table[b]
        found = best(weights(logits[b]), reading.keep, question.top_p)
        for head, own in enumerate(found):
            chosen = torch.cat([pages[: reading.always], pages[reading.always + own]])
            table[b, head, : len(chosen)] = chosen
            counts[b, head] = len(chosen)
    return Chosen(table, counts)


def best(weights: torch.Tensor, keep: int, top_p: float | None) -> list[torch.Tensor]:
    """Of each row of ``[Hkv, pages]`` the indices of the largest, ascending; of equals the first.

    Args:
        top_p: as few as have that share of a row together, at most ``keep``.
    """
    order = weights.argsort(dim=-1, descending=True, stable=True)[:, :keep].cpu()
    kept = weights.cpu().gather(-1, order)
    if top_p is None:
        return [row.sort().values for row in order]
    enough = (kept.cumsum(-1) >= top_p).long()
    counts = (order.shape[1] - enough.sum(-1) + 1).clamp_max(order.shape[1])
    return [row[:count].sort().values for row, count in zip(order, counts.tolist(), strict=True)]


def exact_logits(question: Question, b: int, keys: torch.Tensor, page_size: int) -> torch.Tensor:
    """What pages would really get: ``[Hkv, queries, pages]``, log-sum-exp over their keys.

    Args:
        keys: float32 ``[Hkv, S, D]``, all of the sequence's.
    """
    reading = question.readings[b]
    cut = keys[:, reading.always * page_size : reading.last * page_size]
    scores = capped(question, queries_of(question, b) @ cut.mT)
    return scores.unflatten(-1, (-1, page_size)).logsumexp(-1)
