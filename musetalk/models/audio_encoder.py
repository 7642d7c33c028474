"""The frozen audio encoder: Whisper's encoder of any size. MuseTalk uses all of its hidden states.

A models folder holds the weights in the format of openai-whisper (whisper/<size>.pt) or of Hugging Face
(whisper/config.json with pytorch_model.bin or model.safetensors). If both are present, openai-whisper's is used.
"""

from __future__ import annotations

from pathlib import Path

import torch
from whisper.model import AudioEncoder as WhisperEncoder
from whisper.model import ModelDimensions

from musetalk.files import read_json
from musetalk.models.weights import (
    LOAD_ERRORS,
    WeightsError,
    find,
    fingerprint,
    first_line,
    freeze,
    load_strictly,
    read_tensors,
)

# Substrings of parameter names: openai-whisper -> Hugging Face's transformers.
HUGGING_FACE_NAMES = {
    "positional_embedding": "embed_positions.weight",
    "blocks.": "layers.",
    ".attn_ln.": ".self_attn_layer_norm.",
    ".attn.query.": ".self_attn.q_proj.",
    ".attn.key.": ".self_attn.k_proj.",
    ".attn.value.": ".self_attn.v_proj.",
    ".attn.out.": ".self_attn.out_proj.",
    ".mlp_ln.": ".final_layer_norm.",
    ".mlp.0.": ".fc1.",
    ".mlp.2.": ".fc2.",
    "ln_post.": "layer_norm.",
}
# Keys of Hugging Face's config.json, in the order of WhisperEncoder's arguments.
HUGGING_FACE_SIZES = ("num_mel_bins", "max_source_positions", "d_model", "encoder_attention_heads", "encoder_layers")
MEL_BINS = (80, 128)  # of the published Whisper models
SEGMENT_STATES = 1500  # encoder positions in 30 s


class AudioEncoder:
    """Computes the S = layers + 1 hidden states, each of width D, at 50 per second from a 30 s log-mel spectrogram."""

    def __init__(self, encoder: WhisperEncoder) -> None:
        self.fingerprint = fingerprint(encoder)
        self.encoder = freeze(encoder)
        self.mel_bins = encoder.conv1.in_channels
        self.shape = len(encoder.blocks) + 1, encoder.conv1.out_channels  # S, D

    @torch.no_grad()
    def __call__(self, mel: torch.Tensor, final_layer_norm: bool) -> torch.Tensor:
        """Returns the hidden states, float32 (1500, S, D): the embedding with positions, then the output of each block.

        mel: (mel_bins, 3000), 30 s. final_layer_norm: whether the last state is taken after the final layer norm
        (MuseTalk v1.5) or before it (v1.0).
        """
        return hidden_states(self.encoder, mel.to(self.encoder.conv1.weight), final_layer_norm).float()


def hidden_states(encoder: WhisperEncoder, mel: torch.Tensor, final_layer_norm: bool) -> torch.Tensor:
    """The hidden states of an encoder, (1500, S, D), see `AudioEncoder`. mel: (mel_bins, 3000)."""
    states: list[torch.Tensor] = []
    hooks = [encoder.blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))]
    hooks += [block.register_forward_hook(lambda _, __, output: states.append(output)) for block in encoder.blocks]
    normed = encoder(mel[None])  # (1, 1500, D)
    for hook in hooks:
        hook.remove()
    if final_layer_norm:
        states[-1] = normed
    return torch.stack(states, dim=2)[0]


def build_encoder(dims: ModelDimensions) -> WhisperEncoder:
    """Builds an untrained encoder of the given dimensions."""
    return WhisperEncoder(dims.n_mels, dims.n_audio_ctx, dims.n_audio_state, dims.n_audio_head, dims.n_audio_layer)


def load_audio_encoder(models_dir: Path, device: torch.device) -> AudioEncoder:
    """Loads the encoder from the whisper folder of a models folder. Raises WeightsError."""
    path = _find_whisper(models_dir)
    parse = _parse_openai if path.suffix == ".pt" else _parse_hugging_face
    encoder, tensors = parse(read_tensors(path), path)
    if not tensors:
        raise WeightsError(f"{path} contains no encoder: none of its tensors is named encoder.*; use a Whisper model")
    load_strictly(encoder, tensors, path)
    return AudioEncoder(encoder.float().to(device))


def _find_whisper(models_dir: Path) -> Path:
    """Returns the file of Whisper's weights in a models folder. Raises WeightsError if there is none or more than one
    of openai-whisper's."""
    folder = Path(models_dir) / "whisper"
    openai_files = sorted(folder.glob("*.pt"))
    if len(openai_files) > 1:
        raise WeightsError(f"{folder} contains {' and '.join(path.name for path in openai_files)}; keep only one")
    names = ("tiny.pt", "pytorch_model.bin", "model.safetensors")
    return openai_files[0] if openai_files else find(models_dir, *(f"whisper/{name}" for name in names))


def _parse_openai(values: dict, path: Path) -> tuple[WhisperEncoder, dict]:
    """Returns an encoder on the meta device and its tensors by name, from a checkpoint of openai-whisper."""
    try:
        dims = ModelDimensions(**values["dims"])
        tensors = {
            name.removeprefix("encoder."): tensor
            for name, tensor in values["model_state_dict"].items()
            if name.startswith("encoder.")
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{path} is not in the format of openai-whisper: {error} is missing; name a Hugging Face checkpoint "
            "pytorch_model.bin and put its config.json next to it"
        ) from error
    sizes = dims.n_mels, dims.n_audio_ctx, dims.n_audio_state, dims.n_audio_head, dims.n_audio_layer
    return _meta_encoder(sizes, path), tensors


def _parse_hugging_face(values: dict, path: Path) -> tuple[WhisperEncoder, dict]:
    """Returns an encoder on the meta device, built from the config.json next to a Hugging Face checkpoint, and the
    checkpoint's tensors under openai-whisper's names."""
    config_path = path.with_name("config.json")
    config = read_json(config_path)
    if missing := [name for name in HUGGING_FACE_SIZES if name not in config]:
        raise WeightsError(f"{config_path} does not describe a Whisper encoder: {', '.join(missing)} missing")
    encoder = _meta_encoder(tuple(config[name] for name in HUGGING_FACE_SIZES), config_path)
    names = list(map(str, values))
    prefix = "model.encoder." if any(name.startswith("model.encoder.") for name in names) else "encoder."
    openai_names = {prefix + _hugging_face_name(name): name for name in encoder.state_dict()}
    return encoder, {
        openai_names.get(name, name): tensor
        for name, tensor in zip(names, values.values(), strict=True)
        if name.startswith(prefix)
    }


def _hugging_face_name(name: str) -> str:
    """Converts a parameter name of openai-whisper's encoder to the name in transformers."""
    for openai, hugging_face in HUGGING_FACE_NAMES.items():
        name = name.replace(openai, hugging_face)
    return name


def _meta_encoder(sizes: tuple, path: Path) -> WhisperEncoder:
    """Builds an encoder on the meta device.

    sizes: the arguments of WhisperEncoder. path: the file they were read from. Raises WeightsError if they are not
    sizes of a Whisper encoder.
    """
    fault = f"{path} does not describe a Whisper encoder"
    if not all(type(size) is int and size > 0 for size in sizes):
        raise WeightsError(f"{fault}: its sizes must be positive integers")
    mel_bins, context, width, heads, _ = sizes
    if mel_bins not in MEL_BINS or context != SEGMENT_STATES or width % (2 * heads):
        raise WeightsError(f"{fault}: {mel_bins} mel bins, {context} positions, {heads} heads of {width} in all")
    try:
        with torch.device("meta"):
            return WhisperEncoder(*sizes)
    except LOAD_ERRORS as error:
        raise WeightsError(f"{fault}: {first_line(error)}") from error
