"""Every family against the transformers implementation, with tiny random models."""

from typing import Any

import pytest
import torch

from kvfold.arch.families import FAMILIES, REFUSALS, family_of
from kvfold.errors import UnsupportedError
from kvfold.fold.model import fold_model
from tests.toolbox import tiny

# float32 sums of these sizes, taken in another order, differ by about 1e-6 of the logits.
ORDER_OF_SUMS = 2e-5


def with_averaged_heads(model: Any) -> Any:
    """The same architecture with every KV head set to the mean of all."""
    heads = tiny.all_heads(model)
    for layer in heads:
        layer.k[:] = layer.k.mean(0)
        layer.v[:] = layer.v.mean(0)
    return tiny.with_kv_heads(model, heads)


def test_every_family_has_a_case() -> None:
    tried = {model_type for model_type, _ in tiny.EVERY.values()} | {"gpt2", "gpt_bigcode"}
    assert tried == tiny.every_model_type()


@pytest.mark.parametrize("case", tiny.EVERY)
def test_writing_what_was_read_changes_nothing(case: str) -> None:
    checkpoint = tiny.checkpoint_of(tiny.make(case))
    for layer in range(checkpoint.geometry.num_layers):
        weights = checkpoint.attention(layer)
        written = checkpoint.family.projections.write(checkpoint.attention_prefix(layer), weights)
        assert set(written) == set(checkpoint.attention_shapes(layer))
        for name, tensor in written.items():
            assert torch.equal(tensor, checkpoint.tensor(name)), name


@pytest.mark.parametrize("case", tiny.EVERY)
def test_mean_fold_is_the_source_with_averaged_heads(case: str) -> None:
    """transformers computes the same from fewer heads as from all heads set to their mean."""
    model = tiny.make(case)
    averaged = with_averaged_heads(model)
    folded = fold_model(model, 1, method="mean", fit="none").model
    assert tiny.kv_heads(folded) == 1
    ids = tiny.tokens()
    assert not torch.allclose(tiny.logits(model, ids), tiny.logits(folded, ids), atol=1e-2)
    torch.testing.assert_close(
        tiny.logits(folded, ids), tiny.logits(averaged, ids), atol=ORDER_OF_SUMS, rtol=1e-4
    )


@pytest.mark.parametrize("case", tiny.EVERY)
def test_refitting_leaves_no_layer_worse(case: str) -> None:
    """Of what it was solved on; a solution for the wrong target would be worse."""
    heads = 9 if case == "llama-odd" else 6
    model = tiny.make(case, num_key_value_heads=heads)
    windows = tiny.tokens(32, 32, seed=5)
    for layer in fold_model(model, 1, fit="refit", windows=windows).record:
        stages = {each["stage"]: each for each in layer["stages"]}
        for stage in stages.values():
            assert stage["error_after"] <= stage["error_before"]
        assert stages["refit_output"]["error_after"] < stages["refit_output"]["error_before"]


def test_mean_fold_of_gpt2_is_gpt_bigcode() -> None:
    model = tiny.build("gpt2", tiny.GPT2)
    averaged = with_averaged_heads(model)
    folded = fold_model(model, 1, method="mean", fit="none").model
    assert folded.config.model_type == "gpt_bigcode"
    ids = tiny.tokens()
    torch.testing.assert_close(
        tiny.logits(folded, ids), tiny.logits(averaged, ids), atol=ORDER_OF_SUMS, rtol=1e-4
    )


@pytest.mark.parametrize("case", ["llama", "phi3", "qwen3", "phi"])
def test_folding_to_the_same_number_is_bit_identical(case: str) -> None:
    model = tiny.make(case)
    folded = fold_model(model, 2, fit="none").model
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, folded.state_dict()[name]), name


@pytest.mark.parametrize("model_type", REFUSALS)
def test_refusals_say_why_and_what_to_do(model_type: str) -> None:
    with pytest.raises(UnsupportedError, match=model_type) as error:
        family_of({"model_type": model_type})
    assert error.value.hint


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "phi", "qk_layernorm": True}, "norm"),
        ({"model_type": "stablelm", "qk_layernorm": True}, "norm"),
        ({"model_type": "cohere", "use_qk_norm": True}, "norm"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "layer number"),
        ({"model_type": "gpt_bigcode", "multi_query": False}, "interleaved"),
        ({"model_type": "olmo", "clip_qkv": 8.0}, "clips"),
    ],
)
def test_variants_that_cannot_be_expressed_are_refused(
    config: dict[str, object], words: str
) -> None:
    with pytest.raises(UnsupportedError, match=words):
        family_of(config)


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(UnsupportedError) as error:
        family_of({"model_type": "lama"})
    assert "llama" in error.value.hint


def test_model_types_are_declared_once() -> None:
    names = [name for family in FAMILIES for name in family.model_types]
    assert len(names) == len(set(names))
    assert not set(names) & set(REFUSALS)
