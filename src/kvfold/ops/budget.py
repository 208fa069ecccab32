"""How many tokens of a sequence a budget allows."""

from kvfold.numbers import BUDGET, Whole

COUNT = Whole(0, 1 << 30, "for instance 64")
_TOKENS = Whole(1, 1 << 30, "for instance 4096")


def check_budget(budget: object) -> None:
    """Refuse what is neither a share in (0, 1] nor a number of tokens."""
    if type(budget) is not int or budget == 1:
        BUDGET.check(budget, "budget")
    else:
        _TOKENS.check(budget, "budget")


def tokens_of(budget: float, length: int) -> int:
    """Tokens of a sequence of ``length``: a share of it, or, as a number above 1, so many.

    >>> tokens_of(0.25, 1000), tokens_of(4096, 1000), tokens_of(0.29, 100)
    (250, 1000, 29)
    """
    if budget > 1:
        return min(int(budget), length)
    return int(budget * length + 1e-6)  # 0.29 * 100 is a little less than 29
