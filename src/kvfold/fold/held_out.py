"""What a fitted model lost on text that no step has seen, found on the way.

Some windows run beside those of calibration through both models and are heard by nothing. Behind
the last layer both models' predictions are compared, a window at a time, so that neither model is
ever whole in memory.
"""

import torch

from kvfold.checkpoint.records import HeldOut
from kvfold.fold.hidden import HELD, Windows
from kvfold.fold.passes import Calibration, FoldedPass, Load, SourcePass
from kvfold.quality.scores import score_window, standard_error


@torch.no_grad()
def compare_ends(
    calibration: Calibration, source: SourcePass, folded: FoldedPass, loaders: tuple[Load, Load]
) -> HeldOut | None:
    """Both models' predictions, once all their layers have been run.

    Args:
        loaders: of the source, and of what the folded model is made from.

    Returns:
        None where nothing was held out.
    """
    if calibration.held_out is None or not len(calibration.held_out):
        return None
    ids, pairs = calibration.texts[HELD], []
    with source.ending(loaders[0]) as of_source, folded.ending(loaders[1]) as of_folded:
        for window, tokens in enumerate(ids):
            where = Windows(HELD, slice(window, window + 1))
            first = of_source(source.inputs[where])[0, :-1].float().log_softmax(-1)
            found = of_folded(folded.inputs[where])[0, :-1].float().log_softmax(-1)
            pairs.append([score_window(each, first, tokens[1:]) for each in (first, found)])
    everywhere = [pair for each in calibration.world.gather(pairs) for pair in each]
    reference, scored = zip(*everywhere, strict=True)
    nll = torch.stack([each["nll"] for each in reference])
    lost = torch.stack([each["nll"] for each in scored]) - nll
    kl = torch.stack([each["kl"] for each in scored]).mean(-1)
    return {
        "tokens": calibration.held_out[:, 1:].numel(),
        "source_nll": float(nll.mean()),
        "nats_lost": float(lost.mean()),
        "nats_lost_error": standard_error(lost),
        "kl": float(kl.mean()),
        "kl_error": standard_error(kl),
        "top1": float(torch.stack([each["top1"] for each in scored]).mean()),
    }
