"""What a model may be folded to within so much of its cache. No torch."""

from collections.abc import Mapping
from typing import Any

from kvfold.arch.family import Family
from kvfold.arch.latent_config import check_latent
from kvfold.arch.target import Grouped, Latent, Target
from kvfold.errors import InputError
from kvfold.geometry import divisors

# Of the source's rotary frequencies, the highest, that latents keep. Those left out may hardly turn
# over a context: which do depends on the model's base, so several are compared; and every second
# one of all, which leaves out none that turns alone.
EIGHTHS = (2, 4, 5, 6, 7, 8)
SECOND = 2


def heads_and_latents(
    family: Family, config: Mapping[str, Any], share: float, layout: str
) -> tuple[Target, ...]:
    """The largest of each kind that fit into a share of the source's cache.

    Raises:
        InputError: if there is none.
    """
    g = family.geometry(config)
    each = g.head_dim + g.v_head_dim
    room = int(share * g.num_kv_heads * each)
    fitting = [heads for heads in divisors(g.num_kv_heads)[:-1] if heads * each <= room]
    found: list[Target] = [Grouped(max(fitting))] if fitting else []
    try:
        found += latents_of(family, config, room, layout)
    except InputError as error:
        if not found:
            raise InputError(
                f"--kv-bytes {share:.0%}: neither heads nor a latent fit into {room} numbers a "
                f"token and layer; the source has {g.num_kv_heads * each}",
                "ask for more",
            ) from error
    return tuple(found)


def latents_of(
    family: Family, config: Mapping[str, Any], numbers: int, layout: str
) -> tuple[Latent, ...]:
    """Latents of so many numbers, rotary key included, that keep other frequencies.

    Raises:
        InputError: if there is none.
    """
    check_latent(family, config)
    geometry = family.geometry(config)
    rotary_dim = family.rotary_dim(config, geometry)
    sizes = dict.fromkeys(max(2, rotary_dim * eighths // 16 * 2) for eighths in EIGHTHS)
    most = geometry.num_kv_heads * (geometry.head_dim + geometry.v_head_dim)
    least = 2 * min(sizes)  # as much for all else, or nothing would be left for the values
    if not least <= numbers <= most:
        raise InputError(
            f"--latent {numbers}: expected {least} to {most} numbers a token and layer; the source "
            f"has {most}",
            f"for instance {max(least, most // 2)}",
        )
    kinds = [(r, 1) for r in sizes]
    if rotary_dim % (2 * SECOND) == 0 and rotary_dim:
        kinds.append((rotary_dim // SECOND, SECOND))
    found, refused = [], None
    for r, stride in kinds:
        if 2 * r > numbers:
            continue
        latent = Latent(numbers - r, r, stride, layout=layout)
        try:
            latent.geometry(geometry, family, config)
            latent.config(family, config)
        except InputError as error:  # scaled frequencies, for one, cannot be said in any layout
            refused = error
        else:
            found.append(latent)
    if refused is not None and not found:
        raise refused
    return tuple(found)
