"""Llama and the many that share its layout."""

from kvfold.arch.family import Family

FAMILIES = (
    Family(("llama", "mistral"), "also SmolLM, Yi, Vicuna, TinyLlama … (same layout)"),
    Family(
        ("ministral3",),
        "as Mistral",
        no_latent="its queries are scaled by their position, for which the target has no place",
    ),
    Family(("smollm3",), "layers without rotary get full K gauges"),
)
