"""Devices, tried before they are relied on."""

from typing import TYPE_CHECKING

from kvfold.errors import InputError
from kvfold.names import shown

if TYPE_CHECKING:
    import torch


def pick_device(name: "str | torch.device | None") -> "torch.device":
    """The device of a name; without one a GPU if there is one, else the CPU.

    Raises:
        InputError: for a device that there is not, or that holds no numbers.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if not isinstance(name, str | torch.device) or len(str(name)) > 64:
            raise ValueError("it is no device's name")
        device = torch.device(name)
        if device.type == "meta":
            raise ValueError("it holds no numbers")
        torch.zeros(1, device=device).item()
    except Exception as error:  # every backend fails in its own way
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--device {shown(name if isinstance(name, str) else str(name))} cannot be used "
            f"({why[:100]})",
            "--device cpu always works",
        ) from error
    return device
