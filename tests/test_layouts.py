"""The models folders of MuseTalk v1.5, v1.0 and MuseTalkTrainer, with seeded random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from hostile import refusal
from test_audio_encoder import TINY, save_hugging_face, save_openai, whisper
from torch import nn

from musetalk.contract import MUSETALK_V15
from musetalk.data.face.dwpose import RTMPose
from musetalk.export import ExportConfig
from musetalk.export import main as export
from musetalk.files import read_json
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models.face_parser import BiSeNet
from musetalk.models.unet import build_unet, load_unet
from musetalk.models.vae import load_vae
from musetalk.models.weights import fingerprint
from musetalk.training.checkpoint import save_unet

CPU = torch.device("cpu")
# Name -> folder of the VAE, format of Whisper, file of the UNet, contract.
LAYOUTS = {
    "v1.5": ("sd-vae", "hugging face", "musetalkV15/unet.pth", "musetalk_v15"),
    "v1.0": ("sd-vae-ft-mse", "openai", "musetalk/pytorch_model.bin", "musetalk_v1"),
    "MuseTalkTrainer": ("sd-vae-ft-mse", "openai", "musetalk/cunet.bin", "musetalk_v1"),
}


@pytest.fixture(scope="module")
def networks(small_models) -> dict[str, nn.Module]:
    """Networks with random weights: a small VAE and UNet, the others of the published sizes."""
    torch.manual_seed(1)  # not those of small_models
    unet = json.loads((small_models / "musetalk/musetalk.json").read_text()) | {"cross_attention_dim": TINY[2]}
    return {
        "vae": AutoencoderKL.from_config(json.loads((small_models / "sd-vae-ft-mse/config.json").read_text())),
        "whisper": whisper(TINY),
        "unet": UNet2DConditionModel.from_config(unet),
        "dwpose": RTMPose(),
        "parser": BiSeNet(),
    }


@pytest.fixture(scope="module")
def lay_out(networks, tmp_path_factory) -> Callable[[str], Path]:
    """Returns a function that creates a models folder with a layout of `LAYOUTS`."""
    shared = tmp_path_factory.mktemp("shared")
    for name in ("dwpose", "parser"):
        torch.save(networks[name].state_dict(), shared / name)

    def make(layout: str) -> Path:
        folder, (vae, whisper_format, unet, _) = tmp_path_factory.mktemp("models"), LAYOUTS[layout]
        for name in (vae, unet, "dwpose/x", "face-parse-bisent/x"):
            (folder / name).parent.mkdir(exist_ok=True)
        networks["vae"].save_config(folder / vae)
        torch.save(networks["vae"].state_dict(), folder / vae / "diffusion_pytorch_model.bin")
        networks["unet"].save_config(folder / "config")
        (folder / "config/config.json").rename((folder / unet).with_name("musetalk.json"))
        torch.save(networks["unet"].state_dict(), folder / unet)
        save = save_hugging_face if whisper_format == "hugging face" else save_openai
        save(networks["whisper"].state_dict(), TINY, folder)
        (folder / "dwpose/dw-ll_ucoco_384.pth").symlink_to(shared / "dwpose")
        (folder / "face-parse-bisent/79999_iter.pth").symlink_to(shared / "parser")
        (folder / "face-parse-bisent/resnet18-5c106cde.pth").write_bytes(b"not read")
        return folder

    yield make
    for path in shared.iterdir():
        path.unlink()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_works(lay_out, networks, layout):
    folder, (_, _, unet, contract) = lay_out(layout), LAYOUTS[layout]
    pipeline = LipSyncPipeline.from_checkpoint(folder / unet, folder, "dwpose", contract, blend="jaw")
    assert pipeline.vae.fingerprint == fingerprint(networks["vae"])
    assert pipeline.audio_encoder.fingerprint == fingerprint(networks["whisper"])
    assert pipeline.audio_encoder.shape == (5, 384)
    assert fingerprint(pipeline.unet.model) == fingerprint(networks["unet"])
    assert fingerprint(pipeline.backend.network) == fingerprint(networks["dwpose"])
    assert fingerprint(pipeline.face_parser.network) == fingerprint(networks["parser"])


def test_a_unet_is_built_and_exported_with_the_configuration_of_v15(lay_out, tmp_path):
    folder = lay_out("v1.5")
    unet = build_unet(folder, 0, True)
    path = save_unet(tmp_path, 1, unet.model.state_dict(), MUSETALK_V15)
    export(ExportConfig(path, "musetalk_v15", tmp_path, folder))
    assert fingerprint(load_unet(folder, tmp_path / "musetalkV15/unet.pth", True).model) == fingerprint(unet.model)
    assert read_json(tmp_path / "musetalkV15/musetalk.json") == read_json(folder / "musetalkV15/musetalk.json")
    (folder / "musetalk").mkdir()
    (folder / "musetalk/musetalk.json").write_text("{")
    refusal(lambda: build_unet(folder, 0, True), "musetalk/musetalk.json cannot be read")


def test_the_safetensors_of_v10_take_precedence_among_vaes(lay_out, small_models):
    folder = lay_out("v1.5")
    v10 = folder / "sd-vae-ft-mse"
    shutil.copytree(small_models / "sd-vae-ft-mse", v10)
    expected = load_vae(small_models, CPU, torch.float32).fingerprint
    assert load_vae(folder, CPU, torch.float32).fingerprint == expected
    (v10 / "diffusion_pytorch_model.safetensors").unlink()
    assert load_vae(folder, CPU, torch.float32).fingerprint != expected


@pytest.mark.parametrize("sizes", [(80, 1500, 512, 8, 6), (80, 1500, 384, 6, 6)], ids=["width", "states"])
def test_a_whisper_that_does_not_fit_a_published_unet_is_refused(lay_out, sizes):
    """The published UNets carry no contract, which would name the Whisper of their training."""
    folder, (_, _, unet, contract) = lay_out("v1.5"), LAYOUTS["v1.5"]
    save_hugging_face(whisper(sizes).state_dict(), sizes, folder)
    pipeline = LipSyncPipeline.from_checkpoint(folder / unet, folder, "dwpose", contract)
    message = refusal(lambda: pipeline.audio_encoder, str(folder))
    assert f"has 7 states of width {sizes[2]}, but the UNet expects 5 of width 384" in message
