"""LitGPT: ``litgpt convert_to_litgpt``, once it is told what the config says.

It knows checkpoints by name, with sizes and all. A folded one has the name of none, so one of the
same architecture is taken and given the folder's own sizes; ``n_query_groups`` is its word for KV
heads.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verify_task import Answer, Stage, Task, installed

# model_type -> a checkpoint of that architecture that LitGPT knows.
_RELATIVES = {
    "llama": "SmolLM2-135M",
    "mistral": "Mistral-7B-v0.3",
    "qwen2": "Qwen2.5-0.5B",
    "qwen3": "Qwen3-0.6B",
    "gemma": "Gemma-7b",  # what is named Gemma-2… is read as Gemma 2
    "gemma2": "Gemma-2-2b",
    "gemma3_text": "Gemma-3-1b-it",
    "phi": "phi-1_5",
    "phi3": "Phi-3-mini-4k-instruct",
    "olmo": "OLMo-1B-hf",
    "stablelm": "stablelm-zephyr-3b",
}


def version(task: Task) -> str:
    """LitGPT's version."""
    return installed("litgpt", "litgpt")


def load(task: Task, stage: Stage) -> tuple[Callable[[], Answer], str]:
    """The converted model with a cache, in the task's dtype."""
    import torch
    from litgpt.config import Config, name_to_config
    from litgpt.model import GPT
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    if task.model_type not in _RELATIVES:
        raise ValueError(f"architecture unknown to it: {task.model_type}")
    stage("converting")
    relative = name_to_config[_RELATIVES[task.model_type]]
    name = f"{relative['name']}-verified"  # how it names weights depends on how names begin
    stored = json.loads((Path(task.folder) / "config.json").read_text(encoding="utf-8"))
    name_to_config[name] = relative | _sizes(stored, relative) | {"name": name}
    folder = Path(task.work) / name
    folder.mkdir()
    for path in Path(task.folder).glob("*.safetensors*"):
        (folder / path.name).symlink_to(path.resolve())
    convert_hf_checkpoint(folder, model_name=name, dtype=task.dtype)

    stage("loading")
    dtype = getattr(torch, task.dtype)
    with torch.device("meta"):
        model = GPT(Config.from_checkpoint(folder))
    weights = torch.load(folder / "lit_model.pth", mmap=True, weights_only=True)
    model.load_state_dict(weights, assign=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.max_seq_length = task.length
    model.cos, model.sin = model.rope_cache(device=torch.device(device))
    model = model.to(device=device, dtype=dtype).eval()

    def generate() -> Answer:
        return [_greedy(model, prompt, task.tokens, device) for prompt in task.prompts]

    return generate, "litgpt convert_to_litgpt"


def _greedy(model: Any, prompt: tuple[int, ...], tokens: int, device: str) -> list[int]:
    import torch
    from litgpt.generate.base import generate

    dtype = next(model.parameters()).dtype
    model.set_kv_cache(batch_size=1, device=torch.device(device), dtype=dtype)
    ids = torch.tensor(prompt, device=device)
    with torch.inference_mode():
        found = generate(model, ids, len(prompt) + tokens, top_k=1, include_prompt=False)
    return [int(token) for token in found]


def _sizes(stored: dict[str, Any], relative: dict[str, Any]) -> dict[str, Any]:
    """The config in LitGPT's words, as far as it says another thing than the relative's."""
    heads, layers = stored["num_attention_heads"], stored["num_hidden_layers"]
    rope = stored.get("rope_parameters") or {}
    kinds = stored.get("layer_types") or []
    local = rope.get("sliding_attention") or {}
    rope = rope.get("full_attention") or rope
    vocabulary = stored["vocab_size"]
    found: dict[str, Any] = {
        "block_size": stored["max_position_embeddings"],
        "vocab_size": vocabulary,
        "padded_vocab_size": vocabulary,
        "n_layer": layers,
        "n_head": heads,
        "n_embd": stored["hidden_size"],
        "n_query_groups": stored["num_key_value_heads"],
        "head_size": stored.get("head_dim") or stored["hidden_size"] // heads,
        "intermediate_size": stored["intermediate_size"],
        "rope_base": rope.get("rope_theta", stored.get("rope_theta", 10000)),
        "rope_adjustments": _scaling(rope),
        "norm_eps": stored.get("rms_norm_eps") or stored.get("layer_norm_eps") or 1e-5,
        "sliding_window_size": _window(stored, kinds),
    }
    share = rope.get("partial_rotary_factor", stored.get("partial_rotary_factor"))
    if share is not None:
        found["rotary_percentage"] = share
    if stored.get("attention_bias") is not None and "attn_bias" in relative:
        found["attn_bias"] = relative["attn_bias"]
    if found["sliding_window_size"] is not None and kinds:
        found["sliding_window_indices"] = [int(kind == "sliding_attention") for kind in kinds]
    else:
        found["sliding_window_indices"] = None
    if stored.get("query_pre_attn_scalar") is not None:
        found["attention_scores_scalar"] = stored["query_pre_attn_scalar"]
    for ours, theirs in (("attn_logit_softcapping", "attention_logit_softcapping"),
                         ("final_logit_softcapping", "final_logit_softcapping")):  # fmt: skip
        if ours in stored:
            found[theirs] = stored[ours]
    if "rope_local_base_freq" in relative:
        found["rope_local_base_freq"] = local.get("rope_theta", relative["rope_local_base_freq"])
        found["rope_indices"] = [int(kind == "sliding_attention") for kind in kinds]
    return found


def _window(stored: dict[str, Any], kinds: list[str]) -> int | None:
    """The sliding window, where any layer has one."""
    used = stored.get("use_sliding_window", True) and (not kinds or "sliding_attention" in kinds)
    return stored.get("sliding_window") if used else None


def _scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    """Llama 3's scaling; LitGPT knows no other by a config."""
    if rope.get("rope_type", "default") == "default":
        return None
    if rope["rope_type"] != "llama3":
        raise ValueError(f"rope scaling unknown to it: {rope['rope_type']}")
    return {
        "factor": rope["factor"],
        "low_freq_factor": rope["low_freq_factor"],
        "high_freq_factor": rope["high_freq_factor"],
        "original_max_seq_len": rope["original_max_position_embeddings"],
    }
