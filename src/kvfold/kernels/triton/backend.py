"""The Triton kernels as a backend: decoding on GPUs. Triton itself is imported when one runs."""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from kvfold.kernels.backend import Call, Found, Kernels
from kvfold.kernels.limits import MAX_TOKENS
from kvfold.kernels.view import Angles, KVView, Positions, readable


class Triton(Kernels):
    """Kernels that read each key and value once, from plain tensors and from pages of rows."""

    name = "triton"
    max_dim = 256  # larger heads do not fit the registers
    max_latent, max_rope = 512, 128  # of rows that are keys as a whole and values in part
    replays = True
    turns = True

    @property
    def knows(self) -> frozenset[str]:
        from kvfold.kernels.triton.options import KNOWN

        return KNOWN

    def here(self, device: torch.device) -> bool:
        return device.type == "cuda" and _has_triton()

    def why_not(self, call: Call) -> str | None:
        if call.home != self.name:
            return "these are not the kernels of q's device"
        if call.gradients or call.dropout:
            return "gradients are needed, which the kernels do not have"
        if call.q.dtype is torch.float64 or not self._fits(call):
            return "a dtype or head size without a kernel"
        if any(view.keys.packed for view in call.views):
            return "the pages are packed for other kernels"
        few = call.q.shape[2] <= MAX_TOKENS if call.views else call.few
        return None if few else "many queries: bound by arithmetic"

    def _fits(self, call: Call) -> bool:
        """Whether there are kernels for heads of these sizes."""
        head_dim, v_head_dim = call.q.shape[3], call.v_head_dim
        if max(head_dim, v_head_dim) <= self.max_dim:
            return True
        rope = head_dim - v_head_dim
        small = v_head_dim <= self.max_latent and rope <= self.max_rope
        return small and bool(call.views) and all(view.within for view in call.views)

    def why(self, call: Call) -> str:
        return "few queries on the GPU: each key and value is read once (Triton)"

    def attend(self, call: Call) -> Found:
        from kvfold.kernels.triton import launch, ops

        views, lengths = call.views, call.lengths
        if call.tensors is not None:
            keys, length = call.tensors[0], call.options.visibility.lengths
            whole = torch.full(
                (keys.shape[0],), keys.shape[2], dtype=torch.int32, device=keys.device
            )
            lengths = whole if length is None else length.to(torch.int32).contiguous()
            views = [KVView.of_tensors(*call.tensors, lengths)]
        view = views[0]
        alone = len(views) == 1 and view.begin is None and view.end is lengths
        if not alone or isinstance(lengths, list):
            views, lengths = _sent(views, lengths, call.q.device)
            return launch.attend(readable(call.q), views, lengths, call.options, call.splits)
        k, v = view.keys, view.values
        return ops.gpu_attend(
            call.q, k.data, k.scales, v.data, v.scales, view.table, lengths, k.fmt.name,
            v.fmt.name, call.v_head_dim, call.splits, *call.options.flat(),
        )  # fmt: skip

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        view: KVView,
        angles: Angles | None = None,
        kept: dict[str, Any] | None = None,
    ) -> None:
        from kvfold.kernels.triton import launch, ops

        if isinstance(view.end, torch.Tensor):
            cos, sin, interleaved = angles or (None, None, False)
            for x, rows, turns in ((k, view.keys, (cos, sin)), (v, view.values, (None, None))):
                ops.gpu_append(
                    x, rows.data, rows.scales, view.table, view.end, *turns, rows.fmt.name,
                    rows.rotation > 0, interleaved,
                )  # fmt: skip
            return
        (view,), first = _sent([view], view.end, k.device)
        for x, rows in ((k, view.keys), (v, view.values)):
            if not rows.dim:  # values that are stored with the keys
                continue
            rotated = rows.rotation > 0
            launch.append(x, rows, view.table, view.page_size, first, rotated=rotated)


def _sent(
    views: Sequence[KVView], lengths: Positions, device: torch.device
) -> tuple[list[KVView], torch.Tensor]:
    """Views and lengths whose tables and positions are on the device; nobody waits for it.

    All lists travel together, and a table that two views share goes once.
    """
    given = [lengths, *(x for view in views for x in (view.begin, view.end))]
    lists = {id(x): x for x in given if isinstance(x, list)}
    flat = torch.tensor([n for x in lists.values() for n in x], dtype=torch.int32, device="cpu")
    pieces = _there(flat, device).split([len(x) for x in lists.values()])
    ready = dict(zip(lists, pieces, strict=True))
    tables = {id(view.table): view.table for view in views}
    tables = {key: _there(table, device) for key, table in tables.items()}

    def positions(x: Positions) -> torch.Tensor:
        return ready[id(x)] if isinstance(x, list) else x

    found = [
        view._replace(
            table=tables[id(view.table)],
            begin=None if view.begin is None else positions(view.begin),
            end=positions(view.end),
        )
        for view in views
    ]
    return found, positions(lengths)


def _there(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor where the kernels run."""
    if device.type != "cuda" or x.is_cuda:
        return x
    return x.contiguous().pin_memory().to(device, non_blocking=True)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
