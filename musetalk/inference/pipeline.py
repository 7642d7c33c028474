"""Lip-syncs a video to an audio with a trained UNet.

    pipeline = LipSyncPipeline.from_checkpoint("checkpoints/demo", "models/mini")
    pipeline("face.mp4", "speech.wav", "output/out.mp4")

The notebook, the samples of the trainer and the validation all use this class.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Literal, get_args

import numpy as np
import torch
from tqdm import tqdm

from musetalk.contract import CONTRACTS, SAMPLES_PER_FRAME, VIDEO_FPS, ContractError, FeatureContract
from musetalk.data.audio import audio_features, audio_windows
from musetalk.data.crop import crop_clips
from musetalk.data.face import FACE_BACKENDS, check_face_backend, load_face_backend
from musetalk.data.face.face import Face, FaceBackend
from musetalk.data.ping_pong import ping_pong, ping_pong_index
from musetalk.data.video import MediaError, count_frames, read_audio, read_frames, write_video
from musetalk.devices import check_compiler, choose_device, compile_network, mixed_precision
from musetalk.errors import UserError
from musetalk.images import batched, to_tensor, to_uint8
from musetalk.inference.blend import Blend, ParserBlend, crop_square, face_alpha, pack_alpha, parsed_alpha
from musetalk.inference.prefetch import prefetched
from musetalk.inference.prepared_video import PreparedVideo, blended_frames
from musetalk.inference.stage_timer import StageTimer
from musetalk.models.audio_encoder import AudioEncoder, load_audio_encoder
from musetalk.models.face_parser import WEIGHTS as FACE_PARSER
from musetalk.models.face_parser import FaceParser, load_face_parser
from musetalk.models.tiny_decoder import TinyDecoder, load_tiny_decoder
from musetalk.models.trained_unet import find_unet, load_trained_unet
from musetalk.models.unet import UNet
from musetalk.models.vae import VAE, load_vae
from musetalk.models.weights import find

OUTPUT_SAMPLE_RATE = 48_000  # of the soundtrack of the output video
BATCH = {"cpu": 2, "mps": 16, "cuda": 16}  # frames generated at once, by device; larger batches are slower on a CPU
FRAMES_AHEAD, BATCHES_AHEAD = 4, 2  # of each stage while dubbing


class LipSyncPipeline:
    """A trained UNet and the other networks of inference, under the feature contract of its training."""

    def __init__(
        self,
        unet: UNet,
        vae: VAE,
        contract: FeatureContract,
        models_dir: Path,
        face_backend: str | None = None,
        *,
        blend: Blend = "landmarks",
        tiny_decoder: TinyDecoder | None = None,
    ) -> None:
        """The audio encoder, the face parser and the face backend are loaded on first use.

        face_backend: one of FACE_BACKENDS; by default that of the contract, or mediapipe if the contract has none.
        blend: see `from_checkpoint`. Raises UserError and WeightsError as `check_choices` does, ContractError if the
        backend gives other landmarks than training used.
        """
        check_choices(models_dir, face_backend, blend)
        if face_backend is None:
            face_backend = contract.face_backend or "mediapipe"
        requested = replace(contract, face_backend=FACE_BACKENDS[face_backend])
        contract.require(requested, ("face_backend",), "the UNet")
        self.unet, self.vae, self.tiny_decoder, self.contract = unet, vae, tiny_decoder, contract
        self.models_dir, self.face_backend, self.blend, self.compiled = models_dir, face_backend, blend, False

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | Path,
        models_dir: str | Path,
        face_backend: str | None = None,
        contract: Literal["rigid", "musetalk_v15", "musetalk_v1"] | None = None,
        blend: Blend = "landmarks",
        *,
        tiny_decoder: str | Path | None = None,
        compile: bool = False,
        device: str = "auto",
    ) -> LipSyncPipeline:
        """Loads a trained UNet and the VAE it was trained with.

        checkpoint: a unet-<step>.safetensors, a folder (its newest one is used), or MuseTalk's released weights.
        contract: the feature contract of weights that store none, such as "musetalk_v15" for musetalkV15/unet.pth.
        face_backend: "mediapipe", "dwpose" or "mmpose"; by default that of training, or mediapipe if unknown.
        blend: how the generated face is masked: by "landmarks", or by a face parser: "jaw" and "raw" as in MuseTalk's
        offline script for v1.5 and v1 weights, "musetalk_v1" as in v1.0 when it was released.
        tiny_decoder: a file of tools/distil_decoder.py that decodes in place of the VAE: faster, less sharp.
        compile: uses torch.compile, which takes minutes at the first batch.
        device: "cpu", "cuda", "cuda:<number>", "mps", or "auto": CUDA's GPU if there is one, else the CPU.

        Raises UserError for an unknown name, DeviceError if the GPU cannot be used, WeightsError for missing or
        invalid files, ContractError if the VAE or the landmarks are not those of training.
        """
        # Check the arguments before loading anything.
        if contract not in (None, *CONTRACTS):
            raise ContractError(f"contract must be one of {', '.join(CONTRACTS)}, not {contract!r}")
        path, models_dir = find_unet(Path(checkpoint)), Path(models_dir)
        check_choices(models_dir, face_backend, blend)
        if compile:
            check_compiler()
        torch_device = choose_device(device)
        unet, trained = load_trained_unet(path, models_dir, CONTRACTS[contract] if contract else None)
        vae = load_vae(models_dir, torch_device, getattr(torch, trained.encode_dtype))
        trained.require(replace(trained, vae=vae.fingerprint), ("vae",), str(path))
        tiny = load_tiny_decoder(Path(tiny_decoder), vae) if tiny_decoder else None
        pipeline = cls(
            unet.to(torch_device).eval(), vae, trained, models_dir, face_backend, blend=blend, tiny_decoder=tiny
        )
        if compile:
            pipeline.compile()
        return pipeline

    def compile(self) -> None:
        """Compiles the UNet and the decoder, at the first batch and for batches of its size."""
        for network in (self.unet.model, self.tiny_decoder or self.vae.autoencoder.decoder):
            compile_network(network, self.device)
        self.compiled = True

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @cached_property
    def audio_encoder(self) -> AudioEncoder:
        encoder = load_audio_encoder(self.models_dir, self.device)
        self.contract.require(replace(self.contract, audio_encoder=encoder.fingerprint), ("audio_encoder",), "the UNet")
        has_fingerprint = bool(self.contract.audio_encoder)  # not with released weights, which store no contract
        self.unet.check_features(encoder.shape, f"the Whisper in {self.models_dir}", has_fingerprint)
        return encoder

    @cached_property
    def backend(self) -> FaceBackend:
        return load_face_backend(self.face_backend, self.models_dir, self.device)

    @cached_property
    def face_parser(self) -> FaceParser:
        return load_face_parser(self.models_dir, self.device)

    def __call__(self, video: str | Path, audio: str | Path, output: str | Path, margin: int | None = None) -> int:
        """Lip-syncs a video to an audio, writes an mp4 to `output` and returns its number of frames.

        If the audio is longer, the video plays forwards and backwards. margin: see `prepare`.
        Raises MediaError for files that cannot be used.
        """
        return self.speak(self.prepare(video, margin), audio, output)

    def prepare(
        self,
        video: str | Path,
        margin: int | None = None,
        *,
        face: int | None = None,
        max_frames: int = sys.maxsize,
    ) -> PreparedVideo:
        """Detects, crops and encodes the face in each frame of a video, exactly as for the cache.

        margin: source pixels below the chin, one of the contract's margins (by default the first).
        face: number of the person to lip-sync, from 1 on, from left to right in the first frame that shows the most
        people (by default the person with the largest face). Numbers refer to the first minute with so many people.
        max_frames: leaves out the rest of the video.
        Raises MediaError if there is no video, no face or no such person in it, ContractError for a margin not used in
        training.
        """
        path = Path(video)
        margin = self.contract.margins[0] if margin is None else margin
        contract = replace(self.contract, margins=(margin,))
        self.contract.require(contract, ("margins",), "the UNet")
        total = min(count_frames(path), max_frames)
        frames = tqdm(read_frames(path, 0, max_frames), f"find the face in {path.name}", total, unit="frame")
        clips = crop_clips(PurePath(path.name), frames, self.backend, contract, number=face)
        faces, boxes, latents, people = [], [], [], 0
        timer = StageTimer()
        for name, person, _ in timer.iterate("find and crop the face", clips):
            faces += person.faces
            boxes.append(person.boxes[:, 0])
            people = max(people, person.people)
            with timer("encode it"):
                latents.append(self.vae.encode_clip(name, person.crops(), contract))
        if not people:
            raise MediaError("no face", f"{path}: no face was found in it")
        if not any(faces):
            raise MediaError(
                "no face",
                f"{path}: face cannot be {face}, because the largest number of people found in one frame is {people}; "
                f"choose a number up to {people}, counted from left to right",
            )
        with timer("mask it"):
            alphas = self._alphas(path, faces, np.concatenate(boxes))
        timer.report(len(faces))
        masked, full = (np.concatenate(pieces)[:, 0] for pieces in zip(*latents, strict=True))
        return PreparedVideo(path, faces, np.concatenate(boxes), alphas, masked, full, people)

    def _alphas(self, path: Path, faces: Sequence[Face | None], boxes: np.ndarray) -> list[bytes | None]:
        """Packed masks of T boxes, from the landmarks of the faces or from the face parser's classes of the frames."""
        if self.blend == "landmarks":
            pairs = zip(faces, boxes, strict=True)
            alphas = (face_alpha(face.landmarks, box) if face else None for face, box in pairs)
        else:
            frames = tqdm(read_frames(path, 0, len(faces)), f"parse the face in {path.name}", len(faces), unit="frame")
            triples = zip(frames, faces, boxes, strict=True)
            alphas = (self._parsed_alpha(frame, box, self.blend) if face else None for frame, face, box in triples)
        return [None if alpha is None else pack_alpha(alpha) for alpha in alphas]

    def _parsed_alpha(self, frame: np.ndarray, box: np.ndarray, blend: ParserBlend) -> np.ndarray:
        """Opacity of the generated crop in each pixel of its box, from the face parser's classes of the frame."""
        classes = self.face_parser(to_tensor(crop_square(frame, box, blend)[None]))[0].cpu().numpy()
        return parsed_alpha(classes, box, blend)

    def speak(
        self, prepared: PreparedVideo, audio: str | Path, output: str | Path, *, max_frames: int = sys.maxsize
    ) -> int:
        """Lip-syncs a prepared video to an audio, writes an mp4 to `output` and returns its number of frames.

        max_frames: leaves out the rest of the audio.
        """
        samples = read_audio(Path(audio))
        count = min(count_speech_frames(samples, audio), max_frames)
        encoder, timer = self.audio_encoder, StageTimer()
        with timer("audio"):
            features = audio_features(samples, encoder, self.contract)
            del samples  # 2.5 KB a frame
            soundtrack = read_audio(Path(audio), OUTPUT_SAMPLE_RATE)
        with timer("write"), closing(self.frames(prepared, features, count, timer)) as frames:
            progress = tqdm(timer.iterate(None, frames), f"write {output}", count, unit="frame")
            write_video(Path(output), progress, soundtrack, OUTPUT_SAMPLE_RATE)
        timer.report(count)
        return count

    def frames(
        self, prepared: PreparedVideo, features: np.ndarray, count: int, timer: StageTimer | None = None
    ) -> Generator[np.ndarray, None, None]:
        """The first `count` frames of a prepared video lip-synced to audio features (F, S, D): BGR uint8 (H, W, 3).

        Frames without a face are not changed. Decoding, generating and blending run in a thread each, a few frames
        ahead; closing the generator ends them. timer: measures the stages "decode", "generate" and "blend".
        """
        timer = timer or StageTimer()
        source = prefetched(timer.iterate("decode", ping_pong(prepared.path, len(prepared.faces), count)), FRAMES_AHEAD)
        batches = timer.iterate("generate", self._generated_batches(prepared, features, count))
        return prefetched(blended_frames(prepared, source, prefetched(batches, BATCHES_AHEAD), timer), FRAMES_AHEAD)

    def _generated_batches(self, prepared: PreparedVideo, features: np.ndarray, count: int) -> Iterator[np.ndarray]:
        """Face crops for the first `count` frames, in batches BGR uint8 (B, 256, 256, 3)."""
        size = BATCH[self.device.type]
        for batch in batched(range(count), size):
            padded = batch + batch[-1:] * (size - len(batch)) if self.compiled else batch  # another size compiles again
            index = [ping_pong_index(k, len(prepared.faces)) for k in padded]
            windows = audio_windows(features, padded, self.contract)
            yield self.generate(prepared.masked_latents[index], prepared.latents[index], windows)[: len(batch)]

    @torch.no_grad()
    def generate(
        self, masked_latents: np.ndarray, reference_latents: np.ndarray, audio_windows: np.ndarray
    ) -> np.ndarray:
        """Generates faces, BGR uint8 (B, 256, 256, 3), from latents float16 (B, 4, 32, 32) and windows (B, W, D)."""
        parameter = next(self.unet.parameters())
        unet_input = torch.from_numpy(np.concatenate([masked_latents, reference_latents], axis=1)).to(parameter)
        windows = torch.from_numpy(audio_windows).to(parameter)
        with mixed_precision(self.device):
            return to_uint8((self.tiny_decoder or self.vae).decode(self.unet(unet_input, windows)))


def count_speech_frames(samples: np.ndarray, path: str | Path) -> int:
    """Number of video frames of an audio, float32 (N,) at 16 kHz: the nearest. Raises MediaError if there is none."""
    count = round(len(samples) / SAMPLES_PER_FRAME)
    if not count:
        raise MediaError("no audio", f"{path}: is shorter than one frame of video ({1000 // VIDEO_FPS} ms)")
    return count


def check_choices(models_dir: Path, face_backend: str | None, blend: str) -> None:
    """Raises UserError for an unknown name, WeightsError if `blend` needs a face parser whose weights are missing."""
    if face_backend is not None:
        check_face_backend(face_backend)
    if blend not in get_args(Blend):
        raise UserError(f"blend must be one of {', '.join(map(repr, get_args(Blend)))}, not {blend!r}")
    if blend != "landmarks":
        find(models_dir, FACE_PARSER)
