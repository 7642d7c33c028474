"""Data shared by the benchmarks: real clips and their cache, a 720p video, weights of real sizes."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from whisper.model import ModelDimensions

from benchmarks import ROOT
from datasets_process import PrepareConfig
from datasets_process import main as prepare
from musetalk.contract import VIDEO_FPS
from musetalk.data.cache import Cache
from musetalk.data.cache_format import MAX_CLIP_FRAMES, OPTIONAL_TENSORS, TENSORS
from musetalk.data.cache_writer import CacheWriter
from musetalk.data.video import read_frames
from musetalk.files import read_json
from musetalk.models.audio_encoder import build_encoder

SHARED_CLIPS = ROOT.parent / "shared" / "clips"
SAMPLE = ROOT / "sample"
SECONDS = 2.0  # of each clip
SIZE = 720, 1280  # pixels, height and width of the video
WHISPER_TINY = ModelDimensions(80, 1500, 384, 6, 4, 1, 1, 1, 1, 1)  # only the encoder is used


class Measured(NamedTuple):
    """The value of a figure, and a note that is printed if it misses its target."""

    value: float
    note: str = ""


class UnavailableError(Exception):
    """A figure that cannot be measured on this machine. The message says why."""


@dataclass
class Workplace:
    """Creates the data of the benchmarks on first use.

    folder: for temporary files. cache_dir: an existing cache; by default the first seconds of `clips` are prepared.
    """

    folder: Path
    cache_dir: Path | None = None

    @cached_property
    def clips(self) -> list[Path]:
        """The shared clips if present, else the built-in sample."""
        folder = SHARED_CLIPS if SHARED_CLIPS.is_dir() else SAMPLE
        return sorted(folder.rglob("*.mp4"))

    @cached_property
    def cache(self) -> Cache:
        """A cache made with the small VAE and an encoder of Whisper tiny's size."""
        if self.cache_dir:
            return Cache(self.cache_dir)
        videos = cut(self.clips, self.folder / "videos", SECONDS)
        return prepare_quietly(PrepareConfig(videos, self.folder / "cache", self.models("mini")))

    @cached_property
    def long_cache(self) -> Cache:
        """A cache of two clips of a minute, repeating the frames of `cache`."""
        folder = self.folder / "long cache"
        writer = CacheWriter(folder, self.cache.contract)
        for clip in list(self.cache.clips.values())[:2]:
            repeats = MAX_CLIP_FRAMES // len(clip)
            tensors = {
                name: np.concatenate([clip.tensor(name)] * repeats) for name in TENSORS.keys() - OPTIONAL_TENSORS
            }
            offsets, size = clip.tensor("face_jpeg_offsets")[:-1], clip.rows("face_jpeg")
            repeated = [offsets + index * size for index in range(repeats)]
            tensors["face_jpeg_offsets"] = np.concatenate([*repeated, [repeats * size]])
            writer.write(clip.name, tensors, clip.metadata)
        return Cache(folder)

    @cached_property
    def video(self) -> Path:
        """The first seconds of a clip with one person and audio, enlarged to 1280 x 720 pixels."""
        path = self.folder / "720.mp4"
        enlarge(next(cut(self.clips[:1], self.folder / "first", SECONDS).iterdir()), path)
        return path

    def models(self, name: str) -> Path:
        """A models folder with a random Whisper tiny, and the small VAE for "mini", else a random full-size one."""
        folder = self.folder / "models" / name
        if folder.is_dir():
            return folder
        vae, whisper = folder / "sd-vae-ft-mse", folder / "whisper"
        whisper.mkdir(parents=True)
        tensors = {f"encoder.{k}": value for k, value in build_encoder(WHISPER_TINY).state_dict().items()}
        torch.save({"dims": asdict(WHISPER_TINY), "model_state_dict": tensors}, whisper / "tiny.pt")
        if name == "mini":
            vae.symlink_to(ROOT / "models/mini/sd-vae-ft-mse")
        else:
            vae.mkdir()
            (vae / "config.json").symlink_to(ROOT / "models/sd-vae-ft-mse/config.json")
            network = AutoencoderKL.from_config(read_json(vae / "config.json"))
            safetensors.torch.save_file(network.state_dict(), vae / "diffusion_pytorch_model.safetensors")
        return folder


def cut(clips: list[Path], folder: Path, seconds: float) -> Path:
    """Copies the first seconds of some clips to a new folder without re-encoding."""
    folder.mkdir()
    for path in clips:
        with av.open(str(path)) as source, av.open(str(folder / path.name), "w") as target:
            kept = [stream for stream in source.streams if stream.type in ("video", "audio")]
            streams = {stream: target.add_stream_from_template(stream) for stream in kept}
            for packet in source.demux(*kept):
                if packet.dts is not None and packet.dts * packet.time_base < seconds:
                    packet.stream = streams[packet.stream]
                    target.mux(packet)
    return folder


def enlarge(video: Path, path: Path) -> None:
    """Re-encodes a video at `SIZE`, padded by reflection, with x264's default quality; copies its audio."""
    height, width = SIZE
    with av.open(str(video)) as source, av.open(str(path), "w") as target:
        video_stream, audio_stream = target.add_stream("libx264", rate=VIDEO_FPS), source.streams.audio[0]
        video_stream.height, video_stream.width, video_stream.pix_fmt = height, width, "yuv420p"
        copied = target.add_stream_from_template(audio_stream)
        for frame in read_frames(video):
            inner_width = round(frame.shape[1] * height / frame.shape[0])
            frame = cv2.resize(frame, (inner_width, height), interpolation=cv2.INTER_CUBIC)
            left = (width - inner_width) // 2
            frame = cv2.copyMakeBorder(frame, 0, 0, left, width - inner_width - left, cv2.BORDER_REFLECT)
            target.mux(video_stream.encode(av.VideoFrame.from_ndarray(frame, format="bgr24")))
        target.mux(video_stream.encode(None))
        for packet in source.demux(audio_stream):
            if packet.dts is not None:
                packet.stream = copied
                target.mux(packet)


def repeat(video: Path, path: Path, seconds: float) -> None:
    """Repeats a video without its audio for at least this long, without re-encoding."""
    with av.open(str(video)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copied, offset = target.add_stream_from_template(stream), 0
        while offset * stream.time_base < seconds:
            source.seek(0)
            for packet in source.demux(stream):
                if packet.dts is not None:
                    packet.pts, packet.dts, packet.stream = packet.pts + offset, packet.dts + offset, copied
                    target.mux(packet)
            offset += stream.duration


def prepare_quietly(config: PrepareConfig) -> Cache:
    """Runs datasets_process.py without output and returns the cache."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        prepare(config)
    return Cache(config.hdtf_samples_dir)
