"""Mixtral."""

from kvfold.arch.family import Family

FAMILIES = (Family(("mixtral",), unfoldable="mixture-of-experts layers are not supported"),)
