"""Methods, grouping and the algebra under them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.arch.target import Grouped, Latent
from kvfold.errors import InputError, UnsupportedError
from kvfold.fold import methods
from kvfold.fold.energy import fold_energy
from kvfold.fold.grouping import _exact, _greedy, consecutive_groups, find_groups, pair_losses
from kvfold.fold.heads import HeadGroup, LayerHeads
from kvfold.fold.layer import FoldPlan, fold_layer
from kvfold.fold.methods import Method, all_methods, check_method, method_names, methods_for
from kvfold.fold.model import fold_model
from kvfold.fold.pairs import Pairs
from kvfold.fold.statistics import LayerStatistics
from kvfold.fold.stored_layer import StoredLayer
from kvfold.fold.subspace import matrix_roots, shared_subspace
from tests.toolbox import tiny


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def moment(size: int, seed: int = 9) -> torch.Tensor:
    rows = torch.cat([random(200, size - 1, seed=seed), torch.ones(200, 1).double()], 1)
    return rows.T @ rows / 200


def statistics(size: int) -> LayerStatistics:
    return LayerStatistics(moment(size), moment(size, seed=10))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 4, 8])
def test_pairs_split_and_join(rotary_dim: int, interleaved: bool) -> None:
    pairs = Pairs(rotary_dim, interleaved)
    rows = random(3, 8, 5)
    assert torch.equal(pairs.join(*pairs.split(rows)), rows)


def test_a_phase_on_pairs_commutes_with_rotary_embedding() -> None:
    """The gauge that everything rests on, with transformers' own rotary functions."""
    from transformers.models.cohere.modeling_cohere import rotate_half as interleaved_half
    from transformers.models.llama.modeling_llama import rotate_half

    angles = random(4)
    turn = torch.polar(torch.rand(4).double() + 0.5, random(4, seed=1))[:, None]
    for pairs, half, cos, sin in (
        (Pairs(8), rotate_half, angles.cos().repeat(2), angles.sin().repeat(2)),
        (
            Pairs(8, True),
            interleaved_half,
            angles.cos().repeat_interleave(2),
            angles.sin().repeat_interleave(2),
        ),
    ):

        def rotate(x: torch.Tensor, cos=cos, sin=sin, half=half) -> torch.Tensor:  # type: ignore[no-untyped-def]
            return x * cos + half(x) * sin

        def gauge(x: torch.Tensor, pairs: Pairs = pairs) -> torch.Tensor:
            complex_pairs, rest = pairs.split(x[:, None])
            return pairs.join(turn * complex_pairs, rest)[:, 0]

        key = random(8, seed=2)
        torch.testing.assert_close(gauge(rotate(key)), rotate(gauge(key)))


def test_roots() -> None:
    factor = random(2, 4, 4)
    metric = factor @ factor.mT
    root, inverse = matrix_roots(metric)
    torch.testing.assert_close(root @ root, metric)
    torch.testing.assert_close(root @ inverse, torch.eye(4).double().expand(2, -1, -1))


def test_shared_subspace_is_the_minimum() -> None:
    """No random shared rows do better, each with its best mixing matrices."""
    stacks, second = random(3, 2, 6), moment(6)
    factors = random(3, 2, 2, seed=3)
    metrics = factors @ factors.mT

    def error(shared: torch.Tensor, mixes: torch.Tensor) -> float:
        rest = stacks - mixes @ shared
        return float((metrics * (rest @ second @ rest.mT)).sum())

    best = error(*shared_subspace(stacks, second, metrics))
    for seed in range(50):
        shared = random(2, 6, seed=100 + seed)
        system = shared @ second @ shared.T
        mixes = torch.linalg.solve(system, shared @ second @ stacks.mT).mT
        assert error(shared, mixes) >= best


def layer(kv_heads: int = 4, seed: int = 0) -> LayerHeads:
    model = tiny.make("llama", seed, num_attention_heads=kv_heads, num_key_value_heads=kv_heads)
    return tiny.all_heads(model)[0]


def whole_group(heads: LayerHeads) -> HeadGroup:
    return heads.group(list(range(heads.num_kv_heads)), statistics(heads.k.shape[-1]))


SHARING = [name for name, each in all_methods().items() if Grouped in each.targets]


@pytest.mark.parametrize("name", SHARING)
def test_every_method_returns_one_head_of_the_right_shape(name: str) -> None:
    group = whole_group(layer())
    shared = all_methods()[name].fold(group, torch.Generator().manual_seed(0))
    assert shared.k.shape == group.k.shape[1:]
    assert shared.v.shape == group.v.shape[1:]
    assert shared.q.shape == group.q.shape
    assert shared.o.shape == group.o.shape
    assert all(torch.isfinite(t).all() for t in (shared.q, shared.k, shared.v, shared.o))


@pytest.mark.parametrize("name", ["first", "mean", "aligned", "pca"])
def test_a_repeated_head_is_kept_exactly(name: str) -> None:
    heads = tiny.repeated(tiny.all_heads(tiny.make("llama", num_key_value_heads=1))[0])
    group = whole_group(heads)
    energy = fold_energy(group, all_methods()[name].fold(group, torch.Generator()))
    assert energy.captured_value == pytest.approx(1, abs=1e-9)
    assert energy.captured_key == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_pca_captures_more_than_every_other_method(seed: int) -> None:
    group = whole_group(layer(seed=seed))
    captured = {
        name: fold_energy(
            group, all_methods()[name].fold(group, torch.Generator().manual_seed(seed))
        )
        for name in SHARING
    }
    for name, energy in captured.items():
        assert energy.captured_value <= captured["pca"].captured_value + 1e-9, name
        assert energy.captured_key <= captured["pca"].captured_key + 1e-9, name


def test_energy_is_what_it_says() -> None:
    """Against the definition, sampled: O V x and q . k of random inputs."""
    group = whole_group(layer())
    shared = all_methods()["mean"].fold(group, torch.Generator())
    inputs = torch.linalg.cholesky(moment(group.k.shape[-1])) @ random(group.k.shape[-1], 200_000)
    averaged = torch.linalg.cholesky(group.value_moment) @ random(
        group.k.shape[-1], 200_000, seed=1
    )
    old = torch.einsum("hrcd,hdx,xn->hrcn", group.o, group.v, averaged[:, :20_000])
    new = torch.einsum("hrcd,dx,xn->hrcn", shared.o, shared.v, averaged[:, :20_000])
    energy = fold_energy(group, shared)
    captured = 1 - (old - new).square().sum() / old.square().sum()
    assert energy.captured_value == pytest.approx(float(captured), abs=0.02)
    pairs = group.pairs
    q_old, k_old = pairs.split(group.q)[0], pairs.split(group.k)[0]
    k_new = pairs.split(shared.k)[0]
    x, y = inputs[:, :100_000].to(torch.complex128), inputs[:, 100_000:].to(torch.complex128)
    scores = (q_old @ x).conj() * (k_old[:, None] @ y)
    error = scores - (q_old @ x).conj() * (k_new @ y)
    captured = 1 - error.abs().square().sum() / scores.abs().square().sum()
    assert energy.captured_key == pytest.approx(float(captured), abs=0.02)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(4, 2), (6, 2), (6, 3), (8, 4)]))
def test_greedy_grouping_is_close_to_exact(seed: int, shape: tuple[int, int]) -> None:
    count, size = shape[0], shape[0] // shape[1]
    table = random(count, count, seed=seed).abs()
    table = (table + table.T).fill_diagonal_(0)
    costs = table.tolist()

    def cost(groups: list[tuple[int, ...]]) -> float:
        return float(sum(costs[a][b] for g in groups for a in g for b in g)) / 2

    exact, greedy = _exact(costs, size), _greedy(costs, size)
    assert sorted(h for g in greedy for h in g) == list(range(count))
    assert cost(exact) <= cost(greedy) + 1e-9 <= 1.5 * cost(exact) + 1e-9


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_hidden_copies_are_found_among_many_heads(kv_heads: int) -> None:
    """16 heads, which is beyond the exact search."""
    model = tiny.make(
        "llama", num_attention_heads=16, num_key_value_heads=kv_heads, hidden_size=128
    )
    source = tiny.repeated(tiny.all_heads(model)[0])
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(16, generator=generator)
    hidden = tiny.scrambled(source, 5)
    groups = find_groups(pair_losses(hidden, LayerStatistics.without_data(128)), kv_heads)
    origin = (order // (16 // kv_heads)).tolist()
    assert len(groups) == kv_heads
    for group in groups:
        assert len({origin[head] for head in group}) == 1


def test_consecutive_groups() -> None:
    assert consecutive_groups(6, 2) == [[0, 1, 2], [3, 4, 5]]


def test_regrouping_never_captures_less_than_neighbours() -> None:
    checkpoint = tiny.checkpoint_of(tiny.make("llama", num_key_value_heads=6))
    heads = StoredLayer(checkpoint, 0).heads()
    stats = statistics(heads.k.shape[-1])
    plan = FoldPlan(Grouped(3), "pca", "none", seed=0)
    found = fold_layer(StoredLayer(checkpoint, 0), plan, stats).report
    assert found is not None
    neighbours = [
        fold_energy(g, all_methods()["pca"].fold(g, torch.Generator()))
        for g in (heads.group(members, stats) for members in [[0, 1], [2, 3], [4, 5]])
    ]
    total = neighbours[0] + neighbours[1] + neighbours[2]
    captured = total.captured_value + total.captured_key
    assert found.captured_value + found.captured_key >= captured - 1e-9


def test_method_names_are_files() -> None:
    files = {path.stem for path in Path(methods.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(method_names()) == set(all_methods()) == files
    assert files >= {"aligned", "first", "mean", "pca", "random"}
    with pytest.raises(InputError) as error:
        check_method("maen")
    assert error.value.hint.startswith("did you mean mean?")


def test_a_method_makes_only_the_targets_that_it_declares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither by its name nor by way of auto is it asked for another."""
    grouped, other = all_methods()["pca"], replace(all_methods()["aligned"], targets=())
    chosen: dict[str, Method] = {"aligned": other, "pca": grouped}
    monkeypatch.setattr("kvfold.fold.methods.all_methods", lambda: chosen)
    assert methods_for("auto", Grouped(2), "none") == [grouped]
    with pytest.raises(UnsupportedError, match="aligned cannot make 2 KV heads") as error:
        fold_model(tiny.make("llama", num_key_value_heads=6), 2, "aligned", "none")
    assert "pca" in error.value.hint


def test_latents_with_gaps_are_fitted_from_elsewhere() -> None:
    """Where TransMLA begins; every other latent, and every closed form, is by our own method."""
    for latent, fit, expected in (
        (Latent(20, 4, 2), "local", "transmla"),
        (Latent(20, 4, 2), "none", "latent"),
        (Latent(20, 4), "local", "latent"),
        (Latent(20, 4), "refit", "latent"),
    ):
        assert [method.name for method in methods_for("auto", latent, fit)] == [expected]
    assert "transmla" not in {each.name for each in methods_for("auto", Grouped(2), "local")}


def test_every_divisor_works() -> None:
    model = tiny.make("llama", num_attention_heads=12, num_key_value_heads=12, hidden_size=96)
    ids = tiny.tokens()
    for kv_heads in (1, 2, 3, 4, 6):
        folded = fold_model(model, kv_heads, fit="none").model
        assert folded.config.num_key_value_heads == kv_heads
        assert torch.isfinite(tiny.logits(folded, ids)).all()


def test_fit_of_a_model_with_every_parameter_kind_improves_it() -> None:
    """Fused projections, biases, QK-norm, post-norms: the fit lowers the error on its text."""
    windows = tiny.tokens(16, 32, seed=5)
    for case in ("qwen2", "qwen3", "phi3", "gemma3_text", "gemma2", "phi", "granite", "cohere"):
        model = tiny.make(case, num_key_value_heads=6)
        expected = tiny.logits(model, windows).log_softmax(-1)
        divergence = []
        for fit in ("none", "refit", "local"):
            folded = fold_model(model, 2, "pca", fit, windows, fit_steps=60).model
            got = tiny.logits(folded, windows).log_softmax(-1)
            divergence.append(float((expected.exp() * (expected - got)).sum(-1).mean()))
        assert divergence[2] < divergence[0], (case, divergence)
