"""The small audio encoder: a narrow Whisper with random weights."""

from __future__ import annotations

from dataclasses import asdict

import torch
from whisper.model import ModelDimensions, Whisper

from musetalk.files import atomic_write
from tools.make_mini.config import Config

# As many encoder states as Whisper tiny, but narrower; the smallest possible decoder
AUDIO_DIMENSIONS = ModelDimensions(
    n_mels=80,
    n_audio_ctx=1500,
    n_audio_state=64,
    n_audio_head=4,
    n_audio_layer=4,
    n_vocab=100,
    n_text_ctx=8,
    n_text_state=64,
    n_text_head=4,
    n_text_layer=1,
)
CONV_GAIN = 3  # of the random convolutions, so that audio outweighs the positional embedding


def make_audio_encoder(config: Config) -> None:
    """Writes a Whisper with random weights, whose features still distinguish different mel spectrograms.

    In openai-whisper's format, including an unused decoder, as in the real file.
    """
    torch.manual_seed(config.seed)
    model = Whisper(AUDIO_DIMENSIONS)
    with torch.no_grad():
        model.decoder.positional_embedding.normal_(std=0.01)  # uninitialised by Whisper
        for conv in (model.encoder.conv1, model.encoder.conv2):
            conv.weight *= CONV_GAIN
    tensors = {name: value.half() for name, value in model.state_dict().items()}
    with atomic_write(config.models_dir / "whisper" / "tiny.pt") as path:
        torch.save({"dims": asdict(AUDIO_DIMENSIONS), "model_state_dict": tensors}, path)
