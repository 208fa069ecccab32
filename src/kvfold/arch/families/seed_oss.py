"""ByteDance's Seed-OSS: Llama's layout with biases of q, k and v."""

from kvfold.arch.family import Family

FAMILIES = (Family(("seed_oss",), "Q, K and V biases"),)
