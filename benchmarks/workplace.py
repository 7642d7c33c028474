"""What several benchmarks work on: real clips and their cache, a video of 720 lines, weights of real sizes."""

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
from musetalk.data.cache import MAX_CLIP_FRAMES, TENSORS, Cache, CacheWriter
from musetalk.data.sample import make_sample
from musetalk.data.video import read_frames
from musetalk.files import read_json
from musetalk.models.audio_encoder import build_encoder

SHARED_CLIPS = ROOT.parent / "shared" / "clips"
SAMPLE = ROOT / "data" / "sample"
SECONDS = 2.0  # of each clip
SIZE = 720, 1280  # pixels, height and width of the video
WHISPER_TINY = ModelDimensions(80, 1500, 384, 6, 4, 1, 1, 1, 1, 1)  # its encoder; nothing uses the rest


class Measured(NamedTuple):
    """A figure's value, and what to look at where it misses its target."""

    value: float
    note: str = ""


class NotHereError(Exception):
    """A figure cannot be measured on this machine. The message says why."""


@dataclass
class Workplace:
    """Makes each thing when it is first asked for.

    folder: for files that nobody keeps. given: a cache to look at; None is one of the first seconds of `clips`.
    """

    folder: Path
    given: Path | None = None

    @cached_property
    def clips(self) -> list[Path]:
        """The shared clips, or else the built-in sample."""
        folder = SHARED_CLIPS if SHARED_CLIPS.is_dir() else SAMPLE
        if not folder.is_dir():
            make_sample(folder)
        return sorted(folder.rglob("*.mp4"))

    @cached_property
    def cache(self) -> Cache:
        """Made with the small VAE and an encoder as wide as the real Whisper's."""
        if self.given:
            return Cache(self.given)
        videos = cut(self.clips, self.folder / "videos", SECONDS)
        return prepare_quietly(PrepareConfig(videos, self.folder / "cache", self.models("mini")))

    @cached_property
    def long_cache(self) -> Cache:
        """A minute of each of two clips of `cache`: its frames again and again."""
        folder = self.folder / "long cache"
        writer = CacheWriter(folder, self.cache.contract)
        for clip in list(self.cache.clips.values())[:2]:
            times = MAX_CLIP_FRAMES // len(clip)
            tensors = {name: np.concatenate([clip.tensor(name)] * times) for name in TENSORS}
            begins, size = clip.tensor("face_jpeg_offsets")[:-1], clip.rows("face_jpeg")
            begins = [begins + index * size for index in range(times)]
            tensors["face_jpeg_offsets"] = np.concatenate([*begins, [times * size]])
            writer.write(clip.name, tensors, clip.metadata)
        return Cache(folder)

    @cached_property
    def video(self) -> Path:
        """The first seconds of a clip with one person and sound, enlarged into 1280 x 720 pixels."""
        path = self.folder / "720.mp4"
        enlarge(next(cut(self.clips[:1], self.folder / "first", SECONDS).iterdir()), path)
        return path

    def models(self, name: str) -> Path:
        """A models folder with untrained weights: of Whisper tiny's size, and of the real VAE's unless it is "mini"."""
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
    """Put the beginnings of some clips into a new folder, as they are encoded."""
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
    """Encode a video anew with pictures of `SIZE`, mirrored at their sides, at x264's own quality. Its sound stays."""
    height, width = SIZE
    with av.open(str(video)) as source, av.open(str(path), "w") as target:
        picture, sound = target.add_stream("libx264", rate=VIDEO_FPS), source.streams.audio[0]
        picture.height, picture.width, picture.pix_fmt = height, width, "yuv420p"
        copied = target.add_stream_from_template(sound)
        for frame in read_frames(video):
            inside = round(frame.shape[1] * height / frame.shape[0])
            frame = cv2.resize(frame, (inside, height), interpolation=cv2.INTER_CUBIC)
            left = (width - inside) // 2
            frame = cv2.copyMakeBorder(frame, 0, 0, left, width - inside - left, cv2.BORDER_REFLECT)
            target.mux(picture.encode(av.VideoFrame.from_ndarray(frame, format="bgr24")))
        target.mux(picture.encode(None))
        for packet in source.demux(sound):
            if packet.dts is not None:
                packet.stream = copied
                target.mux(packet)


def repeat(video: Path, path: Path, seconds: float) -> None:
    """The pictures of a video again and again, as they are encoded, for at least so long. Without its sound."""
    with av.open(str(video)) as source, av.open(str(path), "w") as target:
        picture = source.streams.video[0]
        copied, begun = target.add_stream_from_template(picture), 0
        while begun * picture.time_base < seconds:
            source.seek(0)
            for packet in source.demux(picture):
                if packet.dts is not None:
                    packet.pts, packet.dts, packet.stream = packet.pts + begun, packet.dts + begun, copied
                    target.mux(packet)
            begun += picture.duration


def prepare_quietly(config: PrepareConfig) -> Cache:
    """What datasets_process.py makes."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        prepare(config)
    return Cache(config.hdtf_samples_dir)
