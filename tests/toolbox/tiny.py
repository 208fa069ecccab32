"""Tiny random checkpoints of every family, and ways to hide their structure."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from kvfold.arch.families import FAMILIES
from kvfold.arch.family import Family
from kvfold.checkpoint.source import Checkpoint, TensorDict
from kvfold.fold.heads import LayerHeads, SharedHead
from kvfold.fold.norms import NormWeights
from kvfold.fold.pairs import Pairs
from kvfold.fold.stored_layer import StoredLayer

VOCABULARY = 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {"head_dim": 16}  # head_dim != hidden_size / num_heads
DENSE_FIRST = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOWED = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": 128,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 6,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# name of the case -> (model_type, config), all grouped-query, to be repeated into MHA.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", COMMON),
    "llama-wide-tied": ("llama", COMMON | WIDE | {"tie_word_embeddings": True}),
    "llama-biases": ("llama", COMMON | {"attention_bias": True}),
    "llama-odd": (
        "llama",
        COMMON | {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72},
    ),
    "mistral": ("mistral", COMMON | WIDE | {"sliding_window": 16}),
    "smollm3": ("smollm3", COMMON | {"no_rope_layers": [1, 0]}),
    "qwen2": ("qwen2", COMMON),
    "qwen3": ("qwen3", COMMON | WIDE),
    "gemma": ("gemma", COMMON | WIDE),
    "gemma2": (
        "gemma2",
        COMMON | WIDE | {"query_pre_attn_scalar": 16, "sliding_window": 16},
    ),
    "gemma3_text": (
        "gemma3_text",
        COMMON
        | WIDE
        | {
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "granite": (
        "granite",
        COMMON
        | {
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 2.0,
            "logits_scaling": 2.0,
        },
    ),
    "phi": ("phi", COMMON),
    "phi3": ("phi3", COMMON | {"resid_pdrop": 0.0}),
    "starcoder2": ("starcoder2", COMMON | {"residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "stablelm": ("stablelm", COMMON | {"use_qkv_bias": True, "head_dim": 8}),
    "cohere": ("cohere", COMMON | {"logit_scale": 1.0}),
    "olmo": ("olmo", COMMON),
    "seed_oss": ("seed_oss", COMMON | WIDE),
    "mixtral": ("mixtral", COMMON | {"num_local_experts": 4}),
    "qwen2_moe": ("qwen2_moe", COMMON | EXPERTS | {"shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("qwen3_moe", COMMON | WIDE | EXPERTS),
}
# Families that differ from those in nothing but what folding, its exactness and its files show.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("apertus", COMMON | WIDE),
    "arcee": ("arcee", COMMON),
    "cohere2": ("cohere2", COMMON | WIDE | WINDOWED),
    "dots1": ("dots1", COMMON | WIDE | DENSE_FIRST),
    "ernie4_5": ("ernie4_5", COMMON | WIDE),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        COMMON
        | WIDE
        | {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
            "tie_word_embeddings": False,
        },
    ),
    "exaone4": ("exaone4", COMMON | WIDE | WINDOWED | {"sliding_window_pattern": 2}),
    "glm": ("glm", COMMON | WIDE | {"attention_bias": False, "pad_token_id": 0}),
    "glm4": ("glm4", COMMON | WIDE | {"attention_bias": True, "pad_token_id": 0}),
    "glm4_moe": ("glm4_moe", COMMON | WIDE | DENSE_FIRST),
    "glm4_moe-norm": ("glm4_moe", COMMON | WIDE | DENSE_FIRST | {"use_qk_norm": True}),
    "falcon": (
        "falcon",
        COMMON | {"new_decoder_architecture": True, "bias": True},
    ),
    "flex_olmo": ("flex_olmo", COMMON | EXPERTS),
    "olmo2": ("olmo2", COMMON),
    "olmo3": ("olmo3", COMMON | WINDOWED),
    "olmoe": ("olmoe", COMMON | EXPERTS),
    "gpt_oss": (
        "gpt_oss",
        COMMON | WIDE | WINDOWED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "granitemoe": (
        "granitemoe",
        COMMON | {"num_local_experts": 4, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    ),
    "helium": ("helium", COMMON | {"head_dim": 8}),
    "ministral3": ("ministral3", COMMON | WIDE),
    "nemotron": ("nemotron", COMMON),
    "phimoe": ("phimoe", COMMON | {"num_local_experts": 4}),
}
EVERY = CASES | MORE


# Causal models that can be run and measured but not folded.
UNFOLDABLE: dict[str, dict[str, Any]] = {
    "gpt_neox": COMMON,
    "opt": COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 48, "dropout": 0.0},
    "gptj": GPT2 | {"rotary_dim": 4},
    "falcon": COMMON | {"num_kv_heads": 1, "multi_query": True, "alibi": False},
    "deepseek_v3": COMMON | {
        "num_key_value_heads": 6, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 8, "n_group": 2,
        "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2},
}  # fmt: skip
#: A model with latents, of one layer.
DEEPSEEK: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 16, "q_lora_rank": None,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip


def make(case: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of a case, in float32."""
    model_type, config = EVERY[case]
    return build(model_type, config | changes, seed)


def build(model_type: str, config: dict[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if config.get("new_decoder_architecture"):  # Falcon's own word
        config = config | {"num_kv_heads": config["num_key_value_heads"]}
    made = AutoConfig.for_model(model_type, **config)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts biases at zero, which proves nothing
            torch.nn.init.normal_(parameter, std=0.2)
        if name.endswith("sinks"):  # and these near it
            torch.nn.init.normal_(parameter)
        if "olmo" in model_type and name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # and these at one
    return model.eval()


def checkpoint_of(model: Any) -> Checkpoint:
    return Checkpoint("tiny", model.config.to_dict(), TensorDict(model.state_dict()))


def kv_heads(model: Any) -> int:
    return checkpoint_of(model).geometry.num_kv_heads


def tokens(count: int = 4, length: int = 24, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits
    return result


def with_kv_heads(model: Any, heads: list[LayerHeads]) -> Any:
    """The same architecture with other KV heads, given layer by layer."""
    checkpoint = checkpoint_of(model)
    family: Family = checkpoint.family
    count = heads[0].num_kv_heads
    config = dict(checkpoint.config)
    if count != checkpoint.geometry.num_kv_heads:
        config = family.folded_config(config, count)
    state = dict(model.state_dict())
    for layer, parts in enumerate(heads):
        groups = [
            SharedHead(parts.q[h : h + 1], parts.k[h], parts.v[h], parts.o[h : h + 1])
            for h in range(count)
        ]
        own = [[head] for head in range(count)]
        every = torch.ones(parts.q.shape[-1], dtype=torch.float64)
        written = family.projections.write(
            checkpoint.attention_prefix(layer), parts.weights(groups, own, every)
        )
        state |= {name: tensor.float().contiguous() for name, tensor in written.items()}
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    other.load_state_dict(state)
    return other.eval()


def all_heads(model: Any) -> list[LayerHeads]:
    checkpoint = checkpoint_of(model)
    return [StoredLayer(checkpoint, i).heads() for i in range(checkpoint.geometry.num_layers)]


def repeated(heads: LayerHeads) -> LayerHeads:
    """Give every query head a KV head of its own: the same function as MHA."""
    group_size = heads.q.shape[1]
    return LayerHeads(
        q=heads.q.flatten(0, 1)[:, None],
        k=heads.k.repeat_interleave(group_size, 0),
        v=heads.v.repeat_interleave(group_size, 0),
        o=heads.o.flatten(0, 1)[:, None],
        o_bias=heads.o_bias,
        has_bias=heads.has_bias,
        pairs=heads.pairs,
        norm=heads.norm,
        rows=heads.rows,
    )


def scrambled(heads: LayerHeads, seed: int) -> LayerHeads:
    """Permute the KV heads and give each random gauges: the same function, hidden structure."""
    generator = torch.Generator().manual_seed(seed)
    order = permuted(heads.num_kv_heads, generator)
    q, k, v, o = heads.q[order], heads.k[order], heads.v[order], heads.o[order]
    value_gauges = torch.stack([random_gauge(v.shape[1], generator) for _ in v])
    v = value_gauges @ v
    o = o @ torch.linalg.inv(value_gauges)[:, None]
    q_pairs, q_rest = heads.pairs.split(q)
    k_pairs, k_rest = heads.pairs.split(k)
    shape = k_pairs.shape[:2]
    phase = torch.rand(shape, generator=generator, dtype=torch.float64) * 6.28
    size = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    if heads.rows:  # only signs: weights differ in the two dimensions of every pair
        size, phase = torch.ones_like(size), 3.14159265358979 * (phase > 3).double()
    if heads.norm:  # only phases, and only where the norm lets them pass
        size = torch.ones_like(size)
        phase = torch.where(
            _free_phases(heads.norm, heads.pairs), phase, 3.14159265358979 * (phase > 3)
        )
    turn = torch.polar(size, phase)[..., None]
    k_pairs, q_pairs = turn * k_pairs, q_pairs / turn.conj()[:, None]
    if k_rest.shape[1]:
        gauges = torch.stack([random_gauge(k_rest.shape[1], generator) for _ in k])
        if heads.norm:  # only signs
            gauges = torch.diag_embed(gauges.diagonal(dim1=1, dim2=2).sign())
        k_rest = gauges @ k_rest
        q_rest = torch.linalg.inv(gauges).mT[:, None] @ q_rest
    q, k = heads.pairs.join(q_pairs, q_rest), heads.pairs.join(k_pairs, k_rest)
    rest = heads.o_bias, heads.has_bias, heads.pairs, heads.norm, heads.rows
    return LayerHeads(q, k, v, o, *rest)


def _free_phases(norm: NormWeights, pairs: Pairs) -> torch.Tensor:
    """``[r/2]``, true where a phase commutes with both norms: equal weights on the pair."""
    both = [pairs.split(weight[:, None])[0][:, 0] for weight in (norm.q, norm.k)]
    return (both[0].real == both[0].imag) & (both[1].real == both[1].imag)


def permuted(count: int, generator: torch.Generator) -> torch.Tensor:
    """The order of KV heads that have been scrambled with a generator of the same seed."""
    return torch.randperm(count, generator=generator)


def random_gauge(size: int, generator: torch.Generator) -> torch.Tensor:
    """A random matrix of condition number at most 3, so that float32 keeps its digits."""
    noise = torch.randn(2, size, size, generator=generator, dtype=torch.float64)
    left, right = torch.linalg.qr(noise).Q
    stretch = 0.5 + torch.rand(size, generator=generator, dtype=torch.float64)
    gauge: torch.Tensor = left @ (stretch[:, None] * right)
    return gauge


def hidden_mha(model: Any, seed: int = 7) -> Any:
    """A GQA model as an MHA model that computes the same, its structure hidden."""
    heads = [scrambled(repeated(h), seed + i) for i, h in enumerate(all_heads(model))]
    hidden = with_kv_heads(model, heads)
    sinks = checkpoint_of(model).family.sinks
    for index, layer in enumerate(hidden.model.layers if sinks else ()):
        own = layer.self_attn.get_parameter(sinks).data
        own.copy_(own[permuted(len(own), torch.Generator().manual_seed(seed + index))])
    return hidden


def gpt2_of(bigcode: Any, seed: int = 7) -> Any:
    """A GPT-2 (MHA) that computes the same as a GPTBigCode (MQA), its structure hidden."""
    gpt2 = build("gpt2", GPT2)
    state = dict(bigcode.state_dict())
    family = checkpoint_of(gpt2).family
    assert family.rewrite is not None
    own = {name: family.rewrite(name, tensor) for name, tensor in state.items()}
    for layer, heads in enumerate(all_heads(bigcode)):
        parts = scrambled(repeated(heads), seed + layer)
        groups = [
            SharedHead(parts.q[h : h + 1], parts.k[h], parts.v[h], parts.o[h : h + 1])
            for h in range(parts.num_kv_heads)
        ]
        weights = parts.weights(groups, [[h] for h in range(parts.num_kv_heads)], torch.ones(1))
        own |= family.projections.write(f"transformer.h.{layer}.attn", weights)
    gpt2.load_state_dict({name: tensor.float().contiguous() for name, tensor in own.items()})
    return gpt2.eval()


def make_bigcode(seed: int = 0) -> Any:
    config = GPT2 | {"multi_query": True, "activation_function": "gelu_new"}
    return build("gpt_bigcode", config, seed)


def save_with_tokenizer(model: Any, folder: Path, **options: Any) -> Path:
    """Save a model and a tokenizer whose tokens are words w3 … w95."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = "{{ messages }}"
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return folder


def words(count: int, seed: int = 3) -> str:
    """Random text of ``count`` tokens of the tokenizer above."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count,), generator=generator)
    return " ".join(f"w{i}" for i in ids.tolist())


def every_model_type() -> set[str]:
    return {name for family in FAMILIES for name in family.model_types}


# So high a base that the lower half of the frequencies does not turn within a test's tokens.
STILL_HALF: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e16}}


def hidden_mla(case: str, rank: int, seed: int = 11, **changes: Any) -> Any:
    """An MHA model whose keys and values are read out of one latent of ``rank`` numbers.

    The faster half of the rotary frequencies is one key, turned and scaled for each head; the
    slower half stands still, so that latent attention can be written out with plain heads. Every
    head's coordinates are scrambled.
    """
    heads = EVERY[case][1]["num_attention_heads"]
    model = make(case, seed, num_key_value_heads=heads, **deepcopy(STILL_HALF), **changes)
    generator = torch.Generator().manual_seed(seed)
    return with_kv_heads(
        model,
        [scrambled(_from_latent(layer, rank, generator), seed) for layer in all_heads(model)],
    )


def _from_latent(heads: LayerHeads, rank: int, generator: torch.Generator) -> LayerHeads:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    down = random(rank, heads.k.shape[-1]) * 3
    down[:, -1] *= heads.has_bias
    pairs, rest = heads.pairs.split(heads.k)
    kept = pairs.shape[1] // 2
    slow = random(len(pairs), 2 * (pairs.shape[1] - kept), rank) @ down
    if rest.shape[1]:  # dimensions without rotary
        rest = random(*rest.shape[:2], rank) @ down
    real, imaginary = slow.tensor_split(2, dim=1)
    shared = pairs[:1, :kept].expand(len(pairs), -1, -1)
    k = heads.pairs.join(torch.cat([shared, torch.complex(real, imaginary)], 1), rest)
    v = random(len(pairs), heads.v.shape[1], rank) @ down
    return replace(heads, k=k, v=v)
