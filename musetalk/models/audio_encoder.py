"""The frozen audio encoder: openai-whisper's, of which MuseTalk uses every hidden state."""

from __future__ import annotations

from pathlib import Path
from reprlib import repr as short

import torch
from whisper.model import AudioEncoder as WhisperEncoder
from whisper.model import ModelDimensions

from musetalk.weights import NONSENSE, WeightsError, find, fingerprint, freeze, load_strictly, read_tensors, reason

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
    """The encoder of whisper/tiny.pt in a models folder, openai-whisper's own format. Raises WeightsError."""
    path = find(models_dir, "whisper/tiny.pt")
    checkpoint = read_tensors(path)
    prefix = "encoder."
    try:
        dims = ModelDimensions(**checkpoint["dims"])
        tensors = {k[len(prefix) :]: v for k, v in checkpoint["model_state_dict"].items() if k.startswith(prefix)}
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is not in openai-whisper's format: it lacks {error}") from error
    sizes = dims.n_mels, dims.n_audio_ctx, dims.n_audio_state, dims.n_audio_head, dims.n_audio_layer
    if not (
        all(type(size) is int and size > 0 for size in sizes)
        and dims.n_mels in MEL_BINS
        and dims.n_audio_ctx == SEGMENT_STATES
        and dims.n_audio_state % (2 * dims.n_audio_head) == 0
        and dims.n_audio_layer <= len(tensors)
    ):
        raise WeightsError(f"{path} describes no audio encoder of Whisper's: {short(sizes)}")
    try:
        with torch.device("meta"):  # no memory is taken for what the file does not hold
            encoder = build_encoder(dims)
    except NONSENSE as error:
        raise WeightsError(f"{path} describes no audio encoder that can be built: {reason(error)}") from error
    load_strictly(encoder, tensors, path)
    return AudioEncoder(encoder.float().to(device))
