"""Reimplements preparation and data loading of the original MuseTalkTrainer, for comparison.

Does the same work per frame in the same order. Only unpickles files that it has written itself.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from musetalk.contract import IMAGE_SIZE, LATENT_CHANNELS, MASK_TOP
from musetalk.data.audio import audio_windows
from musetalk.data.cache import Cache

MEAN = np.array([104.0, 117.0, 123.0])  # of S3FD's input, BGR
KINDS = ("images", "latents", "whisper_chunks")


def write_samples(folder: Path, cache: Cache) -> None:
    """Writes the frames of a cache in the original's layout.

    A clip is a folder with a PNG, a pickle of masked and full latents (8, 32, 32) and a pickle of the audio window
    (50, 384) for each frame, and a list of these files.
    """
    for clip in cache.clips.values():
        clip_dir = folder / clip.name
        for kind in KINDS:
            (clip_dir / kind).mkdir(parents=True)
        windows = audio_windows(clip.tensor("audio_features"), range(len(clip)), cache.contract).astype(np.float32)
        latents = np.concatenate([clip.tensor("masked_latents")[:, 0], clip.tensor("latents")[:, 0]], axis=1)
        for frame in map(int, np.flatnonzero(clip.usable)):
            cv2.imwrite(str(clip_dir / "images" / f"{frame:08d}.png"), clip.image(frame))
            _dump(clip_dir / "latents" / f"{frame:08d}.pkl", torch.from_numpy(latents[frame].astype(np.float32)))
            _dump(clip_dir / "whisper_chunks" / f"{frame:08d}.pkl", windows[frame])
        names = {kind: sorted(path.name for path in (clip_dir / kind).iterdir()) for kind in KINDS}
        (clip_dir / "config.json").write_text(json.dumps(names))


def _dump(path: Path, value: object) -> None:
    with open(path, "wb") as file:
        pickle.dump(value, file)


def _load(path: str) -> Any:
    with open(path, "rb") as file:
        return pickle.load(file)  # as the original does; only loads files of `_dump`


def read_sample(clips: list[Path], rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    """Reads a training sample: a random frame of a random clip with a random reference; reads the lists each time.

    Returns masked, reference and target latents (4, 32, 32), window (50, 384) and image RGB (3, 256, 256), float32.
    """
    clip = clips[rng.integers(len(clips))]
    with open(clip / "config.json") as file:
        names = json.load(file)
    paths = {kind: [os.path.join(clip, kind, name) for name in names[kind]] for kind in KINDS}
    count = len(paths["images"])
    frame = rng.integers(count)
    reference = (frame + rng.integers(1, count)) % count
    latents, reference_latents = (_load(paths["latents"][index]) for index in (frame, reference))
    window = torch.from_numpy(_load(paths["whisper_chunks"][frame]))
    image = cv2.cvtColor(cv2.imread(paths["images"][frame]), cv2.COLOR_BGR2RGB)
    image = torch.from_numpy(image.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
    return latents[:LATENT_CHANNELS], reference_latents[LATENT_CHANNELS:], latents[LATENT_CHANNELS:], window, image


def crop_frames(video: Path, box: np.ndarray, folder: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Prepares the frames of a video without the networks: decoding, input of the detector, crop and PNG.

    Yields the inputs of the VAE, masked and full, each RGB float32 (1, 3, 256, 256) computed separately from the crop.
    """
    capture = cv2.VideoCapture(str(video))
    x1, y1, x2, y2 = box
    count = 0
    while True:
        success, frame = capture.read()
        if not success:
            break
        torch.from_numpy((frame - MEAN).transpose(2, 0, 1)[None]).float()
        crop = cv2.resize(frame[y1:y2, x1:x2], (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_LANCZOS4)
        cv2.imwrite(str(folder / f"{count:08d}.png"), crop)
        count += 1
        yield vae_input(crop, masked=True), vae_input(crop, masked=False)
    capture.release()


def vae_input(crop: np.ndarray, *, masked: bool) -> torch.Tensor:
    """RGB float32 (1, 3, 256, 256) in [-1, 1] of a crop BGR uint8 (256, 256, 3), its lower half black if masked."""
    image = cv2.cvtColor(crop, cv2.COLOR_BGR2RGB) / 255.0
    image = torch.from_numpy(np.transpose(image[None], (0, 3, 1, 2)).copy()).float()
    if masked:
        image = image * (torch.arange(IMAGE_SIZE) < MASK_TOP)[:, None]
    return (image - 0.5) / 0.5
