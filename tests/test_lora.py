"""LoRA trains the attention's factors alone; its adapter and the merged weights are the same network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from musetalk.contract import RIGID
from musetalk.models.lora import choose_trained, factors, merge, trained_tensors
from musetalk.models.unet import UNet, load_unet
from musetalk.training.checkpoint import save_adapter, save_unet
from tests.processes import small_unet

PROJECTIONS = (".to_q", ".to_k", ".to_v", ".to_out.0")
RANK = 3


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 8, 32, 32), torch.randn(2, 50, 4)


def lora_unet(seed: int = 0) -> UNet:
    unet = small_unet(width=4)
    choose_trained(unet.model, "lora", RANK, seed)
    return unet


def update(unet: UNet, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Makes two updates: in the first, A has no gradient, since B is zero."""
    optimizer = torch.optim.Adam([x for x in unet.parameters() if x.requires_grad], lr=0.1)
    for _ in range(2):
        unet(*inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_all_of_a_network_is_trained_or_its_attention_alone():
    unet = small_unet(width=4)
    choose_trained(unet.model, "all", RANK, 0)
    assert trained_tensors(unet.model).keys() == unet.model.state_dict().keys()
    choose_trained(unet.model, "attention", RANK, 0)
    names = trained_tensors(unet.model).keys()
    assert names == {name for name in unet.model.state_dict() if ".attn1." in name or ".attn2." in name}
    assert names and not factors(unet.model.state_dict())


def test_the_factors_are_seeded_and_change_nothing_at_first(inputs):
    unet, plain = lora_unet(), small_unet(width=4)
    tensors = unet.model.state_dict()
    names = {name.partition(".lora_")[0] for name in trained_tensors(unet.model)}
    assert names == {
        name.removesuffix(".weight")
        for name in plain.model.state_dict()
        if name.removesuffix(".weight").endswith(PROJECTIONS)
    }
    assert trained_tensors(unet.model).keys() == factors(tensors).keys()
    assert {tensor.shape[0 if "lora_A" in name else 1] for name, tensor in factors(tensors).items()} == {RANK}
    assert tensors.keys() - factors(tensors).keys() == plain.model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(unet(*inputs), plain(*inputs))
    a = [factors(lora_unet(seed).model.state_dict()) for seed in (0, 1)]
    assert all(torch.equal(tensors[name], value) for name, value in a[0].items())
    assert all(torch.equal(tensors[name], value) == ("lora_B" in name) for name, value in a[1].items())


def test_only_factors_change_and_the_merged_network_is_the_same(inputs):
    unet, plain = lora_unet(), small_unet(width=4)
    before = {name: value.clone() for name, value in unet.model.state_dict().items()}
    update(unet, inputs)
    after = unet.model.state_dict()
    assert {name for name in after if not torch.equal(before[name], after[name])} == factors(after).keys()
    with torch.no_grad():
        adapted = unet(*inputs)
        assert not torch.equal(adapted, plain(*inputs))
        plain.model.load_state_dict(merge(after))
        assert torch.equal(adapted, plain(*inputs))


def test_base_and_adapter_make_the_merged_file(inputs, tmp_path):
    unet, base = lora_unet(), small_unet(width=4).model.state_dict()
    update(unet, inputs)
    tensors = unet.model.state_dict()
    merged = load_file(save_unet(tmp_path, 7, tensors, RIGID))
    path = save_adapter(tmp_path, 7, factors(tensors), RANK)
    adapter = load_file(path)
    assert path.name == "adapter-0000007.safetensors" and merged.keys() == base.keys()
    for name, weight in base.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in adapter:
            weight = weight + adapter[f"{layer}.lora_B.weight"] @ adapter[f"{layer}.lora_A.weight"]
        assert torch.equal(merged[name], weight)
    with safetensors.safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["lora_adapter_metadata"])  # diffusers passes it to peft's LoraConfig
    assert description["r"] == description["lora_alpha"] == RANK
    assert {f"{layer}.lora_{x}.weight" for layer in description["target_modules"] for x in "AB"} == adapter.keys()


def test_merged_weights_are_loaded_like_any_others(mini, tmp_path):
    unet = load_unet(mini, mini / "musetalk/unet.safetensors", positional_encoding=True)
    choose_trained(unet.model, "lora", RANK, 0)
    path = save_unet(tmp_path, 1, unet.model.state_dict(), RIGID)
    assert load_unet(mini, Path(path), positional_encoding=True).model.state_dict().keys() == load_file(path).keys()
