"""Attention for training on CPUs: its gradients against float64, within what rounding explains."""

import pytest
import torch

from kvfold import attention
from kvfold.kernels.torch import trained as module
from kvfold.kernels.torch.trained import can_train, trained

Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _inputs(shape: tuple[int, int, int, int, int], size: float, dtype: torch.dtype) -> Four:
    batch, heads, kv_heads, tokens, dim = shape
    generator = torch.Generator().manual_seed(0)

    def normal(h: int) -> torch.Tensor:
        return torch.randn(batch, h, tokens, dim, generator=generator).to(dtype)

    q, k, v, grad = size * normal(heads), normal(kv_heads), normal(kv_heads), normal(heads)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def _packed(tokens: int) -> torch.Tensor:
    """Two documents of a sequence, which do not see each other."""
    position = torch.arange(tokens)
    document = position > tokens // 3
    return (position[:, None] >= position) & (document[:, None] == document)


def _expected(
    inputs: Four, scale: float, seen: torch.Tensor, dtype: torch.dtype
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Output and gradients in float64, and what rounding to ``dtype`` may change of each number.

    u is the unit roundoff. A weight is exp of a rounded number, rounded; its gradient is the
    product of that and a rounded one; results are sums of rounded products, rounded.
    """
    u = torch.finfo(dtype).eps / 2
    q, k, v, grad = (x.detach().double() for x in inputs)
    shares = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shares, 1) for x in (k, v))
    scores = (scale * q @ k.mT).masked_fill(~seen, -torch.inf)
    logs = scores.log_softmax(-1)
    weights = logs.exp()
    out = weights @ v
    change = grad @ v.mT - (grad * out).sum(-1, keepdim=True)
    grad_scores = weights * change
    sizes = logs.abs().masked_fill(~seen, 0.0)
    # Sums of D or T products are in float32, and round a little, too.
    fine = torch.finfo(torch.float32).eps * max(q.shape[2:])
    score_error = u * (2 * sizes + 2) + fine * (scale * q.abs() @ k.abs().mT + 1)
    weight_error = weights * score_error
    output_error = (weight_error + (2 * u + fine) * weights) @ v.abs() + u * out.abs()
    change_error = 2 * u * change.abs() + (grad.abs() * output_error).sum(-1, keepdim=True)
    change_error = change_error + fine * (grad.abs() @ v.abs().mT)
    error = weight_error * change.abs() + weights * change_error + u * grad_scores.abs()
    of_q = scale * ((error + 2 * u * grad_scores.abs()) @ k.abs())
    of_k = scale * ((error + 2 * u * grad_scores.abs()).mT @ q.abs())
    of_v = (weight_error + 2 * u * weights).mT @ grad.abs()

    def shared(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (-1, shares)).sum(2)

    return {
        "out": (out, output_error),
        "q": (scale * grad_scores @ k, of_q),
        "k": (shared(scale * grad_scores.mT @ q), shared(of_k)),
        "v": (shared(weights.mT @ grad), shared(of_v)),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 6, 2, 300, 16), 1.0),  # more queries than are taken at a time
        ((1, 4, 4, 40, 80), 1.0),  # a scale that is no power of two
        ((3, 9, 1, 16, 64), 1.0),
        ((1, 4, 1, 70, 64), 12.0),  # attention on single keys: scores of ± 40
        ((2, 2, 1, 2, 8), 1.0),
    ],
)
def test_gradients_are_those_of_attention(
    shape: tuple[int, int, int, int, int], size: float, packed: bool, dtype: torch.dtype
) -> None:
    inputs = _inputs(shape, size, dtype)
    q, k, v, grad = inputs
    tokens, scale = shape[3], shape[4] ** -0.5
    seen = _packed(tokens) if packed else torch.ones(tokens, tokens, dtype=torch.bool).tril()
    out = trained(q, k, v, scale, seen.expand(shape[0], 1, -1, -1) if packed else None)
    found = dict(zip("qkv", torch.autograd.grad(out, (q, k, v), grad), strict=True)) | {"out": out}
    for name, (wanted, allowed) in _expected(inputs, scale, seen, dtype).items():
        wrong = (found[name].detach().double() - wanted).abs() - allowed
        assert wrong.max() <= 0, name
        assert found[name].dtype == dtype
        # The bound is of use: half of what is wanted would not pass.
        assert (wanted.abs() / 2 > allowed).any() or wanted.abs().max() < 1e-12, name


def test_some_queries_at_a_time_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, grad = _inputs((1, 4, 2, 50, 8), 1.0, torch.float32)
    whole = torch.autograd.grad(trained(q, k, v, 0.3), (q, k, v), grad)
    monkeypatch.setattr(module, "_SCORES", 4 * 50 * 7)
    parts = torch.autograd.grad(trained(q, k, v, 0.3), (q, k, v), grad)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_attention_takes_it_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: object) -> torch.Tensor:
        calls.append(args)
        return trained(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("kvfold.kernels.torch.sdpa.trained", counted)
    q, k, v, grad = _inputs((1, 4, 2, 20, 8), 1.0, torch.bfloat16)
    for options, taken in (
        ({}, True),
        ({"window": 5}, True),
        ({"mask": _packed(20)}, True),
        ({"mask": torch.zeros(20, 20, dtype=torch.bfloat16)}, False),
        ({"softcap": 5.0}, False),
    ):
        calls.clear()
        attention(q, k, v, **options).backward(grad)  # type: ignore[union-attr]
        assert bool(calls) == taken, options
    with torch.no_grad():
        assert not can_train(q, k, v)
    assert not can_train(q.float(), k.float(), v.float())
    assert not can_train(q, k, v[..., :4])


def test_second_derivatives_are_refused() -> None:
    q, k, v, grad = _inputs((1, 2, 1, 6, 8), 1.0, torch.bfloat16)
    out, grad = trained(q, k, v, 0.3), grad.requires_grad_()
    (first,) = torch.autograd.grad(out, q, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
