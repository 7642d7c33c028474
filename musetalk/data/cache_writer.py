"""Writes the cache, see cache_format.py."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path, PurePath

import cv2
import numpy as np
import safetensors.numpy

from musetalk.contract import CACHE_FIELDS, FeatureContract
from musetalk.data.cache import read_contract
from musetalk.data.cache_format import CLIP_DEFAULTS, VERSION, check_tensors, clip_name, json_bytes, read_record
from musetalk.data.video import MediaError
from musetalk.files import atomic_write_bytes

JPEG_OPTIONS = (cv2.IMWRITE_JPEG_QUALITY, 90) + (
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
)


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
            atomic_write_bytes(path, json_bytes({"version": VERSION, "contract": contract.as_dict(CACHE_FIELDS)}))

    def finished(self, metadata: dict, first: int = 0, stop: int | None = None) -> list[dict]:
        """Returns the records of a source's completed clips in order, including rejected ones; [] if there are none.

        metadata: source, source_bytes and identity, as stored in records. first, stop: only consecutive parts from
        `first` on and below `stop`. The source is complete if its last record has "last" set. If the size of the file
        has changed, its clips are deleted; if its identity has changed, the records are updated. Raises MediaError if
        another source has the same clip name.
        """
        source = PurePath(metadata["source"])
        whole = None if first else self._record(clip_name(source))
        paths = [whole] if whole else []
        while not whole and first + len(paths) != stop:
            part = self._record(clip_name(source, first + len(paths)))
            if not part:
                break
            paths.append(part)
        records = [read_record(path) for path in paths]
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
                atomic_write_bytes(path, json_bytes(record))
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
            _require_source(path, read_record(path), metadata)
        check_tensors(clip, {name: (tensors[name].dtype, tensors[name].shape) for name in tensors})
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
        atomic_write_bytes(self.folder / "clips" / f"{clip}.json", json_bytes(record))
        return record

    def reject(self, clip: str, metadata: dict, kind: str, reason: str) -> dict:
        """Records why a source or a part of it was rejected, and returns the record. kind: category for the report.

        If another source has the same clip name, its record is kept and the suffix of the file is added to the name.
        """
        path = self._record(clip)
        if path and read_record(path)["source"] != metadata["source"]:
            clip += PurePath(metadata["source"]).suffix
        record = metadata | {"kind": kind, "reason": reason}
        atomic_write_bytes(self.folder / "rejected" / f"{clip}.json", json_bytes(record))
        return record


def join_pieces(folder: Path, records: Iterable[dict]) -> list[dict]:
    """Ends each video at the first of its records that is the last one, and returns the records up to there.

    records: of all videos; those of a video are in order. Pieces of a video are processed at the same time, so there
    are later parts if it turns out to be unreadable before them. These are removed, as if it had been read in order.
    """
    kept: dict[str, list[dict]] = {}
    for record in records:
        parts = kept.setdefault(record["source"], [])
        if not (parts and parts[-1]["last"]):
            parts.append(record)
    sources = {clip_name(PurePath(source)): source for source in kept}
    for path in [*folder.glob("clips/*.json"), *folder.glob("rejected/*.json")]:
        name, _, part = path.stem.rpartition("-")
        source = sources.get(name)
        if source and part.isdecimal() and int(part) >= len(kept[source]) and read_record(path)["source"] == source:
            path.unlink()
            path.with_suffix(".safetensors").unlink(missing_ok=True)
    return [record for parts in kept.values() for record in parts]
