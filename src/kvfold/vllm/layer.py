"""Attention of one layer over blocks of vLLM's memory. vLLM itself is not imported."""

from collections.abc import Sequence
from functools import cache

import torch

from kvfold.errors import InputError
from kvfold.kernels.backend import Call
from kvfold.kernels.cpu.again import Again, Sides, sides_at_hand
from kvfold.kernels.registry import attend, home
from kvfold.kernels.view import KVView, Rows
from kvfold.ops.format import Format
from kvfold.ops.formats import format_of
from kvfold.ops.options import Options, Scoring, Visibility
from kvfold.vllm.batch import Group
from kvfold.vllm.pages import PageFormat, memory_of
from kvfold.vllm.recent import PAGE, PAGES, RECENT


def layer_options(
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
) -> Options:
    """What a layer asks of attention, in vLLM's words for it.

    Args:
        sliding_window: keys that a query sees, its own among them; None or below 1: all.
        softcap: None or 0: none. alibi_slopes, sink_logits: ``[Hq]``.
    """
    left = sliding_window - 1 if sliding_window and sliding_window > 0 else None
    if alibi_slopes is None and sink_logits is None:
        return _shared(left, scale, softcap or None)
    return Options(
        Visibility(left=left, right=0), Scoring(scale, softcap or None, alibi_slopes, sink_logits)
    )


@cache
def _shared(left: int | None, scale: float, softcap: float | None) -> Options:
    """One for all layers that ask for the same, which is what a step's calls are shared by."""
    return Options(Visibility(left=left, right=0), Scoring(scale, softcap))


class Layer:
    """Writes a layer's new keys and values into its blocks, and attends over them.

    Args:
        fmt: the format of its blocks. num_kv_heads, head_dim, v_head_dim: the layer's sizes.
    """

    def __init__(self, fmt: Format, num_kv_heads: int, head_dim: int, v_head_dim: int) -> None:
        self.fmt, self.num_kv_heads = fmt, num_kv_heads
        self.head_dim, self.v_head_dim = head_dim, v_head_dim
        self._cache: torch.Tensor | None = None
        self._rings: torch.Tensor | None = None

    def _read(self, cache: torch.Tensor) -> tuple[Rows, Rows]:
        """The layer's memory as kernels read it; found once."""
        if cache is not self._cache:
            self._kernels = home(cache.device)
            page_size = cache.shape[2]
            packed = self._kernels.packs(page_size)
            format = PageFormat(self.fmt, self.head_dim, self.v_head_dim, page_size, packed)
            memory = memory_of(cache)
            if memory.shape[1] != self.num_kv_heads:
                raise InputError(
                    f"blocks of {memory.shape[1]} KV heads for a layer of {self.num_kv_heads}"
                )
            self._rows = format.rows(memory)
            self._cache, self._page_size = cache, page_size
        return self._rows

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: torch.Tensor,
        groups: Sequence[Group],
        options: Options,
        out: torch.Tensor,
    ) -> None:
        """``write`` and ``attend``, with what other layers found out about the step."""
        tensors = q, k, v, out
        alone = groups[0] if len(groups) == 1 and groups[0].in_a_row else None
        again = alone.again.get(id(options)) if alone is not None else None
        if again is not None and alone is not None and again.fits(tensors):
            stores = self._stores_at_hand(cache, alone)
            if stores is not None:
                again.run(tensors, stores)
                return
        self.write(k, v, cache, groups)
        self.attend(q, cache, groups, options, out, (k, v))
        if alone is not None:
            self._remember(alone, options, tensors)

    def _remember(self, group: Group, options: Options, tensors: tuple[torch.Tensor, ...]) -> None:
        """Let the next layer with these options repeat the step."""
        if not all(other.fits(tensors) for other in group.again.values()):
            group.again.clear()  # C was told anew how keys and values lie
        appends = [group.keep("blocks")]
        if group.recent is not None:
            appends.append(group.keep("rings"))
        found = Again.of(appends, group.keep(id(options)), tensors)
        if found is not None:
            group.again[id(options)] = found

    def _stores_at_hand(self, cache: torch.Tensor, group: Group) -> list[Sides] | None:
        """Blocks, and rings if there are some, as C has them; None if that is not known yet."""
        if cache is not self._cache:
            return None
        blocks = sides_at_hand(self._rows)
        if blocks is None or group.recent is None:
            return None if blocks is None else [blocks]
        rings = sides_at_hand(self._ring_rows(group.recent.rings))
        return None if rings is None else [blocks, rings]

    def write(
        self, k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, groups: Sequence[Group]
    ) -> None:
        """Put keys ``[tokens, Hkv, D]`` and values ``[tokens, Hkv, Dv]`` into their blocks.

        Args:
            cache: ``[blocks, Hkv, page_size, C]``, the layer's memory.
        """
        rows = self._read(cache)
        for group in groups:
            new_k, new_v = group.of(k), group.of(v)
            view = group.view(*rows, self._page_size, group.starts)
            self._kernels.append(new_k, new_v, view, kept=group.keep("blocks"))
            if group.recent is not None:
                view = group.recent.free(*self._ring_rows(group.recent.rings))
                new_k, new_v = new_k[:, :, -RECENT:], new_v[:, :, -RECENT:]
                self._kernels.append(new_k, new_v, view, kept=group.keep("rings"))

    def attend(
        self,
        q: torch.Tensor,
        cache: torch.Tensor,
        groups: Sequence[Group],
        options: Options,
        out: torch.Tensor,
        new: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Attention of ``[tokens, Hq, D]`` into ``out`` ``[tokens, Hq, Dv]``.

        Everything must be written before: sequences share blocks, and may read what another one
        of the same step computes.

        Args:
            new: the keys and values that this layer wrote, if it did.
        """
        for group in groups:
            own = isinstance(group.rows, slice)  # else a copy of the output's rows
            call = Call(
                group.of(q), None, self._views(group, cache, new), group.ends, options,
                self.num_kv_heads, self.v_head_dim, group.most, False, self._kernels.name,
                out=group.of(out) if own else None, kept=group.keep(id(options)),
            )  # fmt: skip
            found, _ = attend(call)
            if not own:
                out[group.rows] = found.transpose(1, 2).flatten(0, 1)

    def _views(
        self, group: Group, cache: torch.Tensor, new: tuple[torch.Tensor, torch.Tensor] | None
    ) -> list[KVView]:
        """Where the group's keys and values are read: exact ones where there are some."""
        rows, size, recent = self._read(cache), self._page_size, group.recent
        if recent is None or new is None:
            return [group.view(*rows, size, group.ends)]
        if group.whole and group.tokens > RECENT:  # a prompt
            k, v = (group.of(x) for x in new)
            return [KVView.of_tensors(k, v, group.ends)]
        blocks = group.view(*rows, size, recent.begins)
        return [blocks, recent.view(*self._ring_rows(recent.rings))]

    def _ring_rows(self, count: int) -> tuple[Rows, Rows]:
        """The pages of as many rings, which grow with the number of running sequences."""
        if self._rings is None or self._rings.shape[0] < PAGES * count:
            packed = self._kernels.packs(PAGE)
            page = PageFormat(format_of("bf16"), self.head_dim, self.v_head_dim, PAGE, packed)
            old, pages = self._rings, PAGES * 2 * count
            shape = pages, self.num_kv_heads, page.sides.end
            self._rings = torch.zeros(shape, dtype=torch.uint8, device=self._rows[0].data.device)
            if old is not None:
                self._rings[: len(old)] = old
            self._exact = page.rows(self._rings)
        return self._exact
