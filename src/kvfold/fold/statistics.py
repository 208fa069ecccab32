"""What a layer's inputs look like to its keys and values, gathered from calibration text."""

from dataclasses import dataclass

import torch

from kvfold.fold.pairs import Pairs
from kvfold.fold.stream import AttentionCall


@dataclass
class AttendedKeys:
    """Keys as queries see them, each query head's attention for itself. What a latent looks at.

    Softmax sees only differences between keys, hence covariances within attention. A key that is
    seen from a distance has turned by it, frequency by frequency.

    Attributes:
        inputs: ``[X, X]``, the covariance of inputs x~ within attention, over all query heads.
        turned: ``[Hq, F, Hkv, Hkv]`` complex, of all heads' keys turned as the query sees them,
            with the same keys as they are: E[turned k_a conj(k_b)].
        still: ``[Hq, F, Hkv, Hkv]`` complex, of the keys as they are: E[k_a conj(k_b)].
    """

    inputs: torch.Tensor
    turned: torch.Tensor
    still: torch.Tensor


@dataclass
class LayerStatistics:
    """Second moments of one layer, in float64. X = C + 1: the input with a 1 for biases.

    Attributes:
        moment: ``[X, X]``, E[x~ x~ᵀ] over tokens; or ``[X]``, the diagonal of a diagonal one.
        value_moment: ``[X, X]``, the same for attention-averaged inputs A_r x~, over tokens and
            query heads. Values are only ever seen averaged, which keeps slow directions and
            damps the others.
        key_moments: ``[Hkv, F, Hkv, Hkv]`` complex, or None: entry h is the covariance of all
            heads' keys within the attention of head h's queries, weighted by the queries'
            energy, frequency by frequency. Softmax sees only differences between keys, hence a
            covariance.
        attended: what only latents look at, or None.
    """

    moment: torch.Tensor
    value_moment: torch.Tensor
    key_moments: torch.Tensor | None = None
    attended: AttendedKeys | None = None

    @classmethod
    def without_data(cls, hidden_size: int) -> "LayerStatistics":
        """Independent inputs of unit size: what is assumed without calibration."""
        identity = torch.ones(hidden_size + 1, dtype=torch.float64, device="cpu")
        return cls(identity, identity)


class StatisticsCollector:
    """Listens to a source layer and sums its statistics up.

    Args:
        keys: the rows ``[Hkv, D, X]`` that make its keys, to gather ``attended``; or None.
    """

    _inputs: torch.Tensor  # of the batch that is heard

    def __init__(
        self,
        hidden_size: int,
        pairs: Pairs,
        device: torch.device,
        keys: torch.Tensor | None = None,
    ) -> None:
        size = hidden_size + 1
        self._keys = None if keys is None else pairs.split(keys)[0]
        self._attended: AttendedKeys | None = None
        self._moment = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._value_moment = torch.zeros_like(self._moment)
        self._key_moments: torch.Tensor | None = None
        self._pairs = pairs
        self._tokens = 0

    def attention_input(self, inputs: torch.Tensor) -> None:
        self._inputs = inputs

    def call(self, call: AttentionCall) -> None:
        inputs = torch.cat([self._inputs, torch.ones_like(self._inputs[..., :1])], -1)
        probabilities = call.probabilities()
        self._moment += _gram(inputs)
        seen = _one_head_each(probabilities)
        averaged = _gram(seen @ inputs)
        self._value_moment += averaged
        self._tokens += inputs.shape[0] * inputs.shape[1]
        if self._pairs.rotary_dim:
            moments = _key_moments(call, probabilities, self._pairs)
            previous = self._key_moments
            self._key_moments = moments if previous is None else previous + moments
        if self._keys is not None:
            received = seen.sum(1).sqrt()[..., None]  # of each input, by all queries
            covariance = _gram(received * inputs) - averaged
            self._attended = _added(
                self._attended,
                covariance,
                *_turned_moments(call, probabilities, inputs, self._keys, self._pairs),
            )

    def result(self) -> LayerStatistics:
        keys, seen = self._key_moments, self._attended
        return LayerStatistics(
            self._moment / self._tokens,
            self._value_moment / self._tokens,
            None if keys is None else keys / self._tokens,
            None if seen is None else _scaled(seen, 1 / self._tokens),
        )


def _gram(rows: torch.Tensor) -> torch.Tensor:
    flat = rows.reshape(-1, rows.shape[-1])
    return (flat.mT @ flat).double()


def _added(
    sums: AttendedKeys | None, inputs: torch.Tensor, turned: torch.Tensor, still: torch.Tensor
) -> AttendedKeys:
    if sums is None:
        return AttendedKeys(inputs, turned, still)
    return AttendedKeys(sums.inputs + inputs, sums.turned + turned, sums.still + still)


def _scaled(sums: AttendedKeys, factor: float) -> AttendedKeys:
    return AttendedKeys(sums.inputs * factor, sums.turned * factor, sums.still * factor)


def _one_head_each(probabilities: torch.Tensor) -> torch.Tensor:
    """The attention ``[B, T, T]`` of one query head per token (they take turns).

    All heads would cost Hq times as much and hardly change a second moment.
    """
    batch, heads, tokens, _ = probabilities.shape
    device = probabilities.device
    token, window = torch.arange(tokens, device=device), torch.arange(batch, device=device)
    turn = (token[None] + window[:, None]) % heads
    index = turn[:, None, :, None].expand(-1, 1, -1, tokens)
    return probabilities.gather(1, index)[:, 0]


def _key_moments(call: AttentionCall, probabilities: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """sum_t E_t (sum_s p_ts k_s k_s^H - mean_t mean_t^H), E_t the energy of query t.

    The first term is sum_s c_s k_s k_s^H with c_s = sum_t p_ts E_t, so no t x s x heads^2
    array is ever made. Their difference is small beside them, hence float64.
    """
    queries, _ = pairs.split(call.query.mT)  # [B, Hq, F, T]
    keys, _ = pairs.split(call.key.mT)  # [B, Hkv, F, T]
    batch, kv_heads, frequencies, tokens = keys.shape
    group_size = queries.shape[1] // kv_heads
    energies = (queries.real.square() + queries.imag.square()).mT  # [B, Hq, T, F]
    flat = torch.view_as_real(keys).double().permute(0, 3, 1, 2, 4).reshape(batch, tokens, -1)
    shape = kv_heads, frequencies, kv_heads, kv_heads
    result = torch.zeros(shape, dtype=torch.complex128, device=keys.device)
    k = keys.permute(2, 1, 0, 3).flatten(2).to(torch.complex128)  # [F, Hkv, B T]
    for head in range(queries.shape[1]):
        p, energy = probabilities[:, head].double(), energies[:, head].double()
        weight = (p.mT @ energy).permute(2, 0, 1).flatten(1)[:, None]  # [F, 1, B T]
        means = (p @ flat).reshape(batch, tokens, kv_heads, frequencies, 2)
        m = torch.view_as_complex(means).permute(3, 2, 0, 1).flatten(2)
        seen = energy.permute(2, 0, 1).flatten(1)[:, None]
        covariance = (k * weight) @ k.mH - (m * seen) @ m.mH
        result[head // group_size] += covariance
    return result


def _turned_moments(
    call: AttentionCall,
    probabilities: torch.Tensor,
    inputs: torch.Tensor,
    rows: torch.Tensor,
    pairs: Pairs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over queries t of the two covariances of :class:`AttendedKeys`.

    With u_t the turn of position t, key s is seen by query t as conj(u_t) u_s k_s. As in
    ``_key_moments`` the sums over t come first, so that no t x s array is made for each pair.

    Args:
        rows: ``[Hkv, F, X]`` complex, that make keys before they turn.
    """
    absolute, _ = pairs.split(call.key.mT)
    absolute = absolute.permute(0, 3, 1, 2).to(torch.complex128)  # u_s k_s, [B, T, Hkv, F]
    x = inputs.double()
    keys = torch.complex(
        torch.einsum("btx,gfx->btgf", x, rows.real), torch.einsum("btx,gfx->btgf", x, rows.imag)
    )
    agreement = (absolute * keys.conj()).sum((0, 2))  # [T, F]: all windows begin at one position
    back = (agreement / agreement.abs().clamp_min(1e-300)).conj().resolve_conj()  # conj(u_t)
    kv_heads, frequencies = rows.shape[:2]
    shape = call.query.shape[1], frequencies, kv_heads, kv_heads
    turned = torch.zeros(shape, dtype=torch.complex128, device=keys.device)
    still = torch.zeros_like(turned)
    both = torch.view_as_real(torch.stack([keys, absolute], -1)).flatten(2)  # [B, T, Hkv F 4]
    turns = torch.view_as_real(back).flatten(1)  # [T, 2 F]
    for head in range(shape[0]):
        p = probabilities[:, head].double()
        received = torch.view_as_complex((p.mT @ turns).unflatten(-1, (frequencies, 2)))
        means = torch.view_as_complex((p @ both).unflatten(-1, (kv_heads, frequencies, 2, 2)))
        mean, seen = means[..., 0], means[..., 1] * back[:, None]
        still[head] = _by_frequency(p.sum(1)[..., None, None] * keys, keys)
        still[head] -= _by_frequency(mean, mean)
        turned[head] = _by_frequency(received[:, :, None] * absolute, keys)
        turned[head] -= _by_frequency(seen, mean)
    return turned, still


def _by_frequency(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``[B, T, Hkv, F]`` twice -> ``[F, Hkv, Hkv]``: the sum of a b^H."""
    a, b = (each.permute(3, 2, 0, 1).flatten(2) for each in (a, b))
    return a @ b.mH
