"""Apertus."""

from kvfold.arch.family import Family, QKNorm

FAMILIES = (Family(("apertus",), "QK-norm, no gates", mlp_matrices=2, qk_norm=QKNorm()),)
