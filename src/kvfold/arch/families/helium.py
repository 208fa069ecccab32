"""Helium."""

from kvfold.arch.family import Family, Rotary

FAMILIES = (Family(("helium",), "interleaved rotary", rotary=Rotary(interleaved=True)),)
