"""Creates the small audio encoder of models/mini: a narrow Whisper encoder, distilled from the real Whisper tiny.

    python -m tools.make_mini.audio_encoder --teacher-dir ../shared/weights

The small encoder learns to give hidden states from which those of the teacher can be computed linearly, one linear map
for each state (the hints of FitNets, https://arxiv.org/abs/1412.6550). The maps are used in training only.

Trains on the speech of the people that are not held out (see material.py), in segments of 30 s that are assembled from
augmented pieces. Writes `<models_dir>/whisper/tiny.pt` in openai-whisper's format, and prints for each state the share
of the teacher's variance that the maps explain on the validation people.

Takes about 30 minutes on one core. The same speech, seed and number of threads give the same weights, up to rounding on
other CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
import whisper.audio
from scipy.signal import resample_poly
from torch import nn
from tqdm import tqdm
from whisper.model import ModelDimensions, Whisper

from musetalk.cli import run_script
from musetalk.contract import AUDIO_SAMPLE_RATE
from musetalk.data.video import read_audio
from musetalk.files import atomic_write
from musetalk.models.audio_encoder import hidden_states, load_audio_encoder
from tools.make_mini.material import MaterialConfig, find_videos
from tools.make_mini.schedule import learning_rate_factor

# As many encoder states as Whisper tiny, but narrower; a decoder without layers, because openai-whisper expects one
DIMENSIONS = ModelDimensions(
    n_mels=80,
    n_audio_ctx=1500,
    n_audio_state=128,
    n_audio_head=4,
    n_audio_layer=4,
    n_vocab=8,
    n_text_ctx=8,
    n_text_state=8,
    n_text_head=1,
    n_text_layer=0,
)
SEGMENT = whisper.audio.N_SAMPLES  # 30 s
STATISTICS_SEGMENTS = 12  # of the training speech, for the mean and spread of the teacher's channels


@dataclass(frozen=True)
class EncoderConfig:
    """The constants; override them on the command line."""

    material: MaterialConfig = field(default_factory=MaterialConfig)
    teacher_dir: Path = Path("../shared/weights")  # has whisper/tiny.en.pt or another Whisper with five states
    models_dir: Path = Path(__file__).parents[2] / "models" / "mini"
    seed: int = 0
    num_threads: int = 1

    # Segments
    piece_seconds: tuple[float, float] = (2.0, 15.0)
    pause_seconds: float = 1.5  # longest pause between pieces, of digital silence or of noise
    speeds: tuple[float, float] = (0.85, 1.2)  # changes the pitch as well
    gains: tuple[float, float] = (-20.0, 6.0)  # dB
    noisy_share: float = 0.3  # of the pieces have white noise ...
    noise_levels: tuple[float, float] = (10.0, 40.0)  # ... that is this much softer, dB

    # Training
    num_steps: int = 5000  # of one segment each
    learning_rate: float = 2e-3  # peak
    num_warmup_steps: int = 100
    max_grad_norm: float = 1.0
    save_every: int = 500  # steps


def main(config: EncoderConfig) -> None:
    """Distils the encoder, writes it and prints the explained variance of each state."""
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    speech, held_out = (read_speech(config.material, split) for split in ("train", "validation"))
    seconds = sum(map(len, speech)) / AUDIO_SAMPLE_RATE
    print(f"{seconds / 60:.1f} minutes of speech to train on")
    teacher = load_audio_encoder(config.teacher_dir, torch.device("cpu"))

    # Standardise the teacher's channels
    segments = [draw_segment(speech, config, rng) for _ in range(STATISTICS_SEGMENTS)]
    states = torch.stack([teacher(log_mel(segment), True) for segment in segments]).flatten(0, 1)
    mean, std = states.mean(0), states.std(0)  # (S, D)

    model = Whisper(DIMENSIONS)
    nn.init.zeros_(model.decoder.positional_embedding)  # uninitialised by Whisper
    maps = nn.ModuleList(nn.Linear(DIMENSIONS.n_audio_state, teacher.shape[1]) for _ in range(teacher.shape[0]))

    def errors(audio: np.ndarray) -> torch.Tensor:
        """Mean squared error of each standardised state, (S,)."""
        mel = log_mel(audio)
        with torch.autocast("cpu", torch.bfloat16):
            target = (teacher(mel, True) - mean) / std  # (1500, S, D)
            own = hidden_states(model.encoder, mel, True)  # (1500, S, 128)
            pred = torch.stack([linear(own[:, k]) for k, linear in enumerate(maps)], dim=1)
        return (pred.float() - target).square().mean((0, 2))

    parameters = [*model.encoder.parameters(), *maps.parameters()]
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=1e-2)
    factor = partial(learning_rate_factor, num_warmup_steps=config.num_warmup_steps, num_steps=config.num_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    progress = tqdm(range(1, config.num_steps + 1), "audio encoder", unit="step", mininterval=5)
    for step in progress:
        loss = errors(draw_segment(speech, config, rng)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if step % config.save_every == 0 or step == config.num_steps:
            save(model, config.models_dir)
    with torch.no_grad():
        unexplained = torch.stack([errors(pad_segment(audio)) for audio in held_out]).mean(0)
    shares = ", ".join(f"{1 - value:.3f}" for value in unexplained.tolist())
    print(f"explained variance of the teacher's states on {len(held_out)} clips of validation people: {shares}")


def read_speech(material: MaterialConfig, split: str) -> list[np.ndarray]:
    """The audio of each video of a split, float32 (N,) in [-1, 1] at 16 kHz."""
    paths = [video.path for video in find_videos(material) if video.split == split]
    return [read_audio(path) for path in tqdm(paths, f"{split} speech", unit="clip")]


def draw_segment(speech: Sequence[np.ndarray], config: EncoderConfig, rng: np.random.Generator) -> np.ndarray:
    """A segment of 30 s of augmented pieces and pauses, float32 (480000,)."""
    lengths = np.array([len(audio) for audio in speech])
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < SEGMENT:
        audio = speech[rng.choice(len(speech), p=lengths / lengths.sum())]
        count = int(rng.uniform(*config.piece_seconds) * AUDIO_SAMPLE_RATE)
        start = int(rng.integers(max(1, len(audio) - count)))
        piece = audio[start : start + count]
        speed = Fraction(rng.uniform(*config.speeds)).limit_denominator(20)
        piece = resample_poly(piece, speed.denominator, speed.numerator)
        piece = piece * 10 ** (rng.uniform(*config.gains) / 20)
        if rng.random() < config.noisy_share:
            level = piece.std() * 10 ** (-rng.uniform(*config.noise_levels) / 20)
            piece = piece + level * rng.standard_normal(len(piece))
        pause = np.zeros(int(rng.uniform(0, config.pause_seconds) * AUDIO_SAMPLE_RATE))
        if rng.random() < 0.5:
            pause = 10 ** rng.uniform(-4, -2.5) * rng.standard_normal(len(pause))
        parts += [piece, pause]
    return np.clip(np.concatenate(parts)[:SEGMENT], -1, 1).astype(np.float32)


def pad_segment(audio: np.ndarray) -> np.ndarray:
    """The first 30 s of an audio, repeated if it is shorter."""
    return np.resize(audio, SEGMENT)


def log_mel(audio: np.ndarray) -> torch.Tensor:
    """Whisper's log-mel spectrogram of a segment, (80, 3000)."""
    return whisper.audio.log_mel_spectrogram(torch.from_numpy(audio), DIMENSIONS.n_mels)


def save(model: Whisper, models_dir: Path) -> None:
    """Writes the model in openai-whisper's format, in fp16."""
    tensors = {name: value.half() for name, value in model.state_dict().items()}
    with atomic_write(models_dir / "whisper" / "tiny.pt") as path:
        torch.save({"dims": asdict(DIMENSIONS), "model_state_dict": tensors}, path)


if __name__ == "__main__":
    run_script(main, tyro.cli(EncoderConfig, description=__doc__))
