"""Files of Whisper's encoder, from openai-whisper and from Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hostile import refusal
from whisper.model import AudioEncoder, ModelDimensions

from musetalk.models.audio_encoder import build_encoder, load_audio_encoder
from musetalk.models.weights import fingerprint

CPU = torch.device("cpu")
SMALL = (80, 1500, 16, 2, 2)  # mel bins, states of 30 s, width, heads, layers
TINY = (80, 1500, 384, 6, 4)
LARGE_V3 = (128, 1500, 1280, 20, 32)


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
        for openai, hugging_face in parts.items():
            for kind in ("weight",) if openai == "attn.key" else ("weight", "bias"):
                names[f"blocks.{layer}.{openai}.{kind}"] = f"layers.{layer}.{hugging_face}.{kind}"
    return names | {f"ln_post.{kind}": f"layer_norm.{kind}" for kind in ("weight", "bias")}


def save_openai(tensors: dict, sizes: tuple, folder: Path, name: str = "tiny.pt", **changes: object) -> Path:
    """Saves like openai-whisper. changes: of the dimensions. Returns the path."""
    (folder / "whisper").mkdir(parents=True, exist_ok=True)
    tensors = {f"encoder.{name}": tensor for name, tensor in tensors.items()} | {"decoder.ln.bias": torch.ones(1)}
    path = folder / "whisper" / name
    torch.save({"dims": dimensions(sizes) | changes, "model_state_dict": tensors}, path)
    return path


def save_hugging_face(
    tensors: dict, sizes: tuple, folder: Path, prefix: str = "model.", change: Callable[[dict], object] = len
) -> Path:
    """Saves like transformers' WhisperForConditionalGeneration (prefix "model.") or WhisperModel (""). Returns the
    path."""
    (folder / "whisper").mkdir(parents=True, exist_ok=True)
    names, shared = hugging_face_names(sizes[-1]), torch.ones(3, 2)
    values = {f"{prefix}encoder.{names[name]}": tensor for name, tensor in tensors.items()}
    values |= {f"{prefix}decoder.embed_tokens.weight": shared, "proj_out.weight": shared}  # two names of one tensor
    change(values)
    torch.save(values, folder / "whisper" / "pytorch_model.bin")
    keys = ("num_mel_bins", "max_source_positions", "d_model", "encoder_attention_heads", "encoder_layers")
    config = {"model_type": "whisper", "decoder_layers": 4} | dict(zip(keys, sizes, strict=True))
    (folder / "whisper" / "config.json").write_text(json.dumps(config))
    return folder / "whisper" / "pytorch_model.bin"


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_both_formats_of_an_encoder_have_the_same_fingerprint_and_output(tmp_path, prefix):
    tensors = {name: tensor.half() for name, tensor in whisper(SMALL).state_dict().items()}
    save_openai(tensors, SMALL, tmp_path / "a")
    save_hugging_face(tensors, SMALL, tmp_path / "b", prefix)
    first, second = (load_audio_encoder(tmp_path / name, CPU) for name in "ab")
    assert first.fingerprint == second.fingerprint and first.shape == second.shape == (3, 16)
    mel = torch.randn(80, 3000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first(mel, True), second(mel, True))


def test_openais_file_takes_precedence_and_two_of_them_are_refused(tmp_path):
    save_openai(whisper(SMALL, 1).state_dict(), SMALL, tmp_path, "base.pt")
    save_hugging_face(whisper(SMALL, 2).state_dict(), SMALL, tmp_path)
    assert load_audio_encoder(tmp_path, CPU).fingerprint == fingerprint(whisper(SMALL, 1))
    save_openai(whisper(SMALL, 1).state_dict(), SMALL, tmp_path, "tiny.pt")
    refusal(lambda: load_audio_encoder(tmp_path, CPU), "whisper contains base.pt and tiny.pt")


@pytest.mark.parametrize("save", [save_openai, save_hugging_face])
@pytest.mark.parametrize("sizes", [TINY, LARGE_V3], ids=["tiny", "large-v3"])
def test_an_encoder_of_any_published_size_is_loaded(tmp_path, sizes, save, monkeypatch):
    """With expanded tensors, each of which takes the memory of one element."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in whisper(sizes).state_dict().items()}
    save({name: torch.ones(()).expand(shape) for name, shape in shapes.items()}, sizes, tmp_path)
    monkeypatch.setattr("musetalk.models.audio_encoder.fingerprint", lambda _: "would read 2.5 GB")
    encoder = load_audio_encoder(tmp_path, CPU)
    assert encoder.shape == (sizes[4] + 1, sizes[2]) and encoder.mel_bins == sizes[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"n_mels": 81},
        {"n_audio_ctx": 0},
        {"n_audio_state": 7},
        {"n_audio_state": "16"},
        {"n_audio_layer": 3},
        {"n_more": 1},
    ],
    ids=repr,
)
def test_dimensions_of_another_encoder_are_refused(tmp_path, changes):
    path = save_openai(whisper(SMALL).state_dict(), SMALL, tmp_path, **changes)
    refusal(lambda: load_audio_encoder(tmp_path, CPU), str(path))


@pytest.mark.parametrize("tensors", [None, {}, {"encoder.x": 3}], ids=repr)
def test_a_checkpoint_without_an_encoder_is_refused(tmp_path, tensors):
    path = tmp_path / "whisper" / "tiny.pt"
    path.parent.mkdir()
    torch.save({"dims": dimensions(SMALL), "model_state_dict": tensors}, path)
    refusal(lambda: load_audio_encoder(tmp_path, CPU), str(path))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda values: values.pop("model.encoder.layers.1.fc1.bias"), "1 missing: blocks.1.mlp.0.bias"),
        (
            lambda values: values.update({"model.encoder.blocks.0.mlp.0.bias": torch.ones(64)}),
            "1 unexpected: model.encoder.blocks.0.mlp.0.bias",
        ),
        (
            lambda values: values.update({"model.encoder.layer_norm.bias": torch.ones(8)}),
            "1 wrongly shaped: ln_post.bias (8,) instead of (16,)",
        ),
        (lambda values: [values.pop(name) for name in list(values) if "encoder." in name], "contains no encoder"),
    ],
    ids=["missing", "openai's name", "shape", "no encoder"],
)
def test_hugging_faces_names_are_loaded_strictly(tmp_path, change, fault):
    path = save_hugging_face(whisper(SMALL).state_dict(), SMALL, tmp_path, change=change)
    assert fault in refusal(lambda: load_audio_encoder(tmp_path, CPU), str(path))


def test_an_unsuitable_configuration_is_refused_by_name(tmp_path):
    path = save_hugging_face(whisper(SMALL).state_dict(), SMALL, tmp_path).with_name("config.json")
    config = json.loads(path.read_text())
    for values in (config | {"num_mel_bins": 81}, config | {"encoder_layers": "2"}, {"d_model": 16}):
        path.write_text(json.dumps(values))
        refusal(lambda: load_audio_encoder(tmp_path, CPU), f"{path} does not describe a Whisper encoder")
    path.unlink()
    refusal(lambda: load_audio_encoder(tmp_path, CPU), f"{path} cannot be read")
