"""Granite: blocks' outputs are scaled before they join the residual stream."""

from kvfold.arch.family import Family

FAMILIES = (Family(("granite",), residual_scale="residual_multiplier"),)
