"""The frozen audio encoder: Whisper's, of any size, of which MuseTalk uses every hidden state.

A models folder holds it in one of two formats: openai-whisper's (whisper/<size>.pt) or Hugging Face's
(whisper/config.json with pytorch_model.bin or model.safetensors). Where both are there, openai-whisper's is used.
"""

from __future__ import annotations

from pathlib import Path
from reprlib import repr as short

import torch
from whisper.model import AudioEncoder as WhisperEncoder
from whisper.model import ModelDimensions

from musetalk.files import read_json
from musetalk.models.weights import (
    LOAD_ERRORS,
    WeightsError,
    find,
    fingerprint,
    freeze,
    load_strictly,
    read_tensors,
    reason,
)

# Parts of the encoder's names in openai-whisper -> in Hugging Face's transformers.
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
# The sizes of an encoder in Hugging Face's config.json, in the order of WhisperEncoder's arguments.
HUGGING_FACE_SIZES = ("num_mel_bins", "max_source_positions", "d_model", "encoder_attention_heads", "encoder_layers")
MEL_BINS = (80, 128)  # of the mels that Whisper's models hear
SEGMENT_STATES = 1500  # in 30 s


class AudioEncoder:
    """Log-mel of 30 s -> the S = layers + 1 hidden states, each D wide, 50 a second."""

    def __init__(self, encoder: WhisperEncoder) -> None:
        self.fingerprint = fingerprint(encoder)
        self.encoder = freeze(encoder)
        self.mel_bins = encoder.conv1.in_channels
        self.shape = len(encoder.blocks) + 1, encoder.conv1.out_channels  # S, D

    @torch.no_grad()
    def __call__(self, mel: torch.Tensor, final_layer_norm: bool) -> torch.Tensor:
        """mel: (mel_bins, 3000) of 30 s. Returns float32 (1500, S, D): the embedding with its positions, then the
        output of each block; the last one after the final layer norm if asked for (MuseTalk v1.5), else before it
        (v1.0)."""
        states: list[torch.Tensor] = []
        hooks = [self.encoder.blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))]
        hooks += [
            block.register_forward_hook(lambda _, __, output: states.append(output)) for block in self.encoder.blocks
        ]
        normed = self.encoder(mel[None].to(self.encoder.conv1.weight))  # (1, 1500, D)
        for hook in hooks:
            hook.remove()
        if final_layer_norm:
            states[-1] = normed
        return torch.stack(states, dim=2)[0].float()  # (1500, S, D)


def build_encoder(dims: ModelDimensions) -> WhisperEncoder:
    """An untrained encoder of these dimensions."""
    return WhisperEncoder(dims.n_mels, dims.n_audio_ctx, dims.n_audio_state, dims.n_audio_head, dims.n_audio_layer)


def load_audio_encoder(models_dir: Path, device: torch.device) -> AudioEncoder:
    """Loads the encoder of the whisper folder of a models folder. Raises WeightsError."""
    path = _find_whisper(models_dir)
    values = read_tensors(path)
    read = _openai if path.suffix == ".pt" else _hugging_face
    encoder, tensors = read(values, path)
    if not tensors:
        raise WeightsError(f"{path} holds no encoder: none of its tensors is named encoder.*")
    load_strictly(encoder, tensors, path)
    return AudioEncoder(encoder.float().to(device))


def _find_whisper(models_dir: Path) -> Path:
    """The file of Whisper's weights in a models folder. Raises WeightsError where there is none, or several sizes."""
    folder = Path(models_dir) / "whisper"
    own = sorted(folder.glob("*.pt"))
    if len(own) > 1:
        raise WeightsError(f"{folder} has {' and '.join(path.name for path in own)}; leave only the one to use there")
    names = ("tiny.pt", "pytorch_model.bin", "model.safetensors")
    return own[0] if own else find(models_dir, *(f"whisper/{name}" for name in names))


def _openai(values: dict, path: Path) -> tuple[WhisperEncoder, dict]:
    """The untrained encoder that a file of openai-whisper describes, and its tensors by name."""
    try:
        dims = ModelDimensions(**values["dims"])
        tensors = {
            name.removeprefix("encoder."): tensor
            for name, tensor in values["model_state_dict"].items()
            if name.startswith("encoder.")
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{path} is not in openai-whisper's format: it lacks {error}; a file of Hugging Face's is named "
            "pytorch_model.bin and has its config.json beside it"
        ) from error
    sizes = dims.n_mels, dims.n_audio_ctx, dims.n_audio_state, dims.n_audio_head, dims.n_audio_layer
    return _plan(sizes, len(tensors), path), tensors


def _hugging_face(values: dict, path: Path) -> tuple[WhisperEncoder, dict]:
    """The untrained encoder that the config.json beside a file describes, and the file's tensors by openai's names."""
    config_path = path.with_name("config.json")
    config = read_json(config_path)
    if missing := [name for name in HUGGING_FACE_SIZES if name not in config]:
        raise WeightsError(f"{config_path} describes no audio encoder of Whisper's: it lacks {', '.join(missing)}")
    encoder = _plan(tuple(config[name] for name in HUGGING_FACE_SIZES), len(values), config_path)
    names = list(map(str, values))
    prefix = "model.encoder." if any(name.startswith("model.encoder.") for name in names) else "encoder."
    own = {prefix + _hugging_face_name(name): name for name in encoder.state_dict()}
    return encoder, {
        own.get(name, name): tensor
        for name, tensor in zip(names, values.values(), strict=True)
        if name.startswith(prefix)
    }


def _hugging_face_name(name: str) -> str:
    """A name of openai-whisper's encoder -> the name of the same tensor in transformers."""
    for openai, hugging_face in HUGGING_FACE_NAMES.items():
        name = name.replace(openai, hugging_face)
    return name


def _plan(sizes: tuple, tensors: int, path: Path) -> WhisperEncoder:
    """An encoder of these sizes on the meta device, so that nothing is allocated that the file does not hold.

    sizes: the arguments of WhisperEncoder. tensors: how many the file has. path: the file that states the sizes.
    Raises WeightsError where they are none of Whisper's.
    """
    fault = f"{path} describes no audio encoder of Whisper's: {short(sizes)}"
    if not all(type(size) is int and size > 0 for size in sizes):
        raise WeightsError(fault)
    mels, context, width, heads, layers = sizes
    if mels not in MEL_BINS or context != SEGMENT_STATES or width % (2 * heads) or layers > tensors:
        raise WeightsError(fault)
    try:
        with torch.device("meta"):
            return WhisperEncoder(*sizes)
    except LOAD_ERRORS as error:
        raise WeightsError(f"{path} describes no audio encoder that can be built: {reason(error)}") from error
