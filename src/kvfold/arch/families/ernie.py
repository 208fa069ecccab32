"""ERNIE 4.5."""

from kvfold.arch.family import Family, Rotary

FAMILIES = (Family(("ernie4_5",), "interleaved rotary", rotary=Rotary(interleaved=True)),)
