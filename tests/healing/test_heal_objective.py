"""The loss against float64, and the exact rescaling before training."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.healing import objective as module
from kvfold.healing.balance import balanced_tensors
from kvfold.healing.objective import Objective, distillation, hidden_error
from tests.toolbox import tiny


def reference(
    student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, o: Objective
) -> torch.Tensor:
    """The formula of the module's docstring, word for word, in float64."""
    s, t = student.double(), teacher.double()
    log_s, log_t = (s / o.temperature).log_softmax(-1), (t / o.temperature).log_softmax(-1)
    kl = (log_t.exp() * (log_t - log_s)).sum() * o.temperature**2
    entropy = torch.nn.functional.cross_entropy(s, targets, reduction="sum")
    return (1 - o.cross_entropy) * kl + o.cross_entropy * entropy


def logits(rows: int, words: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, teacher = (4 * torch.randn(rows, words, generator=g) for _ in range(2))
    return student, teacher, torch.randint(words, (rows,), generator=g)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 9), st.integers(2, 40), st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99),
)  # fmt: skip
def test_loss_and_gradient_are_those_of_the_formula(
    rows: int, words: int, temperature: float, mix: float, seed: int
) -> None:
    student, teacher, targets = logits(rows, words, seed)
    wanted = Objective(temperature, mix)
    own = student.clone().requires_grad_()
    loss, kl = distillation(own, teacher, targets, wanted)
    loss.backward()
    exact = student.double().requires_grad_()
    truth = reference(exact, teacher, targets, wanted)
    truth.backward()
    assert own.grad is not None
    assert exact.grad is not None
    # Logits of size 16 / temperature, in float32: errors of 32 eps each, summed over rows.
    tolerance = 64 * torch.finfo(torch.float32).eps * 16 / temperature
    torch.testing.assert_close(loss.double(), truth, rtol=tolerance, atol=tolerance * rows)
    torch.testing.assert_close(own.grad.double(), exact.grad, rtol=0, atol=tolerance)
    plain = reference(student, teacher, targets, Objective())
    torch.testing.assert_close(kl.double(), plain, rtol=1e-4, atol=1e-4 * rows)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, targets = logits(10, 30, 0)
    results = []
    for elements in (30 * 10, 30 * 3, 1):
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS_CPU", elements)
        own = student.clone().requires_grad_()
        loss, _ = distillation(own, teacher, targets, Objective(2.0, 0.5))
        loss.backward()
        results.append((loss.detach(), own.grad))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])  # type: ignore[arg-type]


@pytest.mark.parametrize(("temperature", "mix"), [(1.0, 0.0), (2.0, 0.3)])
def test_what_does_not_count_is_as_if_it_was_not_there(temperature: float, mix: float) -> None:
    student, teacher, targets = logits(10, 30, 0)
    counted = torch.tensor([True, False, True, True, False, False, True, True, True, False])
    wanted = Objective(temperature, mix)
    whole, part = student.clone().requires_grad_(), student[counted].requires_grad_()
    found = distillation(whole, teacher, targets, wanted, counted)
    alone = distillation(part, teacher[counted], targets[counted], wanted)
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other)
    found[0].backward()
    alone[0].backward()
    assert whole.grad is not None
    assert torch.equal(whole.grad[counted], part.grad)  # type: ignore[arg-type]
    assert not whole.grad[~counted].any()


def test_equal_predictions_have_nothing_to_learn() -> None:
    student, _, targets = logits(5, 20, 1)
    own = student.clone().requires_grad_()
    # A constant added to all logits of a token changes no prediction.
    loss, _ = distillation(own, student + 3.0, targets, Objective())
    loss.backward()
    assert own.grad is not None
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert float(own.grad.abs().max()) < 1e-6


def test_hidden_error_is_relative_and_damps_giants() -> None:
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(1, 9, 16, generator=g)
    teacher[0, 0] *= 1000  # an attention sink
    student = teacher * 1.1
    error = hidden_error((student, student), (teacher, teacher))
    usual = float(error[0, 1:].mean())
    assert usual == pytest.approx(0.01, rel=0.5)  # (10%)² of a usual token's energy
    # 0.01 · 10⁶ energy, damped by 10³: a thousand times a usual token, not a million.
    assert float(error[0, 0]) == pytest.approx(1000 * usual, rel=1)
    assert float(hidden_error((teacher, teacher), (teacher, teacher)).sum()) == 0


@pytest.mark.parametrize("case", tiny.CASES)
def test_balancing_changes_no_bit_of_the_output(case: str) -> None:
    """Powers of two only change exponents."""
    model = tiny.make(case)
    ids = tiny.tokens()
    state = model.state_dict()
    for name in state:  # unequal as folding leaves them
        if name.endswith("k_proj.weight"):
            state[name] *= 37.0
        if name.endswith("o_proj.weight"):
            state[name] *= 0.01
    model.load_state_dict(state)
    unbalanced = tiny.logits(model, ids)
    model.load_state_dict(balanced_tensors(tiny.checkpoint_of(model)), strict=False)
    assert torch.equal(tiny.logits(model, ids), unbalanced)


def test_balanced_projections_are_of_one_size() -> None:
    model = tiny.make("llama")
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.weight"):
            parameter.data *= 100.0
    checkpoint = tiny.checkpoint_of(model)
    tensors = balanced_tensors(checkpoint)
    prefix = checkpoint.attention_prefix(0)
    q, k = (tensors[f"{prefix}.{part}_proj.weight"].square().mean().sqrt() for part in "qk")
    # c is within a factor of sqrt(2) of the best one on each side, for each of two heads.
    assert 0.4 < float(q / k) < 2.5
