"""What becomes of a source's other tensors in a model with latent attention. No torch.

Its architectures have no factors of their own and one matrix for each projection: factors go into
the weights, fused matrices are cut.
"""

from kvfold.arch.carried import Carried, rewritten
from kvfold.arch.family import Family
from kvfold.arch.latent import Layout
from kvfold.arch.sizes import Config

_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"


def is_untied(family: Family, config: Config, layout: Layout) -> bool:
    """Whether the folded model has an output embedding of its own."""
    scaled = family.multipliers is not None
    return layout.untied or scaled or not config.get("tie_word_embeddings")


def carried_to_latent(
    family: Family, config: Config, layout: Layout, name: str, shape: tuple[int, ...]
) -> tuple[Carried, ...]:
    """See :meth:`kvfold.arch.target.Target.carried`."""
    parting = bool(config.get("tie_word_embeddings")) and is_untied(family, config, layout)
    if name == _HEAD:
        return () if parting else (_times(name, shape, 1 / _logits(family, config)),)
    if name.endswith(_EMBEDDING):
        factors = family.multipliers
        made = _times(name, shape, _factor(config, factors.embeddings) if factors else 1.0)
        if parting:
            return made, _times(_HEAD, shape, 1 / _logits(family, config))
        return (made,)
    for fused, parts in family.split:
        if name.endswith(fused):
            return _cut(name.removesuffix(fused), parts, shape)
    if family.mlp_output and name.endswith(f"{family.mlp_output}.weight"):
        return (_times(name, shape, family.residual_factor(config)),)
    return rewritten(family, name, shape)


def _logits(family: Family, config: Config) -> float:
    return _factor(config, family.multipliers.logits) if family.multipliers else 1.0


def _factor(config: Config, key: str) -> float:
    return float(config.get(key, 1.0))


def _times(name: str, shape: tuple[int, ...], factor: float) -> Carried:
    if factor == 1:
        return Carried(name, shape)
    return Carried(name, shape, lambda tensor: tensor * factor)


def _cut(prefix: str, parts: tuple[str, ...], shape: tuple[int, ...]) -> tuple[Carried, ...]:
    """Rows of equal number for each part."""
    rows = shape[0] // len(parts)

    def part(number: int, name: str) -> Carried:
        rest = (rows, *shape[1:])
        return Carried(prefix + name, rest, lambda t: t[number * rows : (number + 1) * rows])

    return tuple(part(number, name) for number, name in enumerate(parts))
