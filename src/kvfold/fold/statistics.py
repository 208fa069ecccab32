"""What a layer's inputs look like to its keys and values, gathered from calibration text."""

from dataclasses import dataclass

import torch

from kvfold.fold.pairs import Pairs
from kvfold.fold.stream import AttentionCall


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
    """

    moment: torch.Tensor
    value_moment: torch.Tensor
    key_moments: torch.Tensor | None = None

    @classmethod
    def without_data(cls, hidden_size: int) -> "LayerStatistics":
        """Independent inputs of unit size: what is assumed without calibration."""
        identity = torch.ones(hidden_size + 1, dtype=torch.float64, device="cpu")
        return cls(identity, identity)


class StatisticsCollector:
    """Listens to a source layer and sums its statistics up."""

    _inputs: torch.Tensor  # of the batch that is heard

    def __init__(self, hidden_size: int, pairs: Pairs, device: torch.device) -> None:
        size = hidden_size + 1
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
        self._value_moment += _gram(_averaged_inputs(probabilities, inputs))
        self._tokens += inputs.shape[0] * inputs.shape[1]
        if self._pairs.rotary_dim:
            moments = _key_moments(call, probabilities, self._pairs)
            previous = self._key_moments
            self._key_moments = moments if previous is None else previous + moments

    def result(self) -> LayerStatistics:
        keys = self._key_moments
        return LayerStatistics(
            self._moment / self._tokens,
            self._value_moment / self._tokens,
            None if keys is None else keys / self._tokens,
        )


def _gram(rows: torch.Tensor) -> torch.Tensor:
    flat = rows.reshape(-1, rows.shape[-1])
    return (flat.mT @ flat).double()


def _averaged_inputs(probabilities: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """A_r x~ for one query head per token (they take turns): ``[B, T, X]``.

    All heads would cost Hq times as much and hardly change a second moment.
    """
    batch, heads, tokens, _ = probabilities.shape
    device = probabilities.device
    token, window = torch.arange(tokens, device=device), torch.arange(batch, device=device)
    turn = (token[None] + window[:, None]) % heads
    index = turn[:, None, :, None].expand(-1, 1, -1, tokens)
    return probabilities.gather(1, index)[:, 0] @ inputs


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
