"""Throughput of each stage of dubbing, at full size with random weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest.mock import patch

import cv2
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import nn

from musetalk.contract import AUDIO_SAMPLE_RATE, IMAGE_SIZE, SAMPLES_PER_FRAME
from musetalk.data.cache import Cache, Clip
from musetalk.data.crop import in_crop
from musetalk.data.face.face import Face
from musetalk.data.video import write_video
from musetalk.files import read_json
from musetalk.inference.blend import face_alpha, pack_alpha
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.inference.prepared_video import PreparedVideo
from musetalk.inference.stage_timer import StageTimer
from musetalk.models.unet import build_unet
from musetalk.models.vae import VAE
from tools.gpu_check.config import GpuCheckConfig

FACE = 0.45  # side of the face box, relative to the height of the frame


def dub(config: GpuCheckConfig, accelerator: Accelerator, report: Callable) -> None:
    """Reports the throughput of encoding, generating, blending and writing."""
    cache, device = Cache(config.material), accelerator.device
    clip = next(iter(cache.clips.values()))
    unet = build_unet(config.models_dir, 0, cache.contract.positional_encoding).to(device).eval()
    autoencoder = AutoencoderKL.from_config(read_json(config.models_dir / "sd-vae-ft-mse/config.json"))
    with patch("musetalk.models.vae.fingerprint", return_value=cache.contract.vae):
        vae = VAE(nn.Module.to(autoencoder, device, getattr(torch, cache.contract.encode_dtype)))
    pipeline = LipSyncPipeline(unet, vae, cache.contract, config.vae_dir)
    for height in config.heights[:1] if config.quick else config.heights:
        source = config.output / f"source_{height}.mp4"
        faces, boxes = write_source(clip, height, source)
        start = time.perf_counter()
        crops = [[clip.image(frame)] for frame in np.flatnonzero(clip.usable).tolist()]
        masked, full = vae.encode_clip(clip.name, crops, cache.contract)
        encoded = len(crops) / (time.perf_counter() - start)
        alphas = [pack_alpha(face_alpha(face.landmarks, box)) for face, box in zip(faces, boxes, strict=True)]
        prepared = PreparedVideo(source, faces, boxes, alphas, masked[:, 0], full[:, 0])
        count = len(crops) * (1 if config.quick else 4)
        timer, silence = StageTimer(), np.zeros(count * SAMPLES_PER_FRAME, np.float32)
        start = time.perf_counter()
        with timer("write"):
            frames = timer.iterate(None, pipeline.frames(prepared, clip.tensor("audio_features"), count, timer))
            write_video(config.output / f"dubbed_{height}.mp4", frames, silence, AUDIO_SAMPLE_RATE)
        dubbed = count / (time.perf_counter() - start)
        rates = {stage: count / seconds for stage, seconds in timer.seconds.items()}
        report("dubbing", f"{height} lines, frames/s", encode=encoded, **rates, all_but_encode=dubbed)


def write_source(clip: Clip, height: int, path) -> tuple[list[Face], np.ndarray]:
    """Writes a video with the crops of a clip in the middle of larger frames. Returns its faces and boxes (T, 4)."""
    width, side = height * 16 // 9, round(FACE * height)
    corner = np.array([(width - side) // 2, (height - side) // 2])
    usable, landmarks, boxes = np.flatnonzero(clip.usable), clip.tensor("landmarks"), clip.tensor("boxes")
    box = np.concatenate([corner, corner + side]).astype(np.int32)
    faces = []
    for frame in usable:
        points = in_crop(landmarks[frame], boxes[frame, 0]) * side / IMAGE_SIZE + corner
        faces.append(Face(box.astype(np.float32), points.astype(np.float32), 1.0))

    def frames():
        for index in usable:
            crop = clip.image(index)
            frame = cv2.resize(crop, (width, height), interpolation=cv2.INTER_LINEAR)
            frame[corner[1] : corner[1] + side, corner[0] : corner[0] + side] = cv2.resize(crop, (side, side))
            yield frame

    write_video(path, frames(), np.zeros(len(usable) * SAMPLES_PER_FRAME, np.float32), AUDIO_SAMPLE_RATE)
    return faces, np.repeat(box[None], len(usable), axis=0)
