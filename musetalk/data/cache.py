"""The cache between preprocessing and training. This module alone defines its file names, dtypes and version.

<folder>/contract.json               the feature contract of the cache; every reader checks it
<folder>/clips/<clip>.safetensors    the tensors of a clip, memory-mapped by readers
<folder>/clips/<clip>.json           the record of the clip, written last: it marks the clip as complete
<folder>/rejected/<clip>.json        why a source was rejected

The same input and settings give the same bytes. No file is ever unpickled.
A cache grows without a new version: new tensors are optional, and new fields of records have a default.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path, PurePath
from reprlib import repr as short
from typing import Any, TypeVar

import cv2
import numpy as np
import safetensors
import safetensors.numpy

from musetalk.contract import (
    AUDIO_MARGIN,
    CACHE_FIELDS,
    CONTEXT_FRAMES,
    FEATURES_PER_FRAME,
    IMAGE_SIZE,
    LATENT_CHANNELS,
    LATENT_SIZE,
    SAMPLES_PER_FRAME,
    SYNC_MEL_BINS,
    VIDEO_FPS,
    FeatureContract,
)
from musetalk.data.video import MediaError
from musetalk.errors import UserError, printable
from musetalk.files import atomic_write_bytes, read_json

VERSION = 3  # changes only if caches made before cannot be read any more
MAX_NAME = 200  # bytes; file systems allow 255 including suffixes
MAX_CLIP_FRAMES = 60 * VIDEO_FPS  # a longer source is split into several clips
HDTF_NAME = re.compile(r"^((?:RD|WDA|WRA)_.+)_\d{3}$")
JPEG_OPTIONS = (cv2.IMWRITE_JPEG_QUALITY, 90) + (
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
)

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
}
OPTIONAL_TENSORS = {"audio"}  # absent from clips made before they existed

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

Frames = TypeVar("Frames", int, np.ndarray)


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


def identity_of(source: PurePath, identities: dict[str, str]) -> str:
    """Returns the identity in a source: from identities.json, from HDTF's naming scheme, or else its own path."""
    path = "/".join(_parts(source))
    hdtf = HDTF_NAME.match(source.stem)
    return identities.get(path) or (hdtf[1] if hdtf else path)


class JpegBuffer:
    """Encodes the images of a clip one by one into the tensors `face_jpeg` and `face_jpeg_offsets`."""

    def __init__(self, images: Iterable[np.ndarray | None] = ()) -> None:
        """images: BGR uint8 (256, 256, 3) in the order of the tensor, None for those of unusable frames."""
        self.content, self.offsets = bytearray(), [0]  # one array per image would fragment the heap
        self.extend(images)

    def extend(self, images: Iterable[np.ndarray | None]) -> None:
        """Appends images, see `__init__`."""
        for image in images:
            if image is not None:
                self.content += cv2.imencode(".jpg", image, JPEG_OPTIONS)[1].data
            self.offsets.append(len(self.content))

    def passing(
        self, crops: Iterable[Sequence[np.ndarray] | None], variants: int
    ) -> Iterator[Sequence[np.ndarray] | None]:
        """Yields the K crops of each frame, or None for an unusable frame, unchanged, and appends them."""
        for images in crops:
            self.extend([None] * variants if images is None else images)
            yield images

    def tensors(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns `face_jpeg` and `face_jpeg_offsets` of the images so far."""
        return np.frombuffer(self.content, np.uint8), np.array(self.offsets, np.int64)


def _json_bytes(values: dict) -> bytes:
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # keeps file names that are not UTF-8


def _read_json(path: Path) -> dict:
    try:
        return read_json(path)
    except UserError as error:
        raise CacheError(f"{error}; delete it and run datasets_process.py again") from error


def _read_record(path: Path) -> dict:
    """Reads the record of a clip or of a rejected source. Raises CacheError for a missing or invalid field."""
    fields, defaults = (CLIP_RECORD, CLIP_DEFAULTS) if path.parent.name == "clips" else (REJECTED_RECORD, {})
    values = deepcopy(defaults) | _read_json(path)
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


def _require_source(path: Path, record: dict, metadata: dict) -> None:
    if record["source"] != metadata["source"]:
        raise MediaError("same name", f"{metadata['source']}: {path} belongs to {record['source']}; rename one of them")


class CacheWriter:
    """Writes clips into a cache folder atomically. Guarded by folder_lock against other runs."""

    def __init__(self, folder: Path, contract: FeatureContract) -> None:
        """Opens or creates the folder. Raises ContractError if it was made under another contract."""
        self.folder = folder
        path = folder / "contract.json"
        if path.exists():
            stored = read_contract(folder)
            stored.require(contract, CACHE_FIELDS, str(folder))
            contract.require(stored, ("margins",), "this run")
        else:
            atomic_write_bytes(path, _json_bytes({"version": VERSION, "contract": contract.as_dict(CACHE_FIELDS)}))

    def finished(self, metadata: dict) -> list[dict]:
        """Returns the records of a source's completed clips in order, including rejected ones; [] if there are none.

        metadata: source, source_bytes and identity, as stored in records. The source is complete if its last record
        has "last" set. If the size of the file has changed, its clips are deleted; if its identity has changed, the
        records are updated. Raises MediaError if another source has the same clip name.
        """
        source = PurePath(metadata["source"])
        paths = [path] if (path := self._record(clip_name(source))) else []
        while not path and (part := self._record(clip_name(source, len(paths)))):
            paths.append(part)
        records = [_read_record(path) for path in paths]
        for path, record in zip(paths, records, strict=True):
            _require_source(path, record, metadata)
        if any(record["source_bytes"] != metadata["source_bytes"] for record in records):
            for path in reversed(paths):  # an interrupted deletion leaves the first parts, which the next run finds
                path.unlink()
                path.with_suffix(".safetensors").unlink(missing_ok=True)
            return []
        for path, record in zip(paths, records, strict=True):
            if record["identity"] != metadata["identity"]:
                record["identity"] = metadata["identity"]
                atomic_write_bytes(path, _json_bytes(record))
        return records

    def _record(self, clip: str) -> Path | None:
        """Returns the path of a clip's record, None if the clip is not complete."""
        paths = (self.folder / kind / f"{clip}.json" for kind in ("clips", "rejected"))
        return next((path for path in paths if path.exists()), None)

    def write(self, clip: str, tensors: dict[str, np.ndarray], metadata: dict) -> dict:
        """Writes a clip and returns its record. tensors: see `TENSORS`. metadata: further fields of the record.

        Raises MediaError if another source has the same clip name.
        """
        if path := self._record(clip):
            _require_source(path, _read_record(path), metadata)
        _check_tensors(clip, {name: (tensors[name].dtype, tensors[name].shape) for name in tensors})
        content = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in sorted(tensors.items())})
        record = (
            deepcopy(CLIP_DEFAULTS)
            | metadata
            | {
                "frames": len(tensors["usable"]),
                "usable_frames": int(tensors["usable"].sum()),
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )
        atomic_write_bytes(self.folder / "clips" / f"{clip}.safetensors", content)
        atomic_write_bytes(self.folder / "clips" / f"{clip}.json", _json_bytes(record))
        return record

    def reject(self, clip: str, metadata: dict, kind: str, reason: str) -> dict:
        """Records why a source or a part of it was rejected, and returns the record. kind: category for the report.

        If another source has the same clip name, its record is kept and the suffix of the file is added to the name.
        """
        path = self._record(clip)
        if path and _read_record(path)["source"] != metadata["source"]:
            clip += PurePath(metadata["source"]).suffix
        record = metadata | {"kind": kind, "reason": reason}
        atomic_write_bytes(self.folder / "rejected" / f"{clip}.json", _json_bytes(record))
        return record


def read_contract(folder: Path) -> FeatureContract:
    """Reads the contract of a cache (its cache fields; model fields have their defaults). Raises CacheError."""
    path = folder / "contract.json"
    if not path.exists():
        raise CacheError(f"{folder} is not a cache (it has no contract.json); create one with datasets_process.py")
    values = _read_json(path)
    if values.get("version") != VERSION:
        version = short(values.get("version")).strip("'")
        raise CacheError(
            f"{folder} is a cache of version {version}, this code reads version {VERSION}; "
            "create a new one in another folder with datasets_process.py"
        )
    return FeatureContract.from_dict(values.get("contract"), CACHE_FIELDS, str(path))


class Clip:
    """One clip of a cache. Tensors are read on demand from a memory map."""

    def __init__(self, folder: Path, name: str) -> None:
        """Raises CacheError if the tensor file is missing or does not match `TENSORS` and the record."""
        self.name = name
        self.metadata = _read_record(folder / "clips" / f"{name}.json")
        self.path = path = folder / "clips" / f"{name}.safetensors"
        try:
            self._file = safetensors.safe_open(path, framework="numpy")
            self._slices = {key: self._file.get_slice(key) for key in self._file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as error:
            raise CacheError(f"{path} cannot be read ({error}); {self.repair_hint()}") from error
        dtypes = {
            "U8": np.uint8,
            "I16": np.int16,
            "I32": np.int32,
            "I64": np.int64,
            "F16": np.float16,
            "F32": np.float32,
            "BOOL": np.bool_,
        }
        _check_tensors(
            str(path),
            {
                name: (np.dtype(dtypes.get(rows.get_dtype(), object)), tuple(rows.get_shape()))
                for name, rows in self._slices.items()
            },
        )
        self.identity: str = self.metadata["identity"]
        self.audio_offset: int = self.metadata["audio_offset"]
        has_image = self.tensor("usable")
        self.usable = has_image & self._has_audio(len(has_image))
        self._offsets = self.tensor("face_jpeg_offsets")
        self.variants: int = self._slices["boxes"].get_shape()[1]
        if self.metadata["frames"] != len(self):
            raise CacheError(
                f"{path} has {len(self)} frames, its record says {self.metadata['frames']}; {self.repair_hint()}"
            )
        begins, ends = self._offsets[:-1], self._offsets[1:]
        has_jpeg = (begins < ends).reshape(len(self), self.variants)
        contiguous = begins[0] == 0 and ends[-1] == self.rows("face_jpeg") and (begins <= ends).all()
        if not contiguous or (has_jpeg != has_image[:, None]).any():
            raise CacheError(f"{path}: its images do not match its usable frames; {self.repair_hint()}")

    def __len__(self) -> int:
        return len(self.usable)

    def audio_frame(self, frame: Frames) -> Frames:
        """The frame of the clip's audio (features, mel) that belongs to a frame of its video: audio_offset later.

        Everything that reads a clip's audio reads it there. Outside the clip for some frames, if there is an offset.
        """
        return frame + self.audio_offset

    def _has_audio(self, count: int) -> np.ndarray:
        """Whether each frame has its corrected audio in the clip, bool (count,).

        Windows of audio may still reach beyond the clip by their context, as those of the pipeline do at both ends of
        a file; in a later part of a split source they may not reach before the part, where the pipeline has audio.
        """
        audio = self.audio_frame(np.arange(count))
        first = CONTEXT_FRAMES if self.metadata.get("start") else 0
        stop = min(count, -(-self.rows("audio_features") // FEATURES_PER_FRAME))
        return (audio >= first) & (audio < stop)

    def write_offset(self, offset: int, scores: dict[str, float]) -> None:
        """Stores an audio offset in frames and scores in the clip's record; its tensors are not touched.

        Other scores are kept. Takes effect when the cache is opened next.
        """
        path = self.path.with_suffix(".json")
        record = _read_record(path)
        record["audio_offset"] = offset
        record["scores"] |= scores
        atomic_write_bytes(path, _json_bytes(record))

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
        return name in self._slices

    def rows(self, name: str) -> int:
        """Number of rows of a tensor of `TENSORS`."""
        return self._slices[name].get_shape()[0]

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads rows [start, stop) of a tensor of `TENSORS`, clipped to its length.

        Raises CacheError if the clip lacks this optional tensor.
        """
        if name not in self._slices:
            raise CacheError(f"{self.path} has no tensor {name}; {self.repair_hint()}")
        rows = self._slices[name]
        length, *rest = rows.get_shape()
        stop = length if stop is None else min(stop, length)
        if start >= stop:  # safetensors cannot read empty slices
            return np.zeros((0, *rest), TENSORS[name][0])
        return rows[start:stop]

    def image(self, frame: int, variant: int = 0) -> np.ndarray:
        """Decodes the face crop of a usable frame: BGR uint8 (256, 256, 3). Raises CacheError if there is none."""
        index = frame * self.variants + variant
        jpeg = self.tensor("face_jpeg", int(self._offsets[index]), int(self._offsets[index + 1]))
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


def _check_tensors(source: str, tensors: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> None:
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
