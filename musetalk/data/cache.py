"""Reads the cache, see cache_format.py."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from reprlib import repr as short
from typing import TypeVar

import cv2
import numpy as np

from musetalk.contract import CACHE_FIELDS, CONTEXT_FRAMES, FEATURES_PER_FRAME, IMAGE_SIZE, FeatureContract
from musetalk.data.cache_format import (
    VERSION,
    CacheError,
    check_tensors,
    json_bytes,
    read_cache_json,
    read_record,
)
from musetalk.data.tensor_file import TensorFile
from musetalk.files import atomic_write_bytes

MAX_OPEN_CLIPS = 128  # of a process, which may have 1,024 open files on most systems

Frames = TypeVar("Frames", int, np.ndarray)


def read_contract(folder: Path) -> FeatureContract:
    """Reads the contract of a cache (its cache fields; model fields have their defaults). Raises CacheError."""
    path = folder / "contract.json"
    if not path.exists():
        raise CacheError(f"{folder} is not a cache (it has no contract.json); create one with datasets_process.py")
    values = read_cache_json(path)
    if values.get("version") != VERSION:
        version = short(values.get("version")).strip("'")
        raise CacheError(
            f"{folder} is a cache of version {version}, this code reads version {VERSION}; "
            "create a new one in another folder with datasets_process.py"
        )
    return FeatureContract.from_dict(values.get("contract"), CACHE_FIELDS, str(path))


@lru_cache(MAX_OPEN_CLIPS)
def _open(clip: Clip) -> TensorFile:
    """Opens the tensor file of a clip, until `MAX_OPEN_CLIPS` others are opened. Raises CacheError."""
    try:
        file = TensorFile(clip.path)
    except (OSError, ValueError) as error:
        raise CacheError(f"{clip.path} cannot be read ({error}); {clip.repair_hint()}") from error
    check_tensors(str(clip.path), file.tensors)
    _, (frames,) = file.tensors["usable"]
    if len(clip) != frames:
        raise CacheError(f"{clip.path} has {frames} frames, its record says {len(clip)}; {clip.repair_hint()}")
    return file


def forget_clips(clips: Iterable[Clip]) -> None:
    """Removes clips from the system's page cache, so that they are read from the disk again, and closes all clips."""
    _open.cache_clear()
    for clip in clips:
        with open(clip.path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Clip:
    """One clip of a cache. Only its record is kept in memory: tensors are read on demand."""

    def __init__(self, folder: Path, name: str) -> None:
        """Raises CacheError if the tensor file is missing or does not match `TENSORS` and the record."""
        self.folder, self.name = folder, name
        self.metadata = read_record(folder / "clips" / f"{name}.json")
        self.identity: str = self.metadata["identity"]
        self.audio_offset: int = self.metadata["audio_offset"]
        has_image, offsets = self.tensor("usable"), self.tensor("face_jpeg_offsets")
        self.variants = (len(offsets) - 1) // len(self)
        begins, ends = offsets[:-1], offsets[1:]
        has_jpeg = (begins < ends).reshape(len(self), self.variants)
        contiguous = begins[0] == 0 and ends[-1] == self.rows("face_jpeg") and (begins <= ends).all()
        if not contiguous or (has_jpeg != has_image[:, None]).any():
            raise CacheError(f"{self.path}: its images do not match its usable frames; {self.repair_hint()}")

    def __len__(self) -> int:
        return self.metadata["frames"]

    @property
    def path(self) -> Path:
        return self.folder / "clips" / f"{self.name}.safetensors"

    @property
    def usable(self) -> np.ndarray:
        """Frames with an image and with their corrected audio in the clip, bool (T,).

        Windows of audio may still reach beyond the clip by their context, as those of the pipeline do at both ends of
        a file; in a later part of a split source they may not reach before the part, where the pipeline has audio.
        """
        first = CONTEXT_FRAMES if self.metadata.get("start") else 0
        stop = -(-self.rows("audio_features") // FEATURES_PER_FRAME)
        usable = self.tensor("usable")
        usable[: max(0, first - self.audio_offset)] = False
        usable[max(0, stop - self.audio_offset) :] = False
        return usable

    def audio_frame(self, frame: Frames) -> Frames:
        """The frame of the clip's audio (features, mel) that belongs to a frame of its video: audio_offset later.

        Everything that reads a clip's audio reads it there. Outside the clip for some frames, if there is an offset.
        """
        return frame + self.audio_offset

    def write_offset(self, offset: int, scores: dict[str, float]) -> None:
        """Stores an audio offset in frames and scores in the clip's record; its tensors are not touched.

        Other scores are kept. Takes effect when the cache is opened next.
        """
        path = self.path.with_suffix(".json")
        record = read_record(path)
        record["audio_offset"] = offset
        record["scores"] |= scores
        atomic_write_bytes(path, json_bytes(record))

    def repair_hint(self) -> str:
        return f"delete {self.name}.json beside it and run datasets_process.py again"

    def verify(self) -> None:
        """Checks the sha256 of the tensor file against the record. Raises CacheError if they differ."""
        with open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.metadata["sha256"]:
            raise CacheError(f"{self.path} is corrupted (its sha256 differs from its record); {self.repair_hint()}")

    def has(self, name: str) -> bool:
        """Whether the clip has a tensor, which may be one of `OPTIONAL_TENSORS`."""
        return name in _open(self).tensors

    def rows(self, name: str) -> int:
        """Number of rows of a tensor of `TENSORS`."""
        _, (length, *_) = _open(self).tensors[name]
        return length

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads rows [start, stop) of a tensor of `TENSORS`, clipped to its length.

        Raises CacheError if the clip lacks this optional tensor.
        """
        if not self.has(name):
            raise CacheError(f"{self.path} has no tensor {name}; {self.repair_hint()}")
        length = self.rows(name)
        stop = length if stop is None else min(stop, length)
        try:
            return _open(self).read(name, min(start, stop), stop)
        except (OSError, ValueError) as error:
            raise CacheError(f"{self.path} cannot be read ({error}); {self.repair_hint()}") from error

    def image(self, frame: int, variant: int = 0) -> np.ndarray:
        """Decodes the face crop of a usable frame: BGR uint8 (256, 256, 3). Raises CacheError if there is none."""
        index = frame * self.variants + variant
        jpeg = self.tensor("face_jpeg", *self.tensor("face_jpeg_offsets", index, index + 2).tolist())
        try:
            image = cv2.imdecode(jpeg, cv2.IMREAD_COLOR) if len(jpeg) else None
        except cv2.error:  # more pixels than OpenCV decodes
            image = None
        if image is None or image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise CacheError(f"{self.path}: frame {frame} has no readable image; {self.repair_hint()}")
        return image


class Cache:
    """A folder of clips, validated when opened."""

    def __init__(self, folder: Path) -> None:
        """Raises CacheError if the folder is not a cache or has no clip."""
        self.folder = folder
        self.contract = read_contract(folder)
        names = sorted(path.stem for path in (folder / "clips").glob("*.json"))
        if not names:
            raise CacheError(f"{folder} has no clips; {folder / 'rejected'} has the reasons")
        self.clips = {name: Clip(folder, name) for name in names}
        for clip in self.clips.values():
            if clip.variants != len(self.contract.margins):
                raise CacheError(
                    f"{clip.path} has {clip.variants} margin variants, contract.json has {len(self.contract.margins)}; "
                    f"{clip.repair_hint()}"
                )

    def listing(self) -> str:
        """Returns a hash of the names, lengths and audio offsets of the clips, in hexadecimal."""
        values = json.dumps({name: (len(clip), clip.audio_offset) for name, clip in self.clips.items()})
        return hashlib.sha256(values.encode()).hexdigest()[:16]


def verify(folder: Path) -> Iterator[CacheError | None]:
    """Reads a whole cache and yields for each clip its error or None. Raises CacheError if there is no cache."""
    read_contract(folder)
    for record in sorted((folder / "clips").glob("*.json")):
        try:
            Clip(folder, record.stem).verify()
        except CacheError as error:
            yield error
        else:
            yield None
