"""Two matrix products per KV head: what takes everything, and decoding without kernels."""

from typing import Any

import torch

from kvfold.kernels import pages
from kvfold.kernels.backend import Backend, Call, Found, Kernels
from kvfold.kernels.torch.plain import plain, seen_rows
from kvfold.kernels.view import Angles, KVView
from kvfold.ops.mask import seen_and_bias
from kvfold.ops.reference import attend


class Products(Kernels):
    """Everything; and stores where there are no kernels."""

    name, path = "torch", "matmul"
    max_dim = 1 << 30

    def here(self, device: torch.device) -> bool:
        return True

    def why_not(self, call: Call) -> str | None:
        return None

    def attend(self, call: Call) -> Found:
        return products(call)

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        view: KVView,
        angles: Angles | None = None,
        kept: dict[str, Any] | None = None,
    ) -> None:
        pages.write(k, v, view)


class FewProducts(Backend):
    """Few queries on a CPU without kernels for them, which PyTorch's fused ones are slow at."""

    name, path = "few", "matmul"

    def why_not(self, call: Call) -> str | None:
        if call.few and call.q.device.type == "cpu" and not (call.gradients or call.dropout):
            return None
        return "not few queries on a CPU"

    def attend(self, call: Call) -> Found:
        return products(call)


def products(call: Call) -> Found:
    """Attention in whatever precision its inputs have."""
    given = plain(call)
    seen, bias = seen_and_bias(given.q, given.k.shape[2], given.options)
    k, v = seen_rows(given, seen)
    scoring, dropout = given.options.scoring, given.dropout
    found = attend(given.q, k, v, scoring=scoring, seen=seen, bias=bias, dropout=dropout)
    return found.out, found.lse
