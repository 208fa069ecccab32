"""Every trained tensor is written and every written tensor was in the model, or it is told."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvfold import convert, heal
from kvfold.checkpoint.source import Checkpoint, TensorDict, open_checkpoint
from kvfold.errors import RunError
from kvfold.healing.models import load_student, without_lora
from kvfold.healing.placing import check_places, healed_tensors, take_trained
from kvfold.healing.request import HealRequest
from kvfold.healing.saves import trained_tensors
from tests.toolbox import tiny

Make = Callable[[], Any]
FAMILIES: dict[str, Make] = {
    **{name: partial(tiny.make, name) for name in tiny.CASES},
    "gpt2": lambda: tiny.build("gpt2", tiny.GPT2),
    "gpt_bigcode": tiny.make_bigcode,
}


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def change_weights(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def bare(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As old GPT-2 checkpoints: without the base model's name."""
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def request_of(folder: Path, **options: Any) -> HealRequest:
    return HealRequest.asked(
        folded=folder, teacher=folder, texts=["text"], stages=["kl"], **options
    )


def trained_student(request: HealRequest) -> dict[str, torch.Tensor]:
    """What training leaves, where every weight that is trained has become larger by one."""
    student = load_student(request)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter += 1
    return trained_tensors(student)


def written(request: HealRequest, trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(request.folded)
    model = load_student(request)
    take_trained(model, trained)
    read = healed_tensors(checkpoint, without_lora(model), trained)
    return {name: read(name) for name in checkpoint.names}


ALL = [*((family, "full") for family in FAMILIES), ("gpt2", "bare"), ("gpt_bigcode", "bare")]


@pytest.mark.parametrize(("family", "names"), ALL)
def test_every_trained_tensor_is_written(family: str, names: str, tmp_path: Path) -> None:
    folder = saved(FAMILIES[family](), tmp_path / "folded")
    if names == "bare":
        change_weights(folder, bare)
    check_places(open_checkpoint(folder))
    request = request_of(folder, train="all")
    student = load_student(request)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 1
    wanted = load_file(saved(student, tmp_path / "wanted") / "model.safetensors")
    wanted = bare(wanted) if names == "bare" else wanted
    found = written(request, trained_student(request))
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name


def test_lora_is_written_where_it_was_merged(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = saved(tiny.make("llama"), tmp_path / "folded")
    request = request_of(folder, lora_rank=2)
    before = load_file(folder / "model.safetensors")
    after = written(request, trained_student(request))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "self_attn" in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tensor_that_the_model_lacks_is_told_before_training(family: str, tmp_path: Path) -> None:
    folder = saved(FAMILIES[family](), tmp_path / "folded")
    change_weights(folder, lambda tensors: tensors | {"value_head.weight": torch.ones(2)})
    with pytest.raises(RunError, match=r"value_head\.weight"):
        check_places(open_checkpoint(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_tensor_without_a_place_is_told(family: str, tmp_path: Path) -> None:
    folder = saved(FAMILIES[family](), tmp_path / "folded")
    request = request_of(folder, train="all")
    trained = trained_student(request)
    model, whole = load_student(request), open_checkpoint(folder)
    lost = next(name for name in sorted(trained) if "mlp" in name)
    of = whole.stored_names.to_module
    left = {name: whole.tensor(name) for name in whole.names if of(name) != lost}
    with pytest.raises(RunError, match=f"takes up the trained {lost}"):
        healed_tensors(Checkpoint("cut", whole.config, TensorDict(left)), model, trained)
    with pytest.raises(RunError, match="other would be lost"):
        take_trained(model, trained | {"other": torch.ones(1)})
    with pytest.raises(RunError, match=f"{lost} would be lost"):
        take_trained(model, {name: trained[name] for name in trained if name != lost})


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("gpt_bigcode", "transformer.h.1.attn.bias"),
    ],
)
def test_tables_of_older_files_are_kept_as_they_are(family: str, name: str, tmp_path: Path) -> None:
    folder = saved(FAMILIES[family](), tmp_path / "folded")
    table = torch.arange(3.0)
    change_weights(folder, lambda tensors: tensors | {name: table})
    request = request_of(folder)
    assert torch.equal(written(request, trained_student(request))[name], table)


def test_a_checkpoint_without_the_base_models_name_is_healed(tmp_path: Path) -> None:
    """Layer by layer and as a whole."""
    source = tiny.save_with_tokenizer(tiny.build("gpt2", tiny.GPT2), tmp_path / "source")
    change_weights(source, bare)
    folded, out, text = tmp_path / "folded", tmp_path / "out", tmp_path / "text"
    convert(source, folded, 1, calibrate=False)
    text.write_text("\n\n".join(tiny.words(300, seed) for seed in range(20)))
    options: dict[str, Any] = {
        "tokens": 256, "batch_tokens": 128, "context": 64, "held_out_tokens": 64, "lr": 1e-2,
        "local_tokens": 1024, "eval_texts": [],
    }  # fmt: skip
    heal(folded, out, source, [text], stages=["local", "kl"], **options)
    before, after = (load_file(path / "model.safetensors") for path in (folded, out))
    assert before.keys() == after.keys()
    attention = {name for name in before if ".attn." in name}
    assert all(not torch.equal(before[name], after[name]) for name in attention)
