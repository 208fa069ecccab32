"""What ``torchrun`` says of a process in its environment. No torch."""

import os


def launched_rank() -> int:
    """The rank that ``torchrun`` gave this process; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def launched_size() -> int:
    """How many processes ``torchrun`` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))
