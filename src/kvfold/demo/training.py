"""The demo's source, trained here: a small MHA model. No torch at import."""

import math
from typing import TYPE_CHECKING

from kvfold.demo.text import END, Splits, split_topics, train_tokenizer
from kvfold.progress import Progress, no_progress
from kvfold.quality.text import Tokenizer, python_topics

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CONTEXT = 128
STEPS = 900
BATCH = 8
_WARM_UP = 50
_PEAK_RATE = 3e-3


def train_demo_model(
    seed: int = 0, progress: Progress = no_progress, steps: int = STEPS, *, qk_norm: bool = False
) -> "tuple[PreTrainedModel, Tokenizer, Splits]":
    """Train the demo's source: 8 heads, 8 KV heads; the same seed gives the same weights.

    Args:
        qk_norm: of Qwen 3's architecture, which normalises queries and keys, instead of Llama's.
    """
    import torch

    splits = split_topics(python_topics())
    tokenizer = train_tokenizer(splits.training.values())
    text = END.join(splits.training.values())
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new_model(tokenizer, qk_norm)
    _train(model, ids, torch.Generator().manual_seed(seed), steps, progress)
    return model.eval(), tokenizer, splits


def _new_model(tokenizer: Tokenizer, qk_norm: bool) -> "PreTrainedModel":
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3" if qk_norm else "llama",
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=16,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def _train(
    model: "PreTrainedModel",
    ids: "torch.Tensor",
    generator: "torch.Generator",
    steps: int,
    progress: Progress,
) -> None:
    """AdamW on random windows; the learning rate warms up, then falls along a cosine."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    offsets = torch.arange(CONTEXT)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _PEAK_RATE * rate(step, steps)
        starts = torch.randint(len(ids) - CONTEXT, (BATCH, 1), generator=generator)
        batch = ids[starts + offsets]
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress("training", step + 1, steps)


def rate(step: int, steps: int) -> float:
    """Learning rate as a fraction of its peak."""
    warm_up = min(_WARM_UP, steps)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))
