"""The cache between preparing and training: the only owner of its file names, dtypes and version.

<folder>/contract.json               under which rules it was made; every reader checks
<folder>/clips/<clip>.safetensors    the tensors of a clip, memory-mapped when read
<folder>/clips/<clip>.json           its record, written last: its existence means the clip is done
<folder>/rejected/<clip>.json        why a source was refused

The same input and settings give the same bytes. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from reprlib import repr as short

import cv2
import numpy as np
import safetensors
import safetensors.numpy
from PIL import Image

from musetalk.contract import (
    CACHE_FIELDS,
    IMAGE_SIZE,
    LATENT_CHANNELS,
    LATENT_SIZE,
    SYNC_MEL_BINS,
    VIDEO_FPS,
    FeatureContract,
)
from musetalk.data.video import MediaError
from musetalk.errors import UserError, printable
from musetalk.files import atomic_write_bytes, read_json

VERSION = 3
MAX_NAME = 200  # bytes; file systems take 255, endings included
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
    "audio_features": (np.float16, ("F", "S", "D")),  # from the first frame on, to where the last one's window ends
    "mel": (np.float16, ("M", SYNC_MEL_BINS)),  # for the sync expert
    "landmarks": (np.float32, ("T", 68, 2)),  # source pixels
    "boxes": (np.int32, ("T", "K", 4)),  # source pixels, x1 y1 x2 y2
    "usable": (np.bool_, ("T",)),  # a face was found, and the clip holds what is heard at it
}

# What the records of clips and of refused sources have in common, and what only those of clips have.
RECORD = {"source": str, "source_bytes": int, "identity": str, "last": bool}
CLIP_RECORD = RECORD | {"frames": int, "usable_frames": int, "bytes": int, "sha256": str}
REJECTED_RECORD = RECORD | {"kind": str, "reason": str}
KNOWN = CLIP_RECORD | REJECTED_RECORD | {"start": int}
LARGEST = 2**53  # number in a record, and numbers in a tensor


class CacheError(UserError):
    """A cache cannot be used. The message names the file, what is wrong and what to do."""


def clip_name(source: PurePath, part: int | None = None) -> str:
    """The name of a clip: the source's path below the folder of videos, then the part's number if it was cut.

    Any file system takes it: control characters are escapes, and of a very long name only its hash and end are left.
    """
    name = printable("__".join(source.with_suffix("").parts))
    content = name.encode()
    if len(content) > MAX_NAME:
        name = f"{hashlib.sha256(content).hexdigest()[:16]}-{content[-MAX_NAME // 2 :].decode(errors='ignore')}"
    return name if part is None else f"{name}-{part:04d}"


def identity_of(source: PurePath, identities: dict[str, str]) -> str:
    """Who is in a source: by identities.json, by HDTF's scheme of names, or else a person of its own."""
    path = source.with_suffix("").as_posix()
    hdtf = HDTF_NAME.match(source.stem)
    return identities.get(path) or (hdtf[1] if hdtf else path)


def encode_jpegs(images: Iterable[np.ndarray | None]) -> tuple[np.ndarray, np.ndarray]:
    """BGR uint8 (256, 256, 3) images, None for one that is missing -> `face_jpeg` and `face_jpeg_offsets`."""
    pieces = [
        np.zeros(0, np.uint8) if image is None else cv2.imencode(".jpg", image, JPEG_OPTIONS)[1] for image in images
    ]
    offsets = np.cumsum([0] + [len(piece) for piece in pieces], dtype=np.int64)
    return np.concatenate(pieces), offsets


def _json_bytes(values: dict) -> bytes:
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # a name that is no UTF-8 comes back from JSON's own escapes


def _read_json(path: Path) -> dict:
    try:
        return read_json(path)
    except UserError as error:
        raise CacheError(f"{error}; delete it and run datasets_process.py again") from error


def _read_record(path: Path, fields: dict[str, type] = RECORD) -> dict:
    """A record, which has these fields. Raises CacheError where what is known is of another kind, or all is nested."""
    values = _read_json(path)
    for name in [*fields, *values]:
        value, kind = values.get(name), KNOWN.get(name)
        fits = not isinstance(value, dict | list) if kind is None else type(value) is kind
        if not fits or (kind is int and not (name == "frames") <= value < LARGEST):
            name = name[:40]
            raise CacheError(f"{path} has no {name} that can be read; delete it and run datasets_process.py again")
    return values


def _require_source(path: Path, record: dict, about: dict) -> None:
    if record["source"] != about["source"]:
        raise MediaError("same name", f"{about['source']}: {path} is of {record['source']}; rename one of them")


class CacheWriter:
    """Clips into a cache folder, each under its name only when complete. One process at a time: see folder_lock."""

    def __init__(self, folder: Path, contract: FeatureContract) -> None:
        """Opens or makes the folder. Raises ContractError where it already holds clips made under other rules."""
        self.folder = folder
        path = folder / "contract.json"
        if path.exists():
            have = read_contract(folder)
            have.require(contract, CACHE_FIELDS, str(folder))
            contract.require(have, ("margins",), "this run")
        else:
            atomic_write_bytes(path, _json_bytes({"version": VERSION, "contract": contract.as_dict(CACHE_FIELDS)}))

    def finished(self, about: dict) -> list[dict]:
        """Records of the clips of a source that are done, refused ones included, in order; [] to begin with.

        about: source, source_bytes and identity, as the records have them. All is done where the last record says
        "last". What was made of a file of another size is deleted; an identity that was given since is put in.
        Raises MediaError where another source has the name.
        """
        source = PurePath(about["source"])
        paths = [path] if (path := self._record(clip_name(source))) else []
        while not path and (part := self._record(clip_name(source, len(paths)))):
            paths.append(part)
        kinds = {"clips": CLIP_RECORD, "rejected": REJECTED_RECORD}
        records = [_read_record(path, kinds[path.parent.name]) for path in paths]
        for path, record in zip(paths, records, strict=True):
            _require_source(path, record, about)
        if any(record["source_bytes"] != about["source_bytes"] for record in records):
            for path in reversed(paths):  # so that what an interruption leaves is still found
                path.unlink()
                path.with_suffix(".safetensors").unlink(missing_ok=True)
            return []
        for path, record in zip(paths, records, strict=True):
            if record["identity"] != about["identity"]:
                record["identity"] = about["identity"]
                atomic_write_bytes(path, _json_bytes(record))
        return records

    def _record(self, clip: str) -> Path | None:
        """Where the record of a clip is, None where it is not done."""
        places = (self.folder / kind / f"{clip}.json" for kind in ("clips", "rejected"))
        return next((path for path in places if path.exists()), None)

    def write(self, clip: str, tensors: dict[str, np.ndarray], about: dict) -> dict:
        """Store a clip. tensors: as `TENSORS` says. about: what else its record holds. Returns the record.

        Raises MediaError where another source has the name.
        """
        if path := self._record(clip):
            _require_source(path, _read_record(path), about)
        _check_tensors(clip, {name: (tensors[name].dtype, tensors[name].shape) for name in tensors})
        content = safetensors.numpy.save({name: np.ascontiguousarray(tensors[name]) for name in TENSORS})
        record = about | {
            "frames": len(tensors["usable"]),
            "usable_frames": int(tensors["usable"].sum()),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        atomic_write_bytes(self.folder / "clips" / f"{clip}.safetensors", content)
        atomic_write_bytes(self.folder / "clips" / f"{clip}.json", _json_bytes(record))
        return record

    def reject(self, clip: str, about: dict, kind: str, reason: str) -> dict:
        """Note why a source or a part of it was refused. kind: a word or two to count by. Returns the record.

        Where another source has the name, its record stays and the ending of the file is added.
        """
        path = self._record(clip)
        if path and _read_record(path)["source"] != about["source"]:
            clip += PurePath(about["source"]).suffix
        record = about | {"kind": kind, "reason": reason}
        atomic_write_bytes(self.folder / "rejected" / f"{clip}.json", _json_bytes(record))
        return record


def read_contract(folder: Path) -> FeatureContract:
    """Under which rules a cache was made (its cache fields; the model fields are defaults). Raises CacheError."""
    path = folder / "contract.json"
    if not path.exists():
        raise CacheError(f"{folder} is no cache of clips (no contract.json in it); make one with datasets_process.py")
    values = _read_json(path)
    if values.get("version") != VERSION:
        version = short(values.get("version")).strip("'")
        raise CacheError(
            f"{folder} is a cache of version {version}, this code reads version {VERSION}; "
            "make it again with datasets_process.py in another folder"
        )
    return FeatureContract.from_dict(values.get("contract"), CACHE_FIELDS, str(path))


class Clip:
    """One clip of a cache. Tensors are read when asked for, a few frames at a time, from a memory map."""

    def __init__(self, folder: Path, name: str) -> None:
        """Raises CacheError where the tensors' file is missing or not what `TENSORS` says."""
        self.name = name
        self.about = _read_record(folder / "clips" / f"{name}.json", CLIP_RECORD)
        self.path = path = folder / "clips" / f"{name}.safetensors"
        try:
            if not path.is_file():  # a pipe would be waited for
                raise FileNotFoundError("it is missing")
            self._file = safetensors.safe_open(path, framework="numpy")
            self._slices = {key: self._file.get_slice(key) for key in self._file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as error:
            raise CacheError(f"{path} cannot be read ({error}); {self.mend()}") from error
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
        if self.about["frames"] != len(self):
            raise CacheError(f"{path} has {len(self)} frames, its record says {self.about['frames']}; {self.mend()}")
        begins, ends = self._offsets[:-1], self._offsets[1:]
        pictures = (begins < ends).reshape(len(self), self.variants)
        whole = begins[0] == 0 and ends[-1] == self.rows("face_jpeg") and (begins <= ends).all()
        if not whole or (pictures != self.usable[:, None]).any():
            raise CacheError(f"{path}: its pictures are not those of its usable frames; {self.mend()}")

    def __len__(self) -> int:
        return len(self.usable)

    def mend(self) -> str:
        return f"delete {self.name}.json beside it and run datasets_process.py again"

    def verify(self) -> None:
        """Read the whole file of tensors. Raises CacheError where it is not the one that the record tells of."""
        with open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.about["sha256"]:
            raise CacheError(f"{self.path} has changed since it was made (its sha256 is another); {self.mend()}")

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
        try:
            size = Image.open(
                io.BytesIO(jpeg), formats=["JPEG"]
            ).size  # by its header: no memory for what claims to be larger
        except (OSError, Image.DecompressionBombError):
            size = None
        image = cv2.imdecode(jpeg, cv2.IMREAD_COLOR) if size == (IMAGE_SIZE, IMAGE_SIZE) else None
        if image is None:
            raise CacheError(f"{self.path}: there is no picture of frame {frame}; {self.mend()}")
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
        for clip in self.clips.values():
            if clip.variants != len(self.contract.margins):
                raise CacheError(f"{clip.path} has {clip.variants} variants, not those of contract.json; {clip.mend()}")

    def listing(self) -> str:
        """A hash of the names and lengths of the clips, as hexadecimal digits."""
        lengths = json.dumps({name: len(clip) for name, clip in self.clips.items()})
        return hashlib.sha256(lengths.encode()).hexdigest()[:16]


def verify(folder: Path) -> Iterator[CacheError | None]:
    """Read all of a cache: for each clip what is wrong with it, or None. Raises CacheError where there is no cache."""
    read_contract(folder)
    for record in sorted((folder / "clips").glob("*.json")):
        try:
            yield Clip(folder, record.stem).verify()
        except CacheError as error:
            yield error


def _check_tensors(source: str, found: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> None:
    """Hold names, dtypes and shapes against `TENSORS`, letters standing for one size each. Raises CacheError."""
    if found.keys() != TENSORS.keys():
        odd = ", ".join(sorted(found.keys() ^ TENSORS.keys()))
        raise CacheError(f"{source}: missing or unknown tensors {odd}")
    sizes: dict[str, int] = {}
    for name, (dtype, wanted) in TENSORS.items():
        have_dtype, shape = found[name]
        fits = have_dtype == dtype and len(shape) == len(wanted) and math.prod(max(1, n) for n in shape) < LARGEST
        for size, letter in zip(shape, wanted, strict=False):
            if letter == "T*K+1":
                fits = fits and size == math.prod(found["boxes"][1][:2]) + 1
            else:
                fits = fits and size == (sizes.setdefault(letter, size) if isinstance(letter, str) else letter)
        if not fits:
            raise CacheError(
                f"{source}: tensor {name} is {have_dtype} {shape}, not {np.dtype(dtype)} {wanted}; prepare it again"
            )
