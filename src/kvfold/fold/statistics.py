"""What a layer's inputs look like to its keys and values, gathered from calibration text."""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

import torch

from kvfold.fold.pairs import Pairs
from kvfold.fold.sample import Sample
from kvfold.fold.stream import AttentionCall
from kvfold.quality.world import ALONE, World

# At once; memory of larger arrays goes back to the system and is zeroed for the next, which takes
# longer than to compute them.
_SCORES = 2**22


@dataclass
class AttendedKeys:
    """Keys as queries see them, each query head's attention for itself. What a latent looks at.

    A key that is seen from a distance has turned by it, frequency by frequency.

    Attributes:
        turned: ``[Hq, F, Hkv, Hkv]`` complex, of all heads' keys turned as the query sees them,
            with the same keys as they are: E[turned k_a conj(k_b)].
        still: ``[Hq, F, Hkv, Hkv]`` complex, of the keys as they are: E[k_a conj(k_b)].
    """

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
        covariance: ``[X, X]``, of inputs x~ within attention, over all query heads, or None.
        attended: what only latents look at, or None. sample: some inputs, or None.
    """

    moment: torch.Tensor
    value_moment: torch.Tensor
    key_moments: torch.Tensor | None = None
    covariance: torch.Tensor | None = None
    attended: AttendedKeys | None = None
    sample: Sample | None = None

    @classmethod
    def without_data(cls, hidden_size: int) -> "LayerStatistics":
        """Independent inputs of unit size: what is assumed without calibration."""
        identity = torch.ones(hidden_size + 1, dtype=torch.float64, device="cpu")
        return cls(identity, identity)


class StatisticsCollector:
    """Listens to a source layer and sums its statistics up.

    Args:
        keys: the rows ``[Hkv, D, X]`` that make its keys, to gather ``attended``; or None.
        sampled: the same, to keep a ``sample``; or None.
    """

    _inputs: torch.Tensor  # of the batch that is heard

    def __init__(
        self,
        hidden_size: int,
        pairs: Pairs,
        device: torch.device,
        keys: torch.Tensor | None = None,
        sampled: torch.Tensor | None = None,
    ) -> None:
        size = hidden_size + 1
        self._sampled = sampled
        self._sample: Sample | None = None
        self._keys = None if keys is None else pairs.split(keys)[0]
        self._attended: AttendedKeys | None = None
        self._moment = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._value_moment = torch.zeros_like(self._moment)
        self._covariance = torch.zeros_like(self._moment)
        self._key_moments: torch.Tensor | None = None
        self._pairs = pairs
        self._tokens = self._turn = 0

    def begun(self, turn: int) -> "StatisticsCollector":
        """One that goes on from here, and may fail: sums are replaced, never changed.

        Args:
            turn: which query head the first token's is.
        """
        found = copy(self)
        found._turn = turn
        return found

    def take(self, other: "StatisticsCollector") -> None:
        """Go on from where that one has come to."""
        vars(self).update(vars(other))

    def attention_input(self, inputs: torch.Tensor) -> None:
        self._inputs = inputs

    def call(self, call: AttentionCall) -> None:
        inputs = torch.cat([self._inputs, torch.ones_like(self._inputs[..., :1])], -1)
        if self._sampled is not None and self._sample is None:
            self._sample = Sample.of(inputs, call.key, self._sampled, self._pairs, call.scale)
        windows, heads, tokens, _ = call.query.shape
        together = max(1, _SCORES // (heads * tokens**2))
        for start in range(0, windows, together):
            which = slice(start, start + together)
            self._hear(call.windows(which), inputs[which], self._turn + start)

    def _hear(self, call: AttentionCall, inputs: torch.Tensor, turn: int) -> None:
        probabilities = call.probabilities()
        self._moment = self._moment + _gram(inputs)
        seen = _one_head_each(probabilities, turn)
        averaged = _gram(seen @ inputs)
        self._value_moment = self._value_moment + averaged
        self._tokens += inputs.shape[0] * inputs.shape[1]
        keys = _KeyMoments(call, probabilities, self._pairs)
        if self._pairs.rotary_dim:
            moments = keys.by_energy()
            previous = self._key_moments
            self._key_moments = moments if previous is None else previous + moments
        received = seen.sum(1).sqrt()[..., None]  # of each input, by all queries
        self._covariance = self._covariance + _gram(received * inputs) - averaged
        if self._keys is not None:
            self._attended = _added(self._attended, *keys.attended(inputs, self._keys))

    def result(self, world: World = ALONE) -> LayerStatistics:
        """Of what the collectors of all processes have heard."""
        tokens = round(world.sum([self._tokens])[0])
        world.add(self._moment, self._value_moment, self._covariance)
        keys = self._summed(world, self._key_moments)
        attended = self._attended
        parts = (None, None) if attended is None else vars(attended).values()
        turned, still = (self._summed(world, part) for part in parts)
        seen = None
        if turned is not None and still is not None:
            seen = AttendedKeys(turned / tokens, still / tokens)
        return LayerStatistics(
            self._moment / tokens,
            self._value_moment / tokens,
            None if keys is None else keys / tokens,
            self._covariance / tokens,
            seen,
            self._sample,
        )

    def _summed(self, world: World, own: torch.Tensor | None) -> torch.Tensor | None:
        """Over processes, of which some may have heard nothing."""
        if world.size == 1:
            return own
        kinds = world.gather(None if own is None else (own.shape, own.dtype))
        kind = next((each for each in kinds if each is not None), None)
        if kind is None:
            return None
        if own is None:
            own = torch.zeros(kind[0], dtype=kind[1], device=self._moment.device)
        own = own.contiguous()
        world.add(own)
        return own


def _gram(rows: torch.Tensor) -> torch.Tensor:
    flat = rows.reshape(-1, rows.shape[-1])
    return (flat.mT @ flat).double()


def _added(sums: AttendedKeys | None, turned: torch.Tensor, still: torch.Tensor) -> AttendedKeys:
    if sums is None:
        return AttendedKeys(turned, still)
    return AttendedKeys(sums.turned + turned, sums.still + still)


def _one_head_each(probabilities: torch.Tensor, first: int) -> torch.Tensor:
    """The attention ``[B, T, T]`` of one query head per token (they take turns, from ``first`` on).

    All heads would cost Hq times as much and hardly change a second moment.
    """
    batch, heads, tokens, _ = probabilities.shape
    device = probabilities.device
    token, window = torch.arange(tokens, device=device), torch.arange(batch, device=device)
    turn = (token[None] + window[:, None] + first) % heads
    index = turn[:, None, :, None].expand(-1, 1, -1, tokens)
    return probabilities.gather(1, index)[:, 0]


class _KeyMoments:
    """Sums over queries t of the covariances of keys within each query head's attention.

    All are of the form sum_t w_t (sum_s p_ts a_s b_s^H - mean_t a mean_t b^H). In the first term
    the sum over t comes first, so that no t x s x heads^2 array is ever made. The difference of
    the two is small beside them, hence float64. What attention adds up is in float32, and what all
    tokens have in common is taken from the keys before, which changes no covariance.

    Complex numbers are pairs of rows, real parts before imaginary ones: ``[B, F, 2 Hkv, T]``.
    """

    def __init__(self, call: AttentionCall, probabilities: torch.Tensor, pairs: Pairs) -> None:
        self._probabilities = probabilities
        self._queries = pairs.split(call.query.mT)[0]  # [B, Hq, F, T]
        self._keys = pairs.split(call.key.mT)[0]  # u_s k_s, turned by their positions
        self._absolute = _centred(_halves(self._keys))
        self._kv_heads = self._keys.shape[1]

    def by_energy(self) -> torch.Tensor:
        """``[Hkv, F, Hkv, Hkv]``: queries count by their energy; those of a group together."""
        a, queries = self._absolute, self._queries
        energies = (queries.real.square() + queries.imag.square()).double()
        group_size = queries.shape[1] // self._kv_heads
        found = []
        for head, p, mean in self._means(a):
            energy = energies[:, head]
            received = (energy.float() @ p).double()[:, :, None]
            covariance = _sum_of(a * received, a) - _sum_of(mean * energy[:, :, None], mean)
            found.append(covariance)
        return torch.stack(found).unflatten(0, (self._kv_heads, group_size)).sum(1)

    def attended(
        self, inputs: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``turned`` and ``still`` of :class:`AttendedKeys`.

        With u_t the turn of position t, key s is seen by query t as conj(u_t) u_s k_s.

        Args:
            rows: ``[Hkv, F, X]`` complex, that make keys before they turn.
        """
        x = inputs.double()[:, None]
        parts = (x @ part.flatten(0, 1).mT for part in (rows.real, rows.imag))
        keys = torch.complex(*(each[:, 0].mT.unflatten(1, rows.shape[:2]) for each in parts))
        # all windows begin at one position
        agreement = (self._keys.to(keys.dtype) * keys.conj()).sum((0, 1))  # [F, T]
        turn = agreement / agreement.abs().clamp_min(1e-300)
        back = torch.stack([turn.real, -turn.imag], 1)[None]  # conj(u_t): [1, F, 2, T]
        a, k = self._absolute, _centred(_halves(keys))
        turned, still = [], []
        for _, p, mean in self._means(torch.cat([a, k], 2)):
            mean_a, mean_k = mean.tensor_split(2, 2)
            seen = (back.flatten(1, 2).float() @ p).double().unflatten(1, back.shape[1:3])
            turned.append(_sum_of(_turned(a, seen), k) - _sum_of(_turned(mean_a, back), mean_k))
            still.append(_sum_of(k * p.sum(1).double()[:, None, None], k) - _sum_of(mean_k, mean_k))
        return torch.stack(turned), torch.stack(still)

    def _means(self, x: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Each query head, its attention ``[B, T, T]``, and what it averages of ``x``."""
        narrow = x.float().flatten(1, 2)
        for head, p in enumerate(self._probabilities.unbind(1)):
            yield head, p, (narrow @ p.mT).double().reshape(x.shape)


def _halves(pairs: torch.Tensor) -> torch.Tensor:
    """``[B, H, F, T]`` complex -> ``[B, F, 2 H, T]`` float64."""
    return torch.cat([pairs.real, pairs.imag], 1).double().transpose(1, 2).contiguous()


def _centred(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean((0, -1), keepdim=True)


def _turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """``x`` ``[B, F, 2 H, T]`` times ``turn`` ``[B, F, 2, T]``, complex."""
    real, imag = x.tensor_split(2, 2)
    c, s = turn.tensor_split(2, 2)
    return torch.cat([real * c - imag * s, real * s + imag * c], 2)


def _sum_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``[B, F, 2 H, T]`` twice -> ``[F, H, H]`` complex: the sum over tokens of a b^H."""
    products = (a @ b.mT).sum(0)
    above, below = products.tensor_split(2, 1)
    (rr, ri), (ir, ii) = above.tensor_split(2, 2), below.tensor_split(2, 2)
    return torch.complex(rr + ii, ir - ri)
