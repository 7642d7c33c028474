"""Exported weights equal the trained ones, and an export for a program with another feature contract is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel

from musetalk.contract import CONTRACTS, ContractError
from musetalk.export import LAYOUTS, ExportConfig, main
from musetalk.models.trained_unet import load_trained_unet, read_unet_contract
from musetalk.models.unet import build_unet
from musetalk.training.checkpoint import save_unet

CONTRACT = replace(CONTRACTS["musetalk_v15"], vae="abc", audio_encoder="def")


@pytest.fixture(scope="module")
def unet(mini):
    return build_unet(mini, 5, positional_encoding=True)


def export(tmp_path: Path, mini: Path, unet, layout: str, contract=CONTRACT) -> tuple[Path, Path]:
    """Saves and exports a UNet. Returns the folder of the training and the exported weights."""
    run = save_unet(tmp_path / "run", 7, unet.model.state_dict(), contract).parent
    main(ExportConfig(run, layout, tmp_path / "out", mini))
    return run, tmp_path / "out" / LAYOUTS[layout][0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_has_the_trained_tensors_and_the_configuration(tmp_path, mini, unet, layout):
    contract_name = LAYOUTS[layout][2]
    contract = replace(CONTRACTS[contract_name or "rigid"], vae="abc", posterior="mode", encode_dtype="bfloat16")
    _, path = export(tmp_path, mini, unet, layout, contract)
    written = {
        file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*") if file.is_file()
    }
    assert written == set(LAYOUTS[layout][:2])
    description = (tmp_path / "out" / LAYOUTS[layout][1]).read_bytes()
    assert description == (mini / "musetalk/musetalk.json").read_bytes()

    own = unet.model.state_dict()
    if contract_name:  # as MuseTalk loads it
        tensors = torch.load(path, weights_only=True)
    else:
        tensors = safetensors.torch.load_file(path)
        assert read_unet_contract(path) == contract
    assert list(tensors) == list(own) if contract_name else tensors.keys() == own.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in own.items())
    again, _ = load_trained_unet(path, mini, contract)
    assert all(torch.equal(again.model.state_dict()[name], tensor) for name, tensor in own.items())


def test_diffusers_loads_an_exported_folder(tmp_path, mini, unet):
    _, path = export(tmp_path, mini, unet, "diffusers")
    model = UNet2DConditionModel.from_pretrained(path.parent).eval()
    x, tokens = torch.randn(1, 8, 32, 32), torch.randn(1, 50, 128)
    with torch.no_grad():
        outputs = [net(x, 0, encoder_hidden_states=tokens).sample for net in (model, unet.model.eval())]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)  # memory formats differ
    own = unet.model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("layout", "trained", "field"), [("musetalk_v15", "musetalk_v1", "margins"), ("original", "rigid", "crop")]
)
def test_weights_of_another_contract_are_refused(tmp_path, mini, unet, layout, trained, field):
    with pytest.raises(ContractError, match=f"{field} = .*{layout} needs"):
        export(tmp_path, mini, unet, layout, CONTRACTS[trained])
    assert not (tmp_path / "out").exists()


def test_loading_and_exporting_published_weights_does_not_change_them(tmp_path, mini, unet):
    published = tmp_path / "unet.pth"
    torch.save(unet.model.state_dict(), published)
    loaded, contract = load_trained_unet(published, mini, CONTRACT)
    _, path = export(tmp_path, mini, loaded, "musetalk_v15", contract)
    before, after = torch.load(published, weights_only=True), torch.load(path, weights_only=True)
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
