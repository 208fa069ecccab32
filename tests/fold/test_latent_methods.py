"""Methods that make a latent of a layer, on heads for which the best is known."""

from dataclasses import replace

import pytest
import torch

import kvfold.fold.rotated
from kvfold.arch.target import Latent
from kvfold.fold.heads import HeadGroup
from kvfold.fold.latent_energy import latent_energy
from kvfold.fold.latents import LatentSizes, SharedLatent
from kvfold.fold.methods import all_methods, latent
from kvfold.fold.pairs import Pairs
from kvfold.fold.statistics import AttendedKeys
from kvfold.fold.subspace import centred

METHODS = [name for name, method in all_methods().items() if Latent in method.targets]
SIZE, DIM, KV_HEADS, TIMES = 24, 8, 2, 2


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def moment(seed: int) -> torch.Tensor:
    """Of inputs whose last number is always 1."""
    x = torch.cat([random(200, SIZE, seed=seed), torch.ones(200, 1, dtype=torch.float64)], -1)
    return x.T @ x / len(x)


def group(rotary: int, keys: torch.Tensor | None = None) -> HeadGroup:
    columns = SIZE + 1
    return HeadGroup(
        q=random(KV_HEADS, TIMES, DIM, columns, seed=1),
        k=random(KV_HEADS, DIM, columns, seed=2) if keys is None else keys,
        v=random(KV_HEADS, DIM, columns, seed=3),
        o=random(KV_HEADS, TIMES, SIZE, DIM, seed=4),
        moment=moment(5),
        value_moment=moment(6),
        pairs=Pairs(rotary),
    )


def fold(name: str, heads: HeadGroup, latent: int, frequencies: tuple[int, ...]) -> SharedLatent:
    sizes = LatentSizes(latent, DIM, frequencies)
    made = all_methods()[name].fold(heads, sizes, torch.Generator())
    assert isinstance(made, SharedLatent)
    return made


@pytest.mark.parametrize("name", METHODS)
def test_shapes(name: str) -> None:
    shared = fold(name, group(DIM), 9, (0, 2))
    heads, columns = KV_HEADS * TIMES, SIZE + 1
    assert shared.q_rope.shape == (heads, 4, columns)
    assert shared.k_rope.shape == (4, columns)
    assert shared.q_nope.shape == (heads, DIM, columns)
    assert shared.down.shape == (9, columns)
    assert shared.up_k.shape == shared.up_v.shape == (heads, DIM, 10)
    assert shared.o.shape == (heads, SIZE, DIM)


@pytest.mark.parametrize("name", METHODS)
def test_without_rotary_a_latent_as_wide_as_keys_and_values_is_exact(name: str) -> None:
    heads = group(0)
    energy = latent_energy(heads, fold(name, heads, 2 * KV_HEADS * DIM, ()))
    assert energy.captured_key > 1 - 1e-9
    assert energy.captured_value > 1 - 1e-9


@pytest.mark.parametrize("name", METHODS)
def test_one_key_head_repeated_is_the_rotary_key(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every frequency kept and rotated alone, nothing of the keys is left for the latent."""
    monkeypatch.setattr(kvfold.fold.rotated, "FREQ_FOLD", 1)
    keys = random(1, DIM, SIZE + 1, seed=2).expand(KV_HEADS, -1, -1)
    heads = group(DIM, keys)
    energy = latent_energy(heads, fold(name, heads, KV_HEADS * DIM, tuple(range(DIM // 2))))
    assert energy.captured_key > 1 - 1e-9
    assert energy.captured_value > 1 - 1e-9


def test_latent_keeps_more_than_the_published_methods() -> None:
    """Where inputs have no mean, its directions are the minimum of the error that it weighs."""
    x = random(200, SIZE, seed=5)
    x = torch.cat([x - x.mean(0), torch.ones(200, 1, dtype=torch.float64)], -1)
    second = x.T @ x / len(x)
    heads = replace(group(0), moment=second, value_moment=second)
    heads.v[..., -1] = 0

    def lost(name: str) -> float:
        energy = latent_energy(heads, fold(name, heads, 6, ()))
        return latent.KEY_WEIGHT * (1 - energy.captured_key) + 1 - energy.captured_value

    assert lost("latent") < min(lost("transmla"), lost("care"))


def test_keys_that_turned_are_met_by_phase_and_gain() -> None:
    """Where each key is seen turned by one angle and shrunk, position-free keys are that."""
    heads = group(DIM)
    k, _ = heads.pairs.split(heads.k)
    rows = k.transpose(0, 1)  # [F, Hkv, X]
    covariance = centred(heads.moment)
    still = torch.einsum("fax,xy,fby->fab", rows, covariance.to(k.dtype), rows.conj())
    still = still.expand(KV_HEADS * TIMES, -1, -1, -1)
    seen = torch.polar(
        random(KV_HEADS * TIMES, DIM // 2, seed=7).abs(), random(KV_HEADS * TIMES, DIM // 2, seed=8)
    )
    attended = AttendedKeys(seen[..., None, None] * still, still)
    shared = fold("latent", replace(heads, attended=attended), 2 * KV_HEADS * DIM, ())
    own = seen.unflatten(0, (KV_HEADS, TIMES))[..., None] * k[:, None]
    wanted = torch.cat([own.real, own.imag], -2).flatten(0, 1)
    found = shared.up_k[..., :-1] @ shared.down
    # the ridge takes a thousandth of what turning changes
    missed = (found - wanted)[..., :-1].norm() / wanted[..., :-1].norm()
    assert missed < 5e-3
