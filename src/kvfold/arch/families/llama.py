"""Llama and the many that share its layout."""

from kvfold.arch.family import Family

FAMILIES = (
    Family(("llama", "mistral"), "also SmolLM, Yi, Vicuna, TinyLlama … (same layout)"),
    Family(("smollm3",), "layers without rotary get full K gauges"),
)
