"""Names of checkpoints and of transformers' modules, in both directions."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from kvfold.arch.families import BY_TYPE
from kvfold.arch.parameters import StoredNames
from tests.toolbox import tiny


@pytest.mark.parametrize("case", [*tiny.CASES, "gpt2"])
@pytest.mark.parametrize("with_base", [True, False])
def test_names_go_there_and_back(case: str, with_base: bool) -> None:
    """Also as old GPT-2 checkpoints have them: without the base model's name."""
    model = tiny.build("gpt2", tiny.GPT2) if case == "gpt2" else tiny.make(case)
    base = tiny.checkpoint_of(model).family.base
    own = list(model.state_dict())
    stored = own if with_base else [name.removeprefix(f"{base}.") for name in own]
    names = StoredNames(base, stored)
    assert [names.to_module(name) for name in stored] == own
    assert [names.to_stored(name) for name in own] == stored
    assert [names.find(name) for name in own] == stored
    assert names.find(f"{base}.nothing.weight") is None
    assert names.find("nothing.weight") is None


@pytest.mark.parametrize(
    "case",
    ["mixtral", "qwen2_moe", "granitemoe", "phimoe", "dots1", "ernie4_5_moe", "deepseek_v3"],
)
def test_experts_are_stored_one_by_one(case: str, tmp_path: Path) -> None:
    """What transformers writes is what the module's tensors are made of, shapes too."""
    unfoldable = tiny.UNFOLDABLE.get(case)
    model = tiny.build(case, unfoldable) if unfoldable else tiny.make(case)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    names = StoredNames("model", stored, BY_TYPE[case].renamed)
    state = model.state_dict()
    made_of = {name: names.parts(name, tuple(tensor.shape)) for name, tensor in state.items()}
    together = {part: shape for parts in made_of.values() for part, shape in parts.items()}
    assert together == {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert all(names.to_module(part) == name for name, parts in made_of.items() for part in parts)
    assert max(len(parts) for parts in made_of.values()) > 4 or case == "granitemoe"


@pytest.mark.parametrize("case", [*tiny.EVERY, "gpt2"])
def test_layers_and_attention_are_found_in_the_module(case: str) -> None:
    model = tiny.build("gpt2", tiny.GPT2) if case == "gpt2" else tiny.make(case)
    checkpoint = tiny.checkpoint_of(model)
    layer, attention = (f() for f in (checkpoint.family.decoder_layers,
                                      checkpoint.family.attention_parameters))  # fmt: skip
    layers = [name for name, _ in model.named_modules() if layer.search(name)]
    assert layers == [checkpoint.layer_prefix(i) for i in range(checkpoint.geometry.num_layers)]
    inside = {name for name, _ in model.named_parameters() if attention.search(name)}
    shapes = {name for i in range(len(layers)) for name in checkpoint.attention_shapes(i)}
    assert shapes <= inside
    assert all(any(name.startswith(path + ".") for path in layers) for name in inside)
