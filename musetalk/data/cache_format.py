"""The files of a cache. This module alone defines their names, dtypes and version.

<folder>/contract.json               the feature contract of the cache; every reader checks it
<folder>/clips/<clip>.safetensors    the tensors of a clip, of which readers read parts
<folder>/clips/<clip>.json           the record of the clip, written last: it marks the clip as complete
<folder>/rejected/<clip>.json        why a source was rejected

cache_writer.py writes them, cache.py reads them. The same input and settings give the same bytes. No file is ever
unpickled. A cache grows without a new version: new tensors are optional, and new fields of records have a default.
"""

from __future__ import annotations

import hashlib
import json
import re
from copy import deepcopy
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from musetalk.contract import (
    AUDIO_MARGIN,
    LATENT_CHANNELS,
    LATENT_SIZE,
    SAMPLES_PER_FRAME,
    SYNC_MEL_BINS,
    VIDEO_FPS,
)
from musetalk.errors import UserError, printable
from musetalk.files import read_json

VERSION = 3  # changes only if caches made before cannot be read any more
MAX_NAME = 200  # bytes; file systems allow 255 including suffixes
MAX_CLIP_FRAMES = 60 * VIDEO_FPS  # a longer source is split into several clips
HDTF_NAME = re.compile(r"^((?:RD|WDA|WRA)_.+)_\d{3}$")

# Tensors of a clip: T frames, K margin variants, F audio features, S states of width D, M mel frames, N bytes.
LATENTS = ("T", "K", LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
TENSORS = {
    "face_jpeg": (np.uint8, ("N",)),  # T x K concatenated JPEGs, empty for unusable frames
    "face_jpeg_offsets": (np.int64, ("T K + 1",)),  # start of each JPEG, and the end of the last one
    "latents": (np.float16, LATENTS),  # of the unmasked face, with the VAE's scaling factor applied
    "masked_latents": (np.float16, LATENTS),
    "audio_features": (np.float16, ("F", "S", "D")),  # from the first frame to the end of the last frame's window
    "mel": (np.float16, ("M", SYNC_MEL_BINS)),  # for the sync expert
    "landmarks": (np.float32, ("T", 68, 2)),  # source pixels
    "boxes": (np.int32, ("T", "K", 4)),  # source pixels, x1 y1 x2 y2
    "usable": (np.bool_, ("T",)),  # has a face, and its whole audio window is in the clip
    "audio": (np.int16, ("640 (T + 30)",)),  # 16 kHz, with 15 frames more on either side, zeros beyond the file
    "face_shapes": (np.float32, ("T", 25, 2)),  # `references.face_shapes` of the landmarks, computed if absent
}
OPTIONAL_TENSORS = {"audio", "face_shapes"}  # absent from clips made before they existed

# Fields of records: those of every record, and those of clips and of rejected sources.
RECORD = {"source": str, "source_bytes": int, "identity": str, "last": bool}
CLIP_RECORD = RECORD | {"frames": int, "usable_frames": int, "bytes": int, "sha256": str}
REJECTED_RECORD = RECORD | {"kind": str, "reason": str}
# Fields of clips that older records lack, with the value of these records.
CLIP_DEFAULTS = {
    "scores": {},  # name -> number, for filters of training
    "audio_offset": 0,  # video frames by which the audio lags the video
}
KNOWN = CLIP_RECORD | REJECTED_RECORD | {"start": int, "device": str, "scores": dict, "audio_offset": int}
MAX_NUMBER = 2**53  # in a record
MIN_NUMBER = {"frames": 1, "audio_offset": -MAX_NUMBER}  # 0 for other fields


class CacheError(UserError):
    """A cache is unusable. The message names the file, the fault and the remedy."""


def clip_name(source: PurePath, part: int | None = None) -> str:
    """Returns the name of a clip: the source's relative path, plus the index of the part if the source was split.

    The name is valid on any file system: control characters are escaped, and a very long name is shortened to a hash
    and its end.
    """
    name = printable("__".join(_parts(source)))
    content = name.encode()
    if len(content) > MAX_NAME:
        name = f"{hashlib.sha256(content).hexdigest()[:16]}-{content[-MAX_NAME // 2 :].decode(errors='ignore')}"
    return name if part is None else f"{name}-{part:04d}"


def _parts(source: PurePath) -> tuple[str, ...]:
    """The parts of a relative path without its suffix; Python 3.13's `with_suffix` refuses names such as "..mp4"."""
    return *source.parent.parts, source.stem


def video_key(source: PurePath) -> str:
    """Returns the key of a source in identities.json: its relative path without its suffix."""
    return "/".join(_parts(source))


def identity_of(source: PurePath, identities: dict[str, str]) -> str:
    """Returns the identity in a source: from identities.json, from HDTF's naming scheme, or else its own path."""
    path = video_key(source)
    hdtf = HDTF_NAME.match(source.stem)
    return identities.get(path) or (hdtf[1] if hdtf else path)


def json_bytes(values: dict) -> bytes:
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # keeps file names that are not UTF-8


def read_cache_json(path: Path) -> dict:
    try:
        return read_json(path)
    except UserError as error:
        raise CacheError(f"{error}; delete it and run datasets_process.py again") from error


def read_record(path: Path) -> dict:
    """Reads the record of a clip or of a rejected source. Raises CacheError for a missing or invalid field."""
    fields, defaults = (CLIP_RECORD, CLIP_DEFAULTS) if path.parent.name == "clips" else (REJECTED_RECORD, {})
    values = deepcopy(defaults) | read_cache_json(path)
    for name in [*fields, *values]:
        if not _is_valid(name, values.get(name)):
            raise CacheError(f"{path} has no valid {name[:40]}; delete it and run datasets_process.py again")
    return values


def _is_valid(name: str, value: Any) -> bool:
    """Checks the value of a field of a record. Unknown fields may be anything but dictionaries and lists."""
    kind: Any = KNOWN.get(name)
    if kind is None:
        return not isinstance(value, dict | list)
    if type(value) is not kind:
        return False
    if kind is dict:
        return all(type(number) in (int, float) and abs(number) < MAX_NUMBER for number in value.values())
    return kind is not int or MIN_NUMBER.get(name, 0) <= value < MAX_NUMBER


def check_tensors(source: str, tensors: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> None:
    """Checks names, dtypes and shapes against `TENSORS`; equal letters are equal sizes. Raises CacheError."""
    missing, unknown = TENSORS.keys() - OPTIONAL_TENSORS - tensors.keys(), tensors.keys() - TENSORS.keys()
    if missing or unknown:
        names = ", ".join(sorted(missing | unknown))
        raise CacheError(f"{source}: missing or unknown tensors {names}; prepare it again")
    frames, variants = (*tensors["boxes"][1], 0, 0)[:2]
    sizes = {"T K + 1": frames * variants + 1, "640 (T + 30)": SAMPLES_PER_FRAME * (frames + 2 * AUDIO_MARGIN)}
    for name, (dtype, shape) in sorted(tensors.items()):
        expected_dtype, expected_shape = TENSORS[name]
        fits = dtype == expected_dtype and len(shape) == len(expected_shape)
        for size, letter in zip(shape, expected_shape, strict=False):
            fits = fits and size == (sizes.setdefault(letter, size) if isinstance(letter, str) else letter)
        if not fits:
            raise CacheError(
                f"{source}: tensor {name} is {dtype} {shape}, not {np.dtype(expected_dtype)} {expected_shape}; "
                "prepare it again"
            )
