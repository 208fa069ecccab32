"""Text that a model writes itself, to calibrate on where none like what it will read is at hand.

Sampled at temperature 1, it is what the model takes text to be (for pruning as good as real text:
arXiv 2410.17170, 2410.17711). Half of the windows begin as texts do: with the token that the
tokenizer puts first, or else with any token. Half begin as a user's turn in its chats, so that it
writes both sides of them (arXiv 2406.08464). Of what comes out, the windows that it is surest of,
which repeat themselves, and those that surprise it most are left out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvfold.checkpoint.pretrained import load_model, load_tokenizer
from kvfold.checkpoint.records import OWN_TEXT
from kvfold.files import write_json
from kvfold.fold.passes import CPU
from kvfold.progress import Progress, no_progress
from kvfold.quality.text import opening_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_AT_ONCE = 32  # windows
_LEFT_OUT = 8  # one in so many at each end
_MARK = "kvfold-user-turn"


def own_windows(
    folder: Path,
    count: int,
    context: int,
    seed: int,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    progress: Progress = no_progress,
) -> torch.Tensor:
    """Windows ``[count, context]`` of token ids (int64), the same for the same seed and machine.

    Args:
        device, dtype: what the model computes on and in.

    Raises:
        InputError: for a model without a tokenizer.

    >>> own_windows(Path("source"), 97, 512, seed=0)  # doctest: +SKIP
    """
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype).to(device).eval()
    vocabulary = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(seed)
    wanted = count + 2 * (count // _LEFT_OUT)
    plain, chat = opening_tokens(tokenizer), chat_opening(tokenizer)
    starts = (plain, chat if 0 < len(chat) < context // 2 else plain)
    written: list[torch.Tensor] = []
    surprise: list[torch.Tensor] = []
    for done in range(0, wanted, _AT_ONCE):
        rows = min(_AT_ONCE, wanted - done)
        start = starts[len(written) % 2]
        begun = torch.tensor(start, dtype=torch.int64).expand(rows, -1)
        if not start:
            begun = torch.randint(vocabulary, (rows, 1), generator=generator)
        ids, nats = sample(model, begun, context, generator)
        written.append(ids)
        surprise.append(nats)
        progress("writing calibration text", done + rows, wanted)
    order = torch.cat(surprise).argsort()
    kept = order[(wanted - count) // 2 :][:count].sort().values
    return torch.cat(written)[kept]


def kept_windows(
    kept: Path,
    folder: Path,
    seed: int,
    where: tuple[torch.device, torch.dtype],
    progress: Progress,
    count: int,
    context: int,
) -> torch.Tensor:
    """:func:`own_windows`, kept in a file for a run that is taken up again."""
    if not kept.exists():
        write_json(kept, own_windows(folder, count, context, seed, *where, progress).tolist())
    return torch.tensor(OWN_TEXT.read(kept), dtype=torch.int64)


def chat_opening(tokenizer: Any) -> Sequence[int]:
    """The tokens before what a user says first; none where there are no chats."""
    if not getattr(tokenizer, "chat_template", None):
        return ()
    turn = [{"role": "user", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(turn, tokenize=False)
    except Exception:  # a template is a program: it may fail in any way
        return ()
    before, found, _ = text.partition(_MARK)
    ids: list[int] = tokenizer(before, add_special_tokens=False)["input_ids"] if found else []
    return ids


@torch.inference_mode()
def sample(
    model: "PreTrainedModel", begun: torch.Tensor, context: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Go on with ``begun`` ``[B, P]`` to ``[B, context]``; and nats per token of each, ``[B]``."""
    from transformers import DynamicCache

    call: Any = model
    cache = DynamicCache(config=model.config)
    written, nats = [begun], torch.zeros(len(begun))
    for _ in range(context - begun.shape[1]):
        last = written[-1].to(model.device)
        found = call(last, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logs = found.logits[:, -1].float().cpu().log_softmax(-1)  # drawn alike on every device
        token = torch.multinomial(logs.exp(), 1, generator=generator)
        nats -= logs.gather(1, token)[:, 0]
        written.append(token)
    return torch.cat(written, 1), nats / (context - begun.shape[1])
