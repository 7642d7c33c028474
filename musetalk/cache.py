"""The cache between preparing and training: the only owner of its file names, dtypes and version.

<folder>/contract.json               under which rules it was made; every reader checks
<folder>/clips/<clip>.safetensors    the tensors of a clip, memory-mapped when read
<folder>/clips/<clip>.json           its record, written last: its existence means the clip is done
<folder>/rejected/<clip>.json        why a source was refused

The same input and settings give the same bytes. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path, PurePath

import cv2
import numpy as np
import safetensors
import safetensors.numpy

from musetalk.contract import (
    CACHE_FIELDS,
    IMAGE_SIZE,
    LATENT_CHANNELS,
    LATENT_SIZE,
    SYNC_MEL_BINS,
    VIDEO_FPS,
    FeatureContract,
)
from musetalk.files import write_whole
from musetalk.script import UserError

VERSION = 1
MAX_CLIP_FRAMES = 60 * VIDEO_FPS  # a longer source becomes several clips
HDTF_NAME = re.compile(r"^((?:RD|WDA|WRA)_.+)_\d{3}$")
JPEG_OPTIONS = (cv2.IMWRITE_JPEG_QUALITY, 90) + (
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
)

# Tensors of a clip: T frames, K margin variants, F audio features, S states of width D, M mel frames, N bytes.
LATENTS = ("T", "K", LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
TENSORS = {
    "face_jpeg": (np.uint8, ("N",)),  # T x K JPEGs one after another, none for an unusable frame
    "face_jpeg_offsets": (np.int64, ("T*K+1",)),  # where each begins, and the end of the last
    "latents": (np.float16, LATENTS),  # of the whole face, scaled as the UNet sees them
    "masked_latents": (np.float16, LATENTS),
    "audio_features": (np.float16, ("F", "S", "D")),
    "mel": (np.float16, ("M", SYNC_MEL_BINS)),  # for the sync expert
    "landmarks": (np.float32, ("T", 68, 2)),  # source pixels
    "boxes": (np.int32, ("T", "K", 4)),  # source pixels, x1 y1 x2 y2
    "usable": (np.bool_, ("T",)),  # a face was found and there is audio
}


class CacheError(UserError):
    """A cache cannot be used. The message names the file, what is wrong and what to do."""


def clip_name(source: PurePath, part: int | None = None) -> str:
    """The name of a clip: the source's path below the folder of videos, then the part's number if it was cut."""
    name = "__".join(source.with_suffix("").parts)
    return name if part is None else f"{name}-{part:04d}"


def identity_of(source: PurePath, identities: dict[str, str]) -> str:
    """Who is in a source: by identities.json, by HDTF's scheme of names, or else a person of its own."""
    path = source.with_suffix("").as_posix()
    hdtf = HDTF_NAME.match(source.stem)
    return identities.get(path) or (hdtf[1] if hdtf else path)


def encode_jpegs(images: Sequence[np.ndarray | None]) -> tuple[np.ndarray, np.ndarray]:
    """BGR uint8 (256, 256, 3) images, None for one that is missing -> `face_jpeg` and `face_jpeg_offsets`."""
    pieces = [
        np.zeros(0, np.uint8) if image is None else cv2.imencode(".jpg", image, JPEG_OPTIONS)[1] for image in images
    ]
    offsets = np.cumsum([0] + [len(piece) for piece in pieces], dtype=np.int64)
    return np.concatenate(pieces), offsets


def _json_bytes(values: dict) -> bytes:
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} cannot be read ({error}); delete it and run datasets_process.py again") from error
    if not isinstance(values, dict):
        raise CacheError(f"{path} holds no JSON object; delete it and run datasets_process.py again")
    return values


class CacheWriter:
    """Clips into a cache folder, each under its name only when complete."""

    def __init__(self, folder: Path, contract: FeatureContract) -> None:
        """Opens or makes the folder. Raises ContractError where it already holds clips made under other rules."""
        self.folder = folder
        path = folder / "contract.json"
        if path.exists():
            have = read_contract(folder)
            have.require(contract, CACHE_FIELDS, str(folder))
            contract.require(have, ("margins",), "this run")
        else:
            write_whole(path, _json_bytes({"version": VERSION, "contract": contract.as_dict(CACHE_FIELDS)}))

    def finished(self, source: PurePath) -> list[dict]:
        """Records of the clips of a source that are done, refused ones included, in order; [] to begin with.

        All is done where the last of them says "last".
        """
        whole = self._record(clip_name(source))
        records = [whole] if whole else []
        while not whole and (record := self._record(clip_name(source, len(records)))):
            records.append(record)
        return records

    def _record(self, clip: str) -> dict | None:
        for kind in ("clips", "rejected"):
            path = self.folder / kind / f"{clip}.json"
            if path.exists():
                return _read_json(path)
        return None

    def write(self, clip: str, tensors: dict[str, np.ndarray], about: dict) -> dict:
        """Store a clip. tensors: as `TENSORS` says. about: what else its record holds. Returns the record."""
        _check_tensors(clip, {name: (tensors[name].dtype, tensors[name].shape) for name in tensors})
        content = safetensors.numpy.save({name: np.ascontiguousarray(tensors[name]) for name in TENSORS})
        record = about | {
            "frames": len(tensors["usable"]),
            "usable_frames": int(tensors["usable"].sum()),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        write_whole(self.folder / "clips" / f"{clip}.safetensors", content)
        write_whole(self.folder / "clips" / f"{clip}.json", _json_bytes(record))
        return record

    def reject(self, clip: str, about: dict, kind: str, reason: str) -> dict:
        """Note why a source or a part of it was refused. kind: a word or two to count by. Returns the record."""
        record = about | {"kind": kind, "reason": reason}
        write_whole(self.folder / "rejected" / f"{clip}.json", _json_bytes(record))
        return record


def read_contract(folder: Path) -> FeatureContract:
    """Under which rules a cache was made (its cache fields; the model fields are defaults). Raises CacheError."""
    path = folder / "contract.json"
    if not path.exists():
        raise CacheError(f"{folder} is no cache of clips (no contract.json in it); make one with datasets_process.py")
    values = _read_json(path)
    if values.get("version") != VERSION:
        raise CacheError(
            f"{folder} is a cache of version {values.get('version')}, this code reads version {VERSION}; "
            "make it again with datasets_process.py in another folder"
        )
    return FeatureContract.from_dict(values.get("contract"), CACHE_FIELDS, str(path))


class Clip:
    """One clip of a cache. Tensors are read when asked for, a few frames at a time, from a memory map."""

    def __init__(self, folder: Path, name: str) -> None:
        """Raises CacheError where the tensors' file is missing or not what `TENSORS` says."""
        self.name = name
        record = folder / "clips" / f"{name}.json"
        self.about = _read_json(record)
        if not isinstance(self.about.get("identity"), str):
            raise CacheError(f"{record} names no identity; delete it and run datasets_process.py again")
        path = folder / "clips" / f"{name}.safetensors"
        try:
            self._file = safetensors.safe_open(path, framework="numpy")
            self._slices = {key: self._file.get_slice(key) for key in self._file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as error:
            raise CacheError(
                f"{path} cannot be read ({error}); delete {name}.json beside it and run datasets_process.py again"
            ) from error
        kinds = {
            "U8": np.uint8,
            "I32": np.int32,
            "I64": np.int64,
            "F16": np.float16,
            "F32": np.float32,
            "BOOL": np.bool_,
        }
        _check_tensors(
            str(path),
            {k: (np.dtype(kinds.get(s.get_dtype(), object)), tuple(s.get_shape())) for k, s in self._slices.items()},
        )
        self.identity: str = self.about["identity"]
        self.usable = self.tensor("usable")
        self._offsets = self.tensor("face_jpeg_offsets")
        self.variants: int = self._slices["boxes"].get_shape()[1]

    def __len__(self) -> int:
        return len(self.usable)

    def rows(self, name: str) -> int:
        """How many rows a tensor of `TENSORS` has."""
        return self._slices[name].get_shape()[0]

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of a tensor of `TENSORS`, as many as there are."""
        rows = self._slices[name]
        length, *rest = rows.get_shape()
        stop = length if stop is None else min(stop, length)
        if start >= stop:  # safetensors has no empty slices
            return np.zeros((0, *rest), TENSORS[name][0])
        return rows[start:stop]

    def image(self, frame: int, variant: int = 0) -> np.ndarray:
        """The face crop of a usable frame, BGR uint8 (256, 256, 3). Raises CacheError for any other frame."""
        index = frame * self.variants + variant
        jpeg = self.tensor("face_jpeg", int(self._offsets[index]), int(self._offsets[index + 1]))
        image = cv2.imdecode(jpeg, cv2.IMREAD_COLOR) if len(jpeg) else None
        if image is None or image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise CacheError(
                f"clip {self.name}: there is no picture of frame {frame}; delete its record and prepare again"
            )
        return image


class Cache:
    """A folder of clips, checked when opened."""

    def __init__(self, folder: Path) -> None:
        """Raises CacheError where it is no cache or has no clip."""
        self.folder = folder
        self.contract = read_contract(folder)
        names = sorted(path.stem for path in (folder / "clips").glob("*.json"))
        if not names:
            raise CacheError(f"{folder} has no clip in it; datasets_process.py says why under rejected/")
        self.clips = {name: Clip(folder, name) for name in names}


def _check_tensors(source: str, found: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> None:
    """Hold names, dtypes and shapes against `TENSORS`, letters standing for one size each. Raises CacheError."""
    if found.keys() != TENSORS.keys():
        odd = ", ".join(sorted(found.keys() ^ TENSORS.keys()))
        raise CacheError(f"{source}: missing or unknown tensors {odd}")
    sizes: dict[str, int] = {}
    for name, (dtype, wanted) in TENSORS.items():
        have_dtype, shape = found[name]
        fits = have_dtype == dtype and len(shape) == len(wanted)
        for size, letter in zip(shape, wanted, strict=False):
            if letter == "T*K+1":
                fits = fits and size == math.prod(found["boxes"][1][:2]) + 1
            else:
                fits = fits and size == (sizes.setdefault(letter, size) if isinstance(letter, str) else letter)
        if not fits:
            raise CacheError(
                f"{source}: tensor {name} is {have_dtype} {shape}, not {np.dtype(dtype)} {wanted}; prepare it again"
            )
