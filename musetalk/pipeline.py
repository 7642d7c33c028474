"""A video of a face and an audio -> the face speaking the audio. The notebook, the trainer's samples and
evaluation all use this one class.

    pipeline = LipSyncPipeline.from_checkpoint("checkpoints/demo", "models/mini")
    pipeline("face.mp4", "speech.wav", "output/out.mp4")
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePath

import numpy as np
import torch
from tqdm import tqdm

from musetalk.audio import audio_features, audio_windows
from musetalk.blend import face_alpha
from musetalk.checkpoint import latest_unet, load_trained_unet
from musetalk.contract import SAMPLES_PER_FRAME, VIDEO_FPS, FeatureContract
from musetalk.crop import crop_clips, paste_back, to_uint8
from musetalk.face import Face, FaceBackend, load_face_backend
from musetalk.models.audio_encoder import AudioEncoder, load_audio_encoder
from musetalk.models.unet import UNet
from musetalk.models.vae import VAE, load_vae
from musetalk.video import (
    MediaError,
    batched,
    count_frames,
    forth_and_back,
    forth_and_back_index,
    read_audio,
    read_frames,
    write_video,
)

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


class LipSyncPipeline:
    """A trained UNet with all that it needs, under the feature contract it was trained under."""

    def __init__(
        self,
        unet: UNet,
        vae: VAE,
        contract: FeatureContract,
        models_dir: Path,
        face_backend: str = "mediapipe",
    ) -> None:
        """The audio encoder of models_dir and the face backend are loaded when first needed."""
        self.unet, self.vae, self.contract = unet, vae, contract
        self.models_dir, self.face_backend = models_dir, face_backend

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str | Path, models_dir: str | Path, face_backend: str = "mediapipe"
    ) -> LipSyncPipeline:
        """checkpoint: a unet-<step>.safetensors, or a folder whose newest is taken.

        Raises WeightsError for missing or unfit files, ContractError where the VAE is not the one of training.
        """
        path, models_dir = Path(checkpoint), Path(models_dir)
        if path.is_dir() or path.suffix != ".safetensors":
            path = latest_unet(path)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        unet, contract = load_trained_unet(path, models_dir)
        vae = load_vae(models_dir, device, getattr(torch, contract.encode_dtype))
        contract.require(replace(contract, vae=vae.fingerprint), ("vae",), str(path))
        return cls(unet.to(device).eval(), vae, contract, models_dir, face_backend)

    @cached_property
    def audio_encoder(self) -> AudioEncoder:
        encoder = load_audio_encoder(self.models_dir, next(self.unet.parameters()).device)
        mine = replace(self.contract, audio_encoder=encoder.fingerprint)
        self.contract.require(mine, ("audio_encoder",), "the UNet")
        return encoder

    @cached_property
    def backend(self) -> FaceBackend:
        return load_face_backend(self.face_backend, self.models_dir, next(self.unet.parameters()).device)

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
        faces, boxes, latents = [], [], []
        for name, cropped, _ in crop_clips(PurePath(path.name), frames, self.backend, contract):
            faces += cropped.faces
            boxes.append(cropped.boxes[:, 0])
            latents.append(self.vae.encode_clip(name, cropped.crops, contract))
        if all(face is None for face in faces):
            raise MediaError("no face", f"{path}: no face was found in it")
        masked, full = (np.concatenate(pieces)[:, 0] for pieces in zip(*latents, strict=True))
        return PreparedVideo(path, faces, np.concatenate(boxes), masked, full)

    def speak(self, prepared: PreparedVideo, audio: str | Path, output: str | Path) -> int:
        """Make a prepared face speak an audio file; returns the number of frames of the mp4 at `output`."""
        samples = read_audio(Path(audio))
        count = round(len(samples) / SAMPLES_PER_FRAME)
        if not count:
            raise MediaError("no audio", f"{audio}: is shorter than one frame of video ({1000 // VIDEO_FPS} ms)")
        features = audio_features(samples, self.audio_encoder, self.contract)
        frames = tqdm(self.frames(prepared, features, count), f"write {output}", count, unit="frame")
        return write_video(Path(output), frames, read_audio(Path(audio), OUTPUT_SAMPLE_RATE), OUTPUT_SAMPLE_RATE)

    def frames(self, prepared: PreparedVideo, features: np.ndarray, count: int) -> Iterator[np.ndarray]:
        """The first `count` frames of a prepared face speaking audio features (F, S, D): BGR uint8 (H, W, 3).

        A frame without a face is passed on as it is.
        """
        length = len(prepared.faces)
        source = forth_and_back(prepared.path, length, count)
        for batch in batched(range(count), BATCH[self.vae.autoencoder.device.type]):
            index = [forth_and_back_index(k, length) for k in batch]
            windows = audio_windows(features, batch, self.contract)
            faces = self.generate(prepared.masked_latents[index], prepared.latents[index], windows)
            for i, generated, frame in zip(index, faces, source, strict=False):
                if prepared.faces[i] is None:
                    yield frame
                else:
                    alpha = face_alpha(prepared.faces[i].landmarks, prepared.boxes[i])
                    yield paste_back(frame, generated, prepared.boxes[i], alpha)

    @torch.no_grad()
    def generate(
        self, masked_latents: np.ndarray, reference_latents: np.ndarray, audio_windows: np.ndarray
    ) -> np.ndarray:
        """Faces BGR uint8 (B, 256, 256, 3) of cached latents, each float16 (B, 4, 32, 32), and windows (B, W, D)."""
        parameter = next(self.unet.parameters())
        unet_input = torch.from_numpy(np.concatenate([masked_latents, reference_latents], axis=1)).to(parameter)
        windows = torch.from_numpy(audio_windows).to(parameter)
        return to_uint8(self.vae.decode(self.unet(unet_input, windows)))
