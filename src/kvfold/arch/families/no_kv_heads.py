"""Architectures whose configs cannot say how many KV heads there are."""

from kvfold.arch.family import Family

FAMILIES = (
    Family(
        ("gpt_neox",),
        unfoldable="it has no KV-head field: q, k and v of each head are one fused block",
    ),
    Family(("gptj",), unfoldable="it has no KV-head field"),
    Family(("gpt_neo",), unfoldable="it has no KV-head field"),
    Family(("opt",), unfoldable="it has no KV-head field"),
    Family(
        ("bloom",),
        unfoldable="it has no KV-head field, and ALiBi ties each head to its own slope",
    ),
    Family(("mpt",), unfoldable="stock MPT has no KV-head field"),
    Family(
        ("falcon",),
        unfoldable="its fused qkv layout differs by version and has no general KV-head field",
    ),
)
