"""The models folders of MuseTalk v1.5, v1.0 and MuseTalkTrainer, with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from whisper.model import AudioEncoder, ModelDimensions

from musetalk.contract import MUSETALK_V15
from musetalk.data.face.dwpose import RTMPose
from musetalk.export import ExportConfig
from musetalk.export import main as export
from musetalk.files import read_json
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models.audio_encoder import build_encoder, load_audio_encoder
from musetalk.models.face_parser import BiSeNet
from musetalk.models.unet import build_unet, load_unet
from musetalk.models.vae import load_vae
from musetalk.models.weights import WeightsError, fingerprint
from musetalk.training.checkpoint import save_unet

CPU = torch.device("cpu")
TINY = (80, 1500, 384, 6, 4)  # mel bins, states of 30 s, width, heads, layers
LAYOUTS = {
    "v1.5": ("sd-vae", "hugging face", "musetalkV15/unet.pth", "musetalk_v15"),
    "v1.0": ("sd-vae-ft-mse", "openai", "musetalk/pytorch_model.bin", "musetalk_v1"),
    "MuseTalkTrainer": ("sd-vae-ft-mse", "openai", "musetalk/cunet.bin", "musetalk_v1"),
}


def dimensions(sizes: tuple) -> dict[str, int]:
    names = ("n_mels", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer")
    text = dict.fromkeys(("n_vocab", "n_text_ctx", "n_text_state", "n_text_head", "n_text_layer"), 1)
    return dict(zip(names, sizes, strict=True)) | text


def whisper(sizes: tuple, seed: int = 0) -> AudioEncoder:
    torch.manual_seed(seed)
    return build_encoder(ModelDimensions(**dimensions(sizes)))


def hugging_face_names(layers: int) -> dict[str, str]:
    """Parameter names of an encoder: openai-whisper -> transformers' WhisperEncoder."""
    names = {f"{conv}.{kind}": f"{conv}.{kind}" for conv in ("conv1", "conv2") for kind in ("weight", "bias")}
    names |= {"positional_embedding": "embed_positions.weight"}
    parts = {"attn.query": "self_attn.q_proj", "attn.value": "self_attn.v_proj", "attn.out": "self_attn.out_proj"}
    parts |= {"attn.key": "self_attn.k_proj", "attn_ln": "self_attn_layer_norm", "mlp_ln": "final_layer_norm"}
    parts |= {"mlp.0": "fc1", "mlp.2": "fc2"}
    for layer in range(layers):
        for openai, second in parts.items():
            for kind in ("weight",) if openai == "attn.key" else ("weight", "bias"):
                names[f"blocks.{layer}.{openai}.{kind}"] = f"layers.{layer}.{second}.{kind}"
    return names | {f"ln_post.{kind}": f"layer_norm.{kind}" for kind in ("weight", "bias")}


def save_openai(tensors: dict, sizes: tuple, folder: Path, name: str = "tiny.pt") -> None:
    (folder / "whisper").mkdir(parents=True, exist_ok=True)
    tensors = {f"encoder.{name}": tensor for name, tensor in tensors.items()} | {"decoder.ln.bias": torch.ones(1)}
    torch.save({"dims": dimensions(sizes), "model_state_dict": tensors}, folder / "whisper" / name)


def save_hugging_face(
    tensors: dict, sizes: tuple, folder: Path, prefix: str = "model.", change: Callable[[dict], object] = len
) -> None:
    """Saves like transformers' WhisperForConditionalGeneration (prefix "model.") or WhisperModel ("")."""
    (folder / "whisper").mkdir(parents=True, exist_ok=True)
    names, shared = hugging_face_names(sizes[-1]), torch.ones(3, 2)
    values = {f"{prefix}encoder.{names[name]}": tensor for name, tensor in tensors.items()}
    values |= {f"{prefix}decoder.embed_tokens.weight": shared, "proj_out.weight": shared}  # one tensor in two places
    change(values)
    torch.save(values, folder / "whisper" / "pytorch_model.bin")
    keys = ("num_mel_bins", "max_source_positions", "d_model", "encoder_attention_heads", "encoder_layers")
    config = {"model_type": "whisper", "decoder_layers": 4} | dict(zip(keys, sizes, strict=True))
    (folder / "whisper" / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def networks(mini) -> dict[str, nn.Module]:
    """Random networks: VAE and UNet small, the others of the published sizes."""
    torch.manual_seed(0)
    unet = json.loads((mini / "musetalk/musetalk.json").read_text()) | {"cross_attention_dim": TINY[2]}
    return {
        "vae": AutoencoderKL.from_config(json.loads((mini / "sd-vae-ft-mse/config.json").read_text())),
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
        (folder / "face-parse-bisent/resnet18-5c106cde.pth").write_bytes(b"of no use here")
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


def test_the_configuration_of_v15_suffices_to_build_and_export_a_unet(lay_out, tmp_path):
    folder = lay_out("v1.5")
    unet = build_unet(folder, 0, True)
    path = save_unet(tmp_path, 1, unet.model.state_dict(), MUSETALK_V15)
    export(ExportConfig(path, "musetalk_v15", tmp_path, folder))
    assert fingerprint(load_unet(folder, tmp_path / "musetalkV15/unet.pth", True).model) == fingerprint(unet.model)
    assert read_json(tmp_path / "musetalkV15/musetalk.json") == read_json(folder / "musetalkV15/musetalk.json")
    (folder / "musetalk").mkdir()
    (folder / "musetalk/musetalk.json").write_text("{")
    with pytest.raises(ValueError, match="musetalk/musetalk.json cannot be read"):
        build_unet(folder, 0, True)


def test_the_safetensors_of_v10_take_precedence_among_vaes(lay_out, mini):
    folder = lay_out("v1.5")
    (folder / "sd-vae-ft-mse").mkdir()
    (folder / "sd-vae-ft-mse/config.json").symlink_to(mini / "sd-vae-ft-mse/config.json")
    before = load_vae(folder, CPU, torch.float32).fingerprint  # the new folder has no weights yet, as in the repository
    name = "sd-vae-ft-mse/diffusion_pytorch_model.safetensors"
    (folder / name).symlink_to(mini / name)
    after = load_vae(folder, CPU, torch.float32).fingerprint
    assert before != after == load_vae(mini, CPU, torch.float32).fingerprint


# Whisper.


SMALL = (80, 1500, 16, 2, 2)


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("half", [True, False])
def test_both_formats_of_an_encoder_have_the_same_fingerprint(tmp_path, prefix, half):
    tensors = whisper(SMALL).state_dict()
    tensors = {name: tensor.half() if half else tensor for name, tensor in tensors.items()}
    save_openai(tensors, SMALL, tmp_path / "a")
    save_hugging_face(tensors, SMALL, tmp_path / "b", prefix)
    first, second = (load_audio_encoder(tmp_path / name, CPU) for name in "ab")
    assert first.fingerprint == second.fingerprint and first.shape == second.shape == (3, 16)
    mel = torch.randn(80, 3000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first(mel, True), second(mel, True))


def test_openais_file_takes_precedence_and_two_sizes_are_refused(tmp_path):
    save_openai(whisper(SMALL, 1).state_dict(), SMALL, tmp_path, "base.pt")
    save_hugging_face(whisper(SMALL, 2).state_dict(), SMALL, tmp_path)
    assert load_audio_encoder(tmp_path, CPU).fingerprint == fingerprint(whisper(SMALL, 1))
    save_openai(whisper(SMALL, 1).state_dict(), SMALL, tmp_path, "tiny.pt")
    with pytest.raises(WeightsError, match="whisper contains base.pt and tiny.pt"):
        load_audio_encoder(tmp_path, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("model.encoder.layers.1.fc1.bias"), "1 missing: blocks.1.mlp.0.bias"),
        (lambda values: values.update({"model.encoder.x": torch.ones(1)}), "1 unexpected: model.encoder.x"),
        (
            lambda values: values.update({"model.encoder.blocks.0.mlp.0.bias": torch.ones(64)}),
            "1 unexpected: model.encoder.blocks.0.mlp.0.bias",
        ),
        (
            lambda values: values.update({"model.encoder.layer_norm.bias": torch.ones(8)}),
            r"1 wrongly shaped: ln_post.bias \(8,\) instead of \(16,\)",
        ),
        (lambda values: [values.pop(name) for name in list(values) if "encoder." in name], "contains no encoder"),
    ],
    ids=["missing", "unexpected", "openai's name", "misshapen", "none"],
)
def test_hugging_faces_names_are_loaded_strictly(tmp_path, change, message):
    save_hugging_face(whisper(SMALL).state_dict(), SMALL, tmp_path, change=change)
    with pytest.raises(WeightsError, match=f"pytorch_model.bin .*{message}"):
        load_audio_encoder(tmp_path, CPU)


def test_an_invalid_configuration_is_refused_by_name(tmp_path):
    save_hugging_face(whisper(SMALL).state_dict(), SMALL, tmp_path)
    path = tmp_path / "whisper/config.json"
    config = json.loads(path.read_text())
    for values, message in (
        (config | {"num_mel_bins": 81}, "not describe a Whisper encoder: 81 mel bins"),
        (config | {"encoder_layers": "2"}, "does not describe a Whisper encoder"),
        ({"d_model": 16}, "num_mel_bins, max_source_positions.* missing"),
    ):
        path.write_text(json.dumps(values))
        with pytest.raises(WeightsError, match=f"whisper/config.json .*{message}"):
            load_audio_encoder(tmp_path, CPU)
    path.unlink()
    with pytest.raises(ValueError, match="whisper/config.json cannot be read"):
        load_audio_encoder(tmp_path, CPU)


@pytest.mark.parametrize("save", [save_openai, save_hugging_face])
@pytest.mark.parametrize(
    "sizes",
    [TINY, (80, 1500, 512, 8, 6), (80, 1500, 768, 12, 12), (128, 1500, 1280, 20, 32)],
    ids=["tiny", "base", "small", "large-v3"],
)
def test_an_encoder_of_any_size_is_loaded(tmp_path, sizes, save, monkeypatch):
    """With expanded tensors, which take one element of memory each."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in whisper(sizes).state_dict().items()}
    save({name: torch.ones(()).expand(shape) for name, shape in shapes.items()}, sizes, tmp_path)
    monkeypatch.setattr("musetalk.models.audio_encoder.fingerprint", lambda _: "of 2.5 GB at most")
    encoder = load_audio_encoder(tmp_path, CPU)
    assert encoder.shape == (sizes[4] + 1, sizes[2]) and encoder.mel_bins == sizes[0]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((80, 1500, 512, 8, 6), "7 states of width 512"), ((80, 1500, 384, 6, 6), "7 states of width 384")],
    ids=["width", "states"],
)
def test_a_whisper_that_does_not_fit_a_published_unet_is_refused(lay_out, sizes, message):
    folder, (_, _, unet, contract) = lay_out("v1.5"), LAYOUTS["v1.5"]
    save_hugging_face(whisper(sizes).state_dict(), sizes, folder)
    pipeline = LipSyncPipeline.from_checkpoint(folder / unet, folder, "dwpose", contract)
    with pytest.raises(WeightsError, match=f"the Whisper in .* has {message}, but the UNet expects 5 of width 384"):
        _ = pipeline.audio_encoder
