"""A video of a face and an audio -> the face speaking the audio. The notebook, the trainer's samples and
evaluation all use this one class.

    pipeline = LipSyncPipeline.from_checkpoint("checkpoints/demo", "models/mini")
    pipeline("face.mp4", "speech.wav", "output/out.mp4")
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Literal, get_args

import numpy as np
import torch
from tqdm import tqdm

from musetalk.contract import CONTRACTS, SAMPLES_PER_FRAME, VIDEO_FPS, ContractError, FeatureContract
from musetalk.data.audio import audio_features, audio_windows
from musetalk.data.crop import crop_clips, paste_back
from musetalk.data.face import FACE_BACKENDS, check_face_backend, load_face_backend
from musetalk.data.face.face import Face, FaceBackend
from musetalk.data.video import (
    MediaError,
    count_frames,
    ping_pong,
    ping_pong_index,
    read_audio,
    read_frames,
    write_video,
)
from musetalk.devices import choose_device
from musetalk.errors import UserError
from musetalk.images import batched, to_tensor, to_uint8
from musetalk.inference.blend import Blend, crop_square, face_alpha, parsed_alpha
from musetalk.models.audio_encoder import AudioEncoder, load_audio_encoder
from musetalk.models.face_parser import WEIGHTS as FACE_PARSER
from musetalk.models.face_parser import FaceParser, load_face_parser
from musetalk.models.trained_unet import find_unet, load_trained_unet
from musetalk.models.unet import UNet
from musetalk.models.vae import VAE, load_vae
from musetalk.models.weights import find

OUTPUT_SAMPLE_RATE = 48_000  # of the sound in the result
BATCH = {"cpu": 2, "cuda": 16}  # frames generated at once; more is slower on a CPU


@dataclass(frozen=True)
class PreparedVideo:
    """The face of a video of T frames, ready to speak many times.

    faces: T faces, None where none was found. boxes: int32 (T, 4) in source pixels.
    masked_latents, latents: float16 (T, 4, 32, 32). Zeros where there is no face.
    """

    path: Path
    faces: list[Face | None]
    boxes: np.ndarray
    masked_latents: np.ndarray
    latents: np.ndarray


class Stages:
    """Where the time goes: to one stage after the other, each as often as it comes."""

    def __init__(self, stage: str) -> None:
        self.seconds: Counter[str] = Counter()
        self.stage, self.since = stage, time.perf_counter()

    def __call__(self, stage: str) -> None:
        """A stage begins, and the one before it ends."""
        now = time.perf_counter()
        self.seconds[self.stage] += now - self.since
        self.stage, self.since = stage, now

    def report(self, frames: int) -> None:
        """Print how many frames a second each stage would make alone, below the progress bar."""
        self(self.stage)
        rates = (f"{stage} {frames / seconds:.1f}" for stage, seconds in self.seconds.items())
        tqdm.write(f"frames/s: {', '.join(rates)}", file=sys.stderr)


class LipSyncPipeline:
    """A trained UNet with all that it needs, under the feature contract it was trained under."""

    def __init__(
        self,
        unet: UNet,
        vae: VAE,
        contract: FeatureContract,
        models_dir: Path,
        face_backend: str | None = None,
        *,
        blend: Blend = "landmarks",
    ) -> None:
        """The audio encoder and face parser of models_dir and the face backend are loaded when first needed.

        face_backend: of FACE_BACKENDS; None is the one of the contract, or mediapipe where that knows none.
        blend: see `alpha`. Raises UserError and WeightsError as `check_choices` does, ContractError where the
        landmarks are not those of training.
        """
        check_choices(models_dir, face_backend, blend)
        if face_backend is None:
            face_backend = contract.face_backend or "mediapipe"
        given = replace(contract, face_backend=FACE_BACKENDS[face_backend])
        contract.require(given, ("face_backend",), "the UNet")
        self.unet, self.vae, self.contract = unet, vae, contract
        self.models_dir, self.face_backend, self.blend = models_dir, face_backend, blend

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | Path,
        models_dir: str | Path,
        face_backend: str | None = None,
        contract: Literal["rigid", "musetalk_v15", "musetalk_v1"] | None = None,
        blend: Blend = "landmarks",
        *,
        device: str = "auto",
    ) -> LipSyncPipeline:
        """checkpoint: a unet-<step>.safetensors, a folder whose newest is taken, or MuseTalk's own weights.
        contract: the rules of weights that carry none, such as "musetalk_v15" for musetalkV15/unet.pth.
        face_backend: "mediapipe", "dwpose" or "mmpose"; None is the one of training, or mediapipe where that is not
        known. blend: where the generated face shows, by "landmarks" or by a face parser: "jaw" and "raw" as MuseTalk's
        offline script for v1.5 and v1 weights, "musetalk_v1" as v1.0 when it was released.
        device: "cpu", "cuda", "cuda:<number>", or "auto", the GPU where there is one.

        Raises UserError for a name there is none of, DeviceError where the GPU cannot be used, WeightsError for missing
        or unfit files, ContractError where the VAE or the landmarks are not those of training.
        """
        # Look at the names first, before anything is loaded.
        if contract not in (None, *CONTRACTS):
            raise ContractError(f"contract must be one of {', '.join(CONTRACTS)}, not {contract!r}")
        path, models_dir = find_unet(Path(checkpoint)), Path(models_dir)
        check_choices(models_dir, face_backend, blend)
        chosen = choose_device(device)
        unet, contract = load_trained_unet(path, models_dir, contract and CONTRACTS[contract])
        vae = load_vae(models_dir, chosen, getattr(torch, contract.encode_dtype))
        contract.require(replace(contract, vae=vae.fingerprint), ("vae",), str(path))
        return cls(unet.to(chosen).eval(), vae, contract, models_dir, face_backend, blend=blend)

    @cached_property
    def audio_encoder(self) -> AudioEncoder:
        encoder = load_audio_encoder(self.models_dir, next(self.unet.parameters()).device)
        mine = replace(self.contract, audio_encoder=encoder.fingerprint)
        self.contract.require(mine, ("audio_encoder",), "the UNet")
        known = bool(self.contract.audio_encoder)  # published weights carry no contract of their own
        self.unet.check_features(encoder.shape, f"the Whisper in {self.models_dir}", known)
        return encoder

    @cached_property
    def backend(self) -> FaceBackend:
        return load_face_backend(self.face_backend, self.models_dir, next(self.unet.parameters()).device)

    @cached_property
    def face_parser(self) -> FaceParser:
        return load_face_parser(self.models_dir, next(self.unet.parameters()).device)

    def __call__(self, video: str | Path, audio: str | Path, output: str | Path, margin: int | None = None) -> int:
        """Make the face of a video speak an audio; returns the number of frames of the mp4 at `output`.

        Where the audio is longer the video runs forth and back. margin: see `prepare`.
        Raises MediaError for files that cannot be used.
        """
        return self.speak(self.prepare(video, margin), audio, output)

    def prepare(self, video: str | Path, margin: int | None = None) -> PreparedVideo:
        """Find, crop and encode the face in each frame of a video, just as the cache does.

        margin: source pixels below the chin, one of the contract's (its first by default).
        Raises MediaError where there is no face or no video, ContractError for a margin that was not trained.
        """
        path = Path(video)
        margin = self.contract.margins[0] if margin is None else margin
        contract = replace(self.contract, margins=(margin,))
        self.contract.require(contract, ("margins",), "the UNet")
        frames = tqdm(read_frames(path), f"find the face in {path.name}", count_frames(path), unit="frame")
        clips = crop_clips(PurePath(path.name), frames, self.backend, contract)
        faces, boxes, latents = [], [], []
        stage = Stages("find the face")
        for name, cropped, _ in clips:
            stage("encode it")
            faces += cropped.faces
            boxes.append(cropped.boxes[:, 0])
            latents.append(self.vae.encode_clip(name, cropped.crops, contract))
            stage("find the face")
        if all(face is None for face in faces):
            raise MediaError("no face", f"{path}: no face was found in it")
        stage.report(len(faces))
        masked, full = (np.concatenate(pieces)[:, 0] for pieces in zip(*latents, strict=True))
        return PreparedVideo(path, faces, np.concatenate(boxes), masked, full)

    def speak(self, prepared: PreparedVideo, audio: str | Path, output: str | Path) -> int:
        """Make a prepared face speak an audio file; returns the number of frames of the mp4 at `output`."""
        samples = read_audio(Path(audio))
        count = round(len(samples) / SAMPLES_PER_FRAME)
        if not count:
            raise MediaError("no audio", f"{audio}: is shorter than one frame of video ({1000 // VIDEO_FPS} ms)")
        encoder, stage = self.audio_encoder, Stages("audio")
        features = audio_features(samples, encoder, self.contract)
        sound = read_audio(Path(audio), OUTPUT_SAMPLE_RATE)
        frames = tqdm(self.frames(prepared, features, count, stage), f"write {output}", count, unit="frame")
        write_video(Path(output), frames, sound, OUTPUT_SAMPLE_RATE)
        stage.report(count)
        return count

    def frames(
        self,
        prepared: PreparedVideo,
        features: np.ndarray,
        count: int,
        stage: Callable[[str], None] = lambda _: None,
    ) -> Iterator[np.ndarray]:
        """The first `count` frames of a prepared face speaking audio features (F, S, D): BGR uint8 (H, W, 3).

        A frame without a face is passed on as it is. stage: told which part of the work begins.
        """
        length = len(prepared.faces)
        source = ping_pong(prepared.path, length, count)
        for batch in batched(range(count), BATCH[self.vae.autoencoder.device.type]):
            stage("generate")
            index = [ping_pong_index(k, length) for k in batch]
            windows = audio_windows(features, batch, self.contract)
            faces = self.generate(prepared.masked_latents[index], prepared.latents[index], windows)
            stage("read and blend")
            for i, generated, frame in zip(index, faces, source, strict=False):
                if prepared.faces[i] is not None:
                    alpha = self.alpha(frame, prepared.faces[i], prepared.boxes[i])
                    frame = paste_back(frame, generated, prepared.boxes[i], alpha)
                stage("write")
                yield frame
                stage("read and blend")
        stage("write")  # what the encoder has kept back

    def alpha(self, frame: np.ndarray, face: Face, box: np.ndarray) -> np.ndarray:
        """How much of a generated crop shows in the box of a frame, float32 (y2 - y1, x2 - x1).

        By the landmarks of the face, or by what the face parser sees in the frame.
        """
        if self.blend == "landmarks":
            return face_alpha(face.landmarks, box)
        classes = self.face_parser(to_tensor(crop_square(frame, box, self.blend)[None]))[0].cpu().numpy()
        return parsed_alpha(classes, box, self.blend)

    @torch.no_grad()
    def generate(
        self, masked_latents: np.ndarray, reference_latents: np.ndarray, audio_windows: np.ndarray
    ) -> np.ndarray:
        """Faces BGR uint8 (B, 256, 256, 3) of cached latents, each float16 (B, 4, 32, 32), and windows (B, W, D)."""
        parameter = next(self.unet.parameters())
        unet_input = torch.from_numpy(np.concatenate([masked_latents, reference_latents], axis=1)).to(parameter)
        windows = torch.from_numpy(audio_windows).to(parameter)
        return to_uint8(self.vae.decode(self.unet(unet_input, windows)))


def check_choices(models_dir: Path, face_backend: str | None, blend: str) -> None:
    """Raises UserError for a name there is none of, WeightsError where the face parser of a blend is missing."""
    if face_backend is not None:
        check_face_backend(face_backend)
    if blend not in get_args(Blend):
        raise UserError(f"blend must be one of {', '.join(map(repr, get_args(Blend)))}, not {blend!r}")
    if blend != "landmarks":
        find(models_dir, FACE_PARSER)
