"""A folder of talking-head videos -> the cache that musetalk_trainer.py trains from.

    python datasets_process.py                                             the built-in sample, small models
    python datasets_process.py --hdtf-dir videos --hdtf-samples-dir data/mine --models-dir models

Reads every video below `hdtf_dir` (25 frames a second are made of whatever it has), finds and follows the face,
crops and encodes it, and encodes the audio. Writes one file of tensors and one record per clip into
`hdtf_samples_dir` (see musetalk/data/cache.py), a contact sheet of the crops, and a reason for every video it refuses.
Several processes share the videos where there are many (`num_workers`); they give the same bytes as one.
Run the same command again to go on after an interruption: clips that are done are not made again. A video that has
another size than before is prepared anew. `--verify` reads a whole cache and says which of its files have changed.
`identities.json` in `hdtf_dir`, if there is one, says who is in which video (path without ending -> name).
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Literal

import cv2
import numpy as np
import torch
import tyro
from tqdm import tqdm

from musetalk.cli import Pixels, Shift, Workers, check_constants, run_script
from musetalk.contract import (
    CONTEXT_FRAMES,
    CONTRACTS,
    FEATURES_PER_FRAME,
    SYNC_MEL_RATE,
    VIDEO_FPS,
    WINDOW_STEPS,
    FeatureContract,
)
from musetalk.data.audio import audio_features, sync_mel, window_start
from musetalk.data.cache import (
    MAX_CLIP_FRAMES,
    Cache,
    CacheError,
    CacheWriter,
    clip_name,
    encode_jpegs,
    verify,
)
from musetalk.data.crop import MIN_FACE, CroppedClip, crop_clips
from musetalk.data.face import FACE_BACKENDS, load_face_backend
from musetalk.data.face.face import FaceBackend
from musetalk.data.sample import make_sample
from musetalk.data.sources import Source, find_sources, independent
from musetalk.data.video import MediaError, file_size, read_audio, read_frames
from musetalk.data.workers import Bar, map_jobs, most_processes
from musetalk.devices import choose_device, describe, supports_bf16
from musetalk.errors import printable
from musetalk.files import atomic_write_bytes, folder_lock
from musetalk.models.audio_encoder import AudioEncoder, load_audio_encoder
from musetalk.models.vae import VAE, load_vae

SAMPLE_DIR = Path("data/sample")  # where the built-in sample is made
PASSES = 2  # every frame is first looked at, then encoded
FRAMES_A_PROCESS = 500  # at least, or it is not worth its start, which takes as long as some 200
CONTACT_SHEET = (8, 24, 128)  # columns, most rows, pixels of a face


@dataclass
class PrepareConfig:
    """The constants of preparing; edit them here or override them on the command line."""

    # Paths
    hdtf_dir: Path = SAMPLE_DIR  # videos, searched in all subfolders
    hdtf_samples_dir: Path = Path("data/cache")  # the cache
    models_dir: Path = Path("models/mini")  # models/mini: the small set; models: the published weights

    # Features: must be the same wherever the weights are used
    contract: Literal["rigid", "musetalk_v15", "musetalk_v1"] = "rigid"  # the latter two are of the published weights
    bbox_shift: Shift = 0  # source pixels that the border of the mask moves down
    margins: tuple[Pixels, ...] = ()  # source pixels below the chin; () is the contract's own
    encode_dtype: Literal["float32", "bfloat16", ""] = ""  # "" is the contract's own, or float32 where bfloat16 is slow

    # Run
    face_backend: Literal["mediapipe", "dwpose", "mmpose"] = "mediapipe"  # dwpose is what MuseTalk uses
    device: str = "auto"  # all GPUs, or the CPU where there is none; "cpu", "cuda", or one GPU alone: "cuda:1"
    num_workers: Workers = field(default_factory=most_processes)  # the most there will be; 0, 1: this process alone
    verify: bool = False  # make nothing, but hold the cache against its records


@dataclass
class Models:
    """The frozen networks, and the rules they are used under."""

    backend: FaceBackend
    vae: VAE
    audio_encoder: AudioEncoder
    contract: FeatureContract


def main(config: PrepareConfig) -> None:
    """Prepare all videos of a folder, or verify what was prepared."""
    check_constants(config)
    if config.verify:
        verify_cache(config.hdtf_samples_dir)
        return
    device = choose_device(config.device)
    config = replace(config, device=str(device))
    print(f"on {describe(device)}")
    if config.hdtf_dir == SAMPLE_DIR and not SAMPLE_DIR.exists():
        print(f"{SAMPLE_DIR} is not there: making the built-in sample (set hdtf_dir to use your own videos)")
        make_sample(SAMPLE_DIR)
    sources = find_sources(config.hdtf_dir)
    jobs = independent(sources)
    frames = sum(source.frames for source in sources)
    processes = min(config.num_workers, len(jobs), frames // FRAMES_A_PROCESS)
    with folder_lock(config.hdtf_samples_dir):
        with tqdm(total=PASSES * frames, desc="prepare", unit="frame", unit_scale=1 / PASSES) as bar:
            if processes > 1:
                results = map_jobs("datasets_process:start_worker", (vars(config),), jobs, processes, bar)
                records = [record for done in results.values() for record in done]
            else:
                records = start_worker(0, vars(config))(sources, bar)
        report(config.hdtf_samples_dir, records)


def start_worker(number: int, constants: dict) -> Callable[[list[Source], Bar], list[dict]]:
    """Load the networks in this process, the number-th of several; what is left of `prepare_all` is given."""
    config = PrepareConfig(**constants)
    if config.device == "cuda":
        config = replace(config, device=f"cuda:{number % torch.cuda.device_count()}")
    tools = load_tools(config)
    return partial(prepare_all, config.hdtf_dir, CacheWriter(config.hdtf_samples_dir, tools.contract), tools)


def prepare_all(folder: Path, writer: CacheWriter, tools: Models, sources: list[Source], bar: Bar) -> list[dict]:
    """Prepare one video after another; a bad one is recorded and never ends the run. Returns all records."""
    records = []
    for source in sources:
        begun, done = bar.n, []
        bar.set_postfix_str(printable(source.path.name))
        about = {"source": source.path.as_posix(), "identity": source.identity}
        try:
            about["source_bytes"] = file_size(folder / source.path)
            for record in prepare_source(folder / source.path, about, writer, tools, bar):
                done.append(record)
        except MediaError as error:
            if error.kind == "same name":
                refused = clip_name(source.path) + source.path.suffix
            else:
                refused = clip_name(source.path, len(done) or None)  # the clips before stay
            about = {"source_bytes": 0} | about
            done.append(writer.reject(refused, about | {"last": True}, error.kind, str(error)))
            bar.write(f"refused: {error}")
        records += done
        bar.update(begun + PASSES * source.frames - bar.n)
    return records


def load_tools(config: PrepareConfig) -> Models:
    """Networks and contract of a configuration. Raises WeightsError, ContractError."""
    base = CONTRACTS[config.contract]
    contract = replace(
        base,
        bbox_shift=config.bbox_shift,
        margins=config.margins or base.margins,
        encode_dtype=config.encode_dtype or (base.encode_dtype if supports_bf16(config.device) else "float32"),
    )
    if config.device == "cpu":
        torch.set_num_threads(1)  # with more, a batch of another size would give other last bits
    vae = load_vae(config.models_dir, config.device, getattr(torch, contract.encode_dtype))
    audio_encoder = load_audio_encoder(config.models_dir, config.device)
    backend = load_face_backend(config.face_backend, config.models_dir, config.device)
    contract = replace(
        contract,
        vae=vae.fingerprint,
        audio_encoder=audio_encoder.fingerprint,
        face_backend=FACE_BACKENDS[config.face_backend],
    )
    return Models(backend, vae, audio_encoder, contract)


def prepare_source(source: Path, about: dict, writer: CacheWriter, tools: Models, bar: Bar) -> Iterator[dict]:
    """Put the clips of one video into the cache; gives their records in order, those of earlier runs first.

    about: what its records have in common. Raises MediaError.
    """
    relative = PurePath(about["source"])
    finished = writer.finished(about)
    bar.update(PASSES * sum(record.get("frames", 0) for record in finished))
    yield from finished
    if finished and finished[-1]["last"]:
        return

    # Audio of the whole source, its video clip by clip.
    audio = read_audio(source)
    mel = sync_mel(audio)
    features = audio_features(audio, tools.audio_encoder, tools.contract)
    begun = len(finished)
    frames = counted(read_frames(source, begun * MAX_CLIP_FRAMES), bar)
    clips = crop_clips(relative, frames, tools.backend, tools.contract, begun)
    for part, (name, cropped, last) in enumerate(clips, begun):
        start = part * MAX_CLIP_FRAMES
        now = about | {"start": start, "last": last}
        seen = np.array([face is not None for face in cropped.faces])
        heard = FEATURES_PER_FRAME * (start + np.arange(len(seen))) < len(features)
        # What the first frames of a later part hear begins before their clip and is not in it: training would hear the
        # edge of a file where inference hears sound.
        usable = seen & heard & (np.arange(len(seen)) >= (CONTEXT_FRAMES if part else 0))
        if usable.any():
            sound = features[FEATURES_PER_FRAME * start :], mel[SYNC_MEL_RATE * start // VIDEO_FPS :]
            yield writer.write(name, clip_tensors(name, cropped, usable, sound, tools=tools, bar=bar), now)
            continue
        second = start // VIDEO_FPS
        if not seen.any():
            kind, reason = "no face", f"no face of at least {MIN_FACE} pixels was found from second {second} on"
        elif not (seen & heard).any():
            kind, reason = "no audio", f"its audio ends before its second {second}"
        else:
            after = f"more than {CONTEXT_FRAMES} frames after second {second}"
            kind, reason = "too short", f"no face with sound was found {after}, where a part of it begins"
        reason = f"{source}: {reason}"
        bar.write(f"refused: {printable(reason)}")
        yield writer.reject(name, now, kind, printable(reason))


def counted(items: Iterable, bar: Bar) -> Iterator:
    """The items, each moving the bar on."""
    for item in items:
        yield item
        bar.update()


def clip_tensors(
    name: str,
    cropped: CroppedClip,
    usable: np.ndarray,
    sound: tuple[np.ndarray, np.ndarray],
    *,
    tools: Models,
    bar: Bar,
) -> dict[str, np.ndarray]:
    """Tensors of a clip as musetalk/data/cache.py lists them.

    sound: features and mel from the clip's first frame on, to the end of the source's sound.
    """
    features, mel = sound
    count = len(usable)
    none = [None] * len(tools.contract.margins)

    def crops() -> Iterator[np.ndarray | None]:
        return (images if good else None for images, good in zip(cropped.crops, usable, strict=True))

    masked_latents, latents = tools.vae.encode_clip(name, counted(crops(), bar), tools.contract)
    jpegs, offsets = encode_jpegs(image for images in crops() for image in (none if images is None else images))
    unknown = np.zeros((68, 2))
    landmarks = np.stack([unknown if face is None else face.landmarks for face in cropped.faces])
    return {
        "face_jpeg": jpegs,
        "face_jpeg_offsets": offsets,
        "latents": latents,
        "masked_latents": masked_latents,
        "audio_features": features[: window_start(count - 1) + WINDOW_STEPS],
        "mel": mel[: SYNC_MEL_RATE * count // VIDEO_FPS + 1],
        "landmarks": landmarks.astype(np.float32),
        "boxes": cropped.boxes,
        "usable": usable,
    }


def report(folder: Path, records: list[dict]) -> None:
    """Print what became of the videos and draw the contact sheet. Raises CacheError where none could be used."""
    outcomes = Counter(f"refused: {record['kind']}" if "kind" in record else "cached" for record in records)
    print(f"\n{'clips':<24}{'count':>6}\n" + "\n".join(f"{o:<24}{n:>6}" for o, n in sorted(outcomes.items())))
    if refused := len(records) - outcomes["cached"]:
        print(f"{refused} refused for the reasons in {folder / 'rejected'}; delete a record there to try it again")
    if not outcomes["cached"]:
        raise CacheError(f"{folder}: no video could be used; the reasons are in {folder / 'rejected'}")
    cached = [record for record in records if "kind" not in record]
    total, usable, size = (sum(record[key] for record in cached) for key in ("frames", "usable_frames", "bytes"))
    print(f"{usable} of {total} frames usable ({total / VIDEO_FPS:.0f} s), {size / total:.0f} bytes a frame")
    if others := len(list((folder / "clips").glob("*.json"))) - len(cached):
        print(
            f"{others} more clips in the cache are of videos that are not in this folder; delete their records if gone"
        )
    print(f"cache: {folder}\ncontact sheet: {write_contact_sheet(folder)}")


def verify_cache(folder: Path) -> None:
    """Print which clips of a cache are not what was made. Raises CacheError where there is one."""
    count = len(list((folder / "clips").glob("*.json")))
    faults = []
    for fault in tqdm(verify(folder), "verify", count, unit="clip"):
        if fault:
            tqdm.write(str(fault))
            faults.append(fault)
    if faults:
        raise CacheError(
            f"{folder}: {len(faults)} of {count} clips are not what was made; delete the records named above"
        )
    print(f"{folder}: all {count} clips are what was made")


def write_contact_sheet(folder: Path) -> Path:
    """A picture of the crops: a row for each clip (evenly chosen where there are many), a column for each moment."""
    columns, most_rows, size = CONTACT_SHEET
    clips = list(Cache(folder).clips.values())
    rows = []
    for clip in clips[:: -(-len(clips) // most_rows)]:
        usable = np.flatnonzero(clip.usable)
        if len(usable):
            moments = usable[np.linspace(0, len(usable) - 1, columns).astype(int)]
            row = np.hstack(
                [cv2.resize(clip.image(frame), (size, size), interpolation=cv2.INTER_AREA) for frame in moments]
            )
            rows.append(cv2.putText(row, clip.name, (4, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 255, 0)))
    path = folder / "contact_sheet.png"
    atomic_write_bytes(path, cv2.imencode(".png", np.vstack(rows))[1].tobytes())
    return path


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as clusters send it: the same as Ctrl-C
    run_script(main, tyro.cli(PrepareConfig, description=__doc__))
