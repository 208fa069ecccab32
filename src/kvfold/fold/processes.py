"""What several processes that convert together must have in common."""

from kvfold.errors import InputError
from kvfold.fold.hidden import BATCH_TOKENS
from kvfold.fold.request import ConvertRequest
from kvfold.fold.windows import Cut
from kvfold.names import shown
from kvfold.quality.world import World


def check_alike(request: ConvertRequest, world: World) -> None:
    """Refuse processes that were asked for different things.

    Raises:
        InputError: naming what differs.
    """
    asked = world.gather(request.as_dict())
    for name, value in asked[0].items():
        for rank, other in enumerate(asked):
            if other[name] != value:
                raise InputError(
                    f"{name} is {shown(str(value))} in process 0 and {shown(str(other[name]))} in "
                    f"process {rank}",
                    "give every process the same command",
                )


def check_enough(cut: Cut | None, world: World) -> None:
    """Refuse more processes than there are batches of calibration text.

    Raises:
        InputError: saying how many there may be.
    """
    if cut is None or world.size == 1:
        return
    windows, tokens = cut.calibration.shape
    most = -(-windows // max(1, BATCH_TOKENS // tokens))
    if world.size > most:
        raise InputError(
            f"{world.size} processes for {windows * tokens:,} tokens of calibration text; expected "
            f"at most {most}, which have {BATCH_TOKENS:,} each",
            "start fewer, or give more --calibration-tokens",
        )
