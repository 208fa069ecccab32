"""Moving stored tokens by PyTorch, where no kernel does it: pages of rows, nothing decoded."""

import torch

from kvfold.kernels.view import KVView


def move_by_pytorch(view: KVView, sources: list[torch.Tensor]) -> None:
    """See ``Kernels.move``."""
    assert view.begin is not None
    for b, source in enumerate(sources):
        low = int(view.begin[b])
        target = torch.arange(low, low + len(source), dtype=torch.long, device="cpu")
        source = source.to("cpu", torch.long)
        for rows in (view.keys, view.values):
            for x in (rows.data, rows.scales):
                if x is not None and x.shape[-1]:
                    new = x[_places(view, b, source, x.device)]
                    x[_places(view, b, target, x.device)] = new


def _places(
    view: KVView, b: int, positions: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, int, torch.Tensor]:
    """Page, head and slot of positions."""
    pages = view.table[b].to("cpu", torch.long)[positions // view.page_size]
    return pages.to(device), 0, (positions % view.page_size).to(device)
