"""Fold a transformers model that is already in memory, and see that it is the same function.

A model with 2 KV heads is disguised as one with 8 (every head repeated, then turned by random
gauges that change nothing); folding finds the 2 heads again. Averaging does not.

python examples/fold_in_memory.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvfold


def disguised(model: LlamaForCausalLM, kv_heads: int) -> LlamaForCausalLM:
    """The same function with more KV heads, each value head in coordinates of its own."""
    config = LlamaConfig(**{**model.config.to_dict(), "num_key_value_heads": kv_heads})
    other = LlamaForCausalLM(config).eval()
    state = model.state_dict()
    size, repeats = config.head_dim, kv_heads // model.config.num_key_value_heads
    group = config.num_attention_heads // kv_heads
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        k, v = (state[f"{prefix}{n}_proj.weight"].unflatten(0, (-1, size)) for n in "kv")
        k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
        turns = torch.linalg.qr(torch.randn(kv_heads, size, size)).Q
        o = state[f"{prefix}o_proj.weight"].unflatten(1, (-1, size))
        o = torch.einsum("chd,hed->che", o, turns.repeat_interleave(group, 0))
        state[f"{prefix}k_proj.weight"] = k.flatten(0, 1)
        state[f"{prefix}v_proj.weight"] = (turns @ v).flatten(0, 1)
        state[f"{prefix}o_proj.weight"] = o.flatten(1)
    other.load_state_dict(state)
    return other


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=2, head_dim=16, initializer_range=0.1,
)  # fmt: skip
truth = LlamaForCausalLM(config).eval()
source = disguised(truth, 8)
ids = torch.randint(256, (4, 64))
with torch.no_grad():
    wanted = source(ids).logits
    print(f"disguise changes the logits by {(wanted - truth(ids).logits).abs().max():.1e}")
    for method in ("mean", "pca"):
        folded = kvfold.fold_model(source, 2, method, fit="none").model
        error = (folded(ids).logits - wanted).norm() / wanted.norm()
        print(f"8 → 2 KV heads with {method:5}: logits off by {error:.1e}")
