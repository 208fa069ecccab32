"""Architectures whose configs cannot say how many KV heads there are; their MLPs have no gate."""

from kvfold.arch.family import Family
from kvfold.arch.sizes import ConfigKeys


def _without_kv_heads(model_type: str, reason: str, learned: str = "n_positions") -> Family:
    keys = ConfigKeys(num_kv_heads=None)
    return Family(
        (model_type,), keys=keys, mlp_matrices=2, learned_positions=(learned,), unfoldable=reason
    )


_LEARNED = "max_position_embeddings"
_NO_FIELD = "it has no KV-head field"
FAMILIES = (
    _without_kv_heads("gpt_neox", f"{_NO_FIELD}: q, k and v of each head are one fused block"),
    _without_kv_heads("gptj", _NO_FIELD),
    _without_kv_heads("gpt_neo", _NO_FIELD, _LEARNED),
    _without_kv_heads("opt", _NO_FIELD, _LEARNED),
    _without_kv_heads("bloom", f"{_NO_FIELD}, and ALiBi ties each head to its own slope"),
    _without_kv_heads("mpt", "stock MPT has no KV-head field"),
)
