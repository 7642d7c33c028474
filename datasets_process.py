"""A folder of talking-head videos -> the cache that musetalk_trainer.py trains from.

    python datasets_process.py                                             the built-in sample, small models
    python datasets_process.py --hdtf-dir videos --hdtf-samples-dir data/mine --models-dir models

Reads every video below `hdtf_dir`, resamples it to 25 frames per second, tracks and crops the face, encodes the crops
with the VAE and the audio with Whisper. Writes one tensor file and one record per clip into `hdtf_samples_dir` (see
musetalk/data/cache_format.py), a contact sheet of the crops, and a reason for every rejected video.
The videos, and pieces of ten minutes of longer ones, are distributed over `num_workers` processes; the output does not
depend on their number.
To resume after an interruption, run the same command again: completed clips are skipped. A video whose file size has
changed is processed again. `--verify` checks all files of a cache against their sha256.
`identities.json` in `hdtf_dir` is optional and names the person in each video (path without suffix -> name).
`--identities` compares the faces in a cache, tells which identities show one person, and if there are any, proposes
another file: `identities.proposed.json` beside it.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path, PurePath
from typing import Literal

import cv2
import numpy as np
import torch
import tyro
from tqdm import tqdm

from musetalk.cli import Pixels, Share, Shift, Workers, check_constants, run_script
from musetalk.contract import (
    CONTEXT_FRAMES,
    CONTRACTS,
    FEATURES_PER_FRAME,
    SYNC_MEL_RATE,
    VIDEO_FPS,
    WINDOW_STEPS,
    FeatureContract,
)
from musetalk.data.audio import audio_features, clip_audio, sync_mel, window_start
from musetalk.data.cache import Cache, CacheError, verify
from musetalk.data.cache_format import MAX_CLIP_FRAMES, clip_name
from musetalk.data.cache_writer import CacheWriter, JpegBuffer, join_pieces
from musetalk.data.crop import MIN_FACE, Person, crop_clips
from musetalk.data.face import FACE_BACKENDS, load_face_backend
from musetalk.data.face.face import FaceBackend
from musetalk.data.identities import compare_faces
from musetalk.data.references import face_shapes
from musetalk.data.sources import Source, find_sources, independent
from musetalk.data.video import MediaError, file_size, read_audio, read_frames
from musetalk.data.workers import Bar, map_jobs, most_processes
from musetalk.devices import choose_device, describe, supports_bf16
from musetalk.errors import printable
from musetalk.files import atomic_write_bytes, folder_lock
from musetalk.models.audio_encoder import AudioEncoder, load_audio_encoder
from musetalk.models.vae import VAE, load_vae

PASSES = 2  # over every frame: to find the person, then to crop and encode
MIN_FRAMES_PER_PROCESS = 500  # starting a process takes as long as about 200 frames
CONTACT_SHEET = (8, 24, 128)  # columns, maximum rows, pixels of a face


@dataclass
class PrepareConfig:
    """The constants of preprocessing; edit them here or override them on the command line."""

    # Paths
    hdtf_dir: Path = Path("sample")  # videos, searched recursively; sample: the built-in sample
    hdtf_samples_dir: Path = Path("data/cache")  # the cache
    models_dir: Path = Path("models/mini")  # models/mini: the small test set; models: the published weights

    # Features: must match wherever the weights are used
    contract: Literal["rigid", "musetalk_v15", "musetalk_v1"] = "rigid"  # the latter two match the published weights
    bbox_shift: Shift = 0  # source pixels by which the mask border moves down
    margins: tuple[Pixels, ...] = ()  # source pixels below the chin; (): from the contract
    encode_dtype: Literal["float32", "bfloat16", ""] = ""  # "": from the contract, or float32 where bfloat16 is slow

    # Run
    face_backend: Literal["mediapipe", "dwpose", "mmpose"] = "mediapipe"  # MuseTalk uses dwpose
    device: str = "auto"  # all GPUs, or the CPU if there is none; "cpu", "cuda", or a single GPU, "cuda:1"
    num_workers: Workers = field(default_factory=most_processes)  # maximum processes; 0, 1: this process only
    verify: bool = False  # only check the cache against its records
    identities: bool = False  # only compare the faces in the cache
    held_out: Share = 0.1  # share of identities that musetalk_trainer.py holds out, for the warning of `identities`


@dataclass
class Models:
    """The frozen networks and the feature contract."""

    backend: FaceBackend
    vae: VAE
    audio_encoder: AudioEncoder
    contract: FeatureContract


def main(config: PrepareConfig) -> None:
    """Processes all videos of a folder, verifies a cache, or compares the faces in it."""
    check_constants(config)
    if config.verify:
        verify_cache(config.hdtf_samples_dir)
        return
    if config.identities:
        compare_faces(config.hdtf_samples_dir, config.hdtf_dir, config.models_dir, config.held_out)
        return
    device = choose_device(config.device)
    config = replace(config, device=str(device))
    print(f"on {describe(device)}")
    sources = find_sources(config.hdtf_dir)
    frames = sum(source.frames for source in sources)
    with folder_lock(config.hdtf_samples_dir):
        with tqdm(total=PASSES * frames, desc="prepare", unit="frame", unit_scale=1 / PASSES) as bar:
            records = prepare_videos(config, sources, bar)
        report(config.hdtf_samples_dir, records)


def process_count(config: PrepareConfig, sources: list[Source]) -> int:
    """Returns the number of processes for some videos; 0 or 1: this process."""
    frames = sum(source.frames for source in sources)
    return min(config.num_workers, len(independent(sources)), frames // MIN_FRAMES_PER_PROCESS)


def prepare_videos(config: PrepareConfig, sources: list[Source], bar: tqdm) -> list[dict]:
    """Processes videos on `process_count` processes and returns all records."""
    processes = process_count(config, sources)
    if processes > 1:
        jobs = independent(sources)
        results = map_jobs("datasets_process:start_worker", (vars(config),), jobs, processes, bar)
        records = [record for job_records in results.values() for record in job_records]
    else:
        records = start_worker(0, vars(config))(sources, bar)
    return join_pieces(config.hdtf_samples_dir, records)


def start_worker(number: int, constants: dict) -> Callable[[list[Source], Bar], list[dict]]:
    """Loads the networks in the process of an index (`number`) and returns the function that runs a job there."""
    config = PrepareConfig(**constants)
    if config.device == "cuda":
        config = replace(config, device=f"cuda:{number % torch.cuda.device_count()}")
    models = load_models(config)
    return partial(prepare_all, config.hdtf_dir, CacheWriter(config.hdtf_samples_dir, models.contract), models)


def prepare_all(folder: Path, writer: CacheWriter, models: Models, sources: list[Source], bar: Bar) -> list[dict]:
    """Processes videos in order and returns all records. An unusable video is recorded and does not end the run."""
    records = []
    for source in sources:
        bar_start, source_records = bar.n, []
        bar.set_postfix_str(printable(source.path.name))
        metadata: dict[str, str | int] = {"source": source.path.as_posix(), "identity": source.identity}
        try:
            metadata["source_bytes"] = file_size(folder / source.path)
            path, first, stop = folder / source.path, source.first, source.stop
            for record in prepare_source(path, metadata, writer, models, bar, first=first, stop=stop):
                source_records.append(record)
        except MediaError as error:
            if error.kind == "same name":
                rejected = clip_name(source.path) + source.path.suffix
            else:
                rejected = clip_name(source.path, source.first + len(source_records) or None)  # earlier clips are kept
            metadata = {"source_bytes": 0, **metadata}
            source_records.append(writer.reject(rejected, metadata | {"last": True}, error.kind, str(error)))
            bar.write(f"refused: {error}")
        records += source_records
        bar.update(bar_start + PASSES * source.frames - bar.n)
    return records


def load_models(config: PrepareConfig) -> Models:
    """Loads the networks and builds the contract of a configuration. Raises WeightsError, ContractError."""
    base = CONTRACTS[config.contract]
    contract = replace(
        base,
        bbox_shift=config.bbox_shift,
        margins=config.margins or base.margins,
        encode_dtype=config.encode_dtype or (base.encode_dtype if supports_bf16(config.device) else "float32"),
    )
    torch.set_num_threads(1)  # there is a process for each core; with more the last bits depend on the batch size
    device = torch.device(config.device)
    vae = load_vae(config.models_dir, device, getattr(torch, contract.encode_dtype))
    audio_encoder = load_audio_encoder(config.models_dir, device)
    backend = load_face_backend(config.face_backend, config.models_dir, config.device)
    contract = replace(
        contract,
        vae=vae.fingerprint,
        audio_encoder=audio_encoder.fingerprint,
        face_backend=FACE_BACKENDS[config.face_backend],
    )
    return Models(backend, vae, audio_encoder, contract)


def prepare_source(
    source: Path,
    metadata: dict,
    writer: CacheWriter,
    models: Models,
    bar: Bar,
    *,
    first: int = 0,
    stop: int | None = None,
) -> Iterator[dict]:
    """Writes the clips of one video into the cache and yields their records in order, those of earlier runs first.

    metadata: the fields that all its records share. first, stop: see `Source`. Raises MediaError.
    """
    relative = PurePath(metadata["source"])
    finished = writer.finished(metadata, first, stop)
    bar.update(PASSES * sum(record.get("frames", 0) for record in finished))
    yield from finished
    first += len(finished)
    if first == stop or (finished and finished[-1]["last"]):
        return

    # The audio is processed at once, the video clip by clip.
    audio = read_audio(source)
    mel = sync_mel(audio)
    features = audio_features(audio, models.audio_encoder, models.contract)
    frames = counted(read_frames(source, first * MAX_CLIP_FRAMES), bar)
    clips = crop_clips(relative, frames, models.backend, models.contract, first)
    for part, (name, person, last) in enumerate(islice(clips, stop and stop - first), first):
        start = part * MAX_CLIP_FRAMES
        clip_metadata = metadata | {"start": start, "last": last, "device": models.vae.autoencoder.device.type}
        has_face = np.array([face is not None for face in person.faces])
        has_audio = FEATURES_PER_FRAME * (start + np.arange(len(has_face))) < len(features)
        # The windows of the first frames of a later part start before the part: training would see padding where
        # inference sees audio, so these frames are unusable.
        usable = has_face & has_audio & (np.arange(len(has_face)) >= (CONTEXT_FRAMES if part else 0))
        if usable.any():
            audio_inputs = features[FEATURES_PER_FRAME * start :], mel[SYNC_MEL_RATE * start // VIDEO_FPS :]
            tensors = clip_tensors(name, person, counted(person.crops(), bar), usable, audio_inputs, models)
            tensors["audio"] = clip_audio(audio, start, len(usable))
            yield writer.write(name, tensors, clip_metadata)
            continue
        second = start // VIDEO_FPS
        if not has_face.any():
            kind, reason = "no face", f"no face of at least {MIN_FACE} pixels was found from second {second} on"
        elif not (has_face & has_audio).any():
            kind, reason = "no audio", f"its audio ends before its second {second}"
        else:
            kind, reason = "too short", f"no face with audio more than {CONTEXT_FRAMES} frames after second {second}"
        reason = printable(f"{source}: {reason}")
        bar.write(f"refused: {reason}")
        yield writer.reject(name, clip_metadata, kind, reason)


def counted(items: Iterable, bar: Bar) -> Iterator:
    """Yields the items and advances the bar by one for each."""
    for item in items:
        yield item
        bar.update()


def clip_tensors(
    name: str,
    person: Person,
    crops: Iterable[list[np.ndarray] | None],
    usable: np.ndarray,
    audio_inputs: tuple[np.ndarray, np.ndarray],
    models: Models,
) -> dict[str, np.ndarray]:
    """Builds the tensors of a clip, see TENSORS in musetalk/data/cache_format.py.

    crops: those of `person`; only those of usable frames are stored.
    audio_inputs: features and mel from the first frame of the clip to the end of the source.
    """
    features, mel = audio_inputs
    count, jpegs = len(usable), JpegBuffer()
    usable_crops = (images if is_usable else None for images, is_usable in zip(crops, usable, strict=True))
    stored_crops = jpegs.passing(usable_crops, len(models.contract.margins))
    masked_latents, latents = models.vae.encode_clip(name, stored_crops, models.contract)
    face_jpeg, face_jpeg_offsets = jpegs.tensors()
    no_landmarks = np.zeros((68, 2))
    points = np.stack([no_landmarks if face is None else face.landmarks for face in person.faces])
    landmarks = points.astype(np.float32)
    return {
        "face_jpeg": face_jpeg,
        "face_jpeg_offsets": face_jpeg_offsets,
        "latents": latents,
        "masked_latents": masked_latents,
        "audio_features": features[: window_start(count - 1) + WINDOW_STEPS],
        "mel": mel[: SYNC_MEL_RATE * count // VIDEO_FPS + 1],
        "landmarks": landmarks,
        "face_shapes": face_shapes(landmarks),
        "boxes": person.boxes,
        "usable": usable,
    }


def report(folder: Path, records: list[dict]) -> None:
    """Prints a summary and writes the contact sheet. Raises CacheError if no clip could be cached."""
    outcomes = Counter(f"refused: {record['kind']}" if "kind" in record else "cached" for record in records)
    print(
        f"\n{'clips':<24}{'count':>6}\n"
        + "\n".join(f"{outcome:<24}{count:>6}" for outcome, count in sorted(outcomes.items()))
    )
    if rejected := len(records) - outcomes["cached"]:
        print(f"{rejected} refused for the reasons in {folder / 'rejected'}; delete a record there to retry the video")
    if not outcomes["cached"]:
        raise CacheError(f"{folder}: no video is usable; the reasons are in {folder / 'rejected'}")
    cached = [record for record in records if "kind" not in record]
    total, usable, size = (sum(record[key] for record in cached) for key in ("frames", "usable_frames", "bytes"))
    print(f"{usable} of {total} frames usable ({total / VIDEO_FPS:.0f} s), {size / total:.0f} bytes a frame")
    if others := len(list((folder / "clips").glob("*.json"))) - len(cached):
        print(f"{others} more clips in the cache belong to other videos; delete their records if obsolete")
    print(f"cache: {folder}\ncontact sheet: {write_contact_sheet(folder)}")


def verify_cache(folder: Path) -> None:
    """Prints the corrupted clips of a cache. Raises CacheError if there are any."""
    count = len(list((folder / "clips").glob("*.json")))
    errors = []
    for error in tqdm(verify(folder), "verify", count, unit="clip"):
        if error:
            tqdm.write(str(error))
            errors.append(error)
    if errors:
        raise CacheError(f"{folder}: {len(errors)} of {count} clips are corrupted; delete the records named above")
    print(f"{folder}: all {count} clips are intact")


def write_contact_sheet(folder: Path) -> Path:
    """Writes an image of crops: a row for each of at most 24 clips, evenly spaced frames of it in the columns."""
    columns, max_rows, size = CONTACT_SHEET
    clips = list(Cache(folder).clips.values())
    rows = []
    for clip in clips[:: -(-len(clips) // max_rows)]:
        usable = np.flatnonzero(clip.usable)
        if len(usable):
            frames = usable[np.linspace(0, len(usable) - 1, columns).astype(int)]
            row = np.hstack(
                [cv2.resize(clip.image(frame), (size, size), interpolation=cv2.INTER_AREA) for frame in frames]
            )
            rows.append(cv2.putText(row, clip.name, (4, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 255, 0)))
    path = folder / "contact_sheet.png"
    atomic_write_bytes(path, cv2.imencode(".png", np.vstack(rows))[1].tobytes())
    return path


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clusters send it; handled like Ctrl-C
    run_script(main, tyro.cli(PrepareConfig, description=__doc__))
