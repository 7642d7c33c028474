"""A folder of talking-head videos -> the cache that musetalk_trainer.py trains from.

    python datasets_process.py                                             the built-in sample, small models
    python datasets_process.py --hdtf-dir videos --hdtf-samples-dir data/mine --models-dir models

Reads every video below `hdtf_dir` (25 frames a second are made of whatever it has), finds and follows the face,
crops and encodes it, and encodes the audio. Writes one file of tensors and one record per clip into
`hdtf_samples_dir` (see musetalk/cache.py), a contact sheet of the crops, and a reason for every video it refuses.
Run the same command again to go on after an interruption: clips that are done are not made again. A video that has
another size than before is prepared anew. `--verify` reads a whole cache and says which of its files have changed.
`identities.json` in `hdtf_dir`, if there is one, says who is in which video (path without ending -> name).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Literal

import cv2
import numpy as np
import torch
import tyro
from tqdm import tqdm

from musetalk.audio import audio_features, sync_mel, window_start
from musetalk.cache import (
    MAX_CLIP_FRAMES,
    Cache,
    CacheError,
    CacheWriter,
    clip_name,
    encode_jpegs,
    identity_of,
    verify,
)
from musetalk.contract import (
    CONTEXT_FRAMES,
    CONTRACTS,
    FEATURES_PER_FRAME,
    SYNC_MEL_RATE,
    VIDEO_FPS,
    WINDOW_STEPS,
    FeatureContract,
)
from musetalk.crop import MIN_FACE, CroppedClip, crop_clips
from musetalk.face import FACE_BACKENDS, FaceBackend, load_face_backend
from musetalk.files import own_folder, read_json, write_whole
from musetalk.models.audio_encoder import AudioEncoder, load_audio_encoder
from musetalk.models.vae import VAE, load_vae
from musetalk.sample import make_sample
from musetalk.script import Device, Pixels, Shift, UserError, check_constants, printable, run_script
from musetalk.video import MediaError, count_frames, file_size, read_audio, read_frames

VIDEO_ENDINGS = {".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv"}
SAMPLE_DIR = Path("data/sample")  # where the built-in sample is made
PASSES = 2  # every frame is first looked at, then encoded
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
    encode_dtype: Literal["float32", "bfloat16", ""] = ""  # bfloat16 takes half the time; "" is the contract's own

    # Run
    face_backend: Literal["mediapipe", "dwpose", "mmpose"] = "mediapipe"  # dwpose is what MuseTalk uses
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    verify: bool = False  # make nothing, but hold the cache against its records


@dataclass
class Tools:
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
    # Load the networks first, so that a wrong constant costs no time.
    tools = load_tools(config)
    if config.hdtf_dir == SAMPLE_DIR and not SAMPLE_DIR.exists():
        print(f"{SAMPLE_DIR} is not there: making the built-in sample (set hdtf_dir to use your own videos)")
        make_sample(SAMPLE_DIR)
    sources, identities = find_videos(config.hdtf_dir), read_identities(config.hdtf_dir)
    with own_folder(config.hdtf_samples_dir):
        writer = CacheWriter(config.hdtf_samples_dir, tools.contract)
        records = prepare_all(config.hdtf_dir, sources, identities, writer, tools)
        report(config.hdtf_samples_dir, records)


def prepare_all(
    folder: Path, sources: list[Path], identities: dict[str, str], writer: CacheWriter, tools: Tools
) -> list[dict]:
    """Prepare one video after another; a bad one is recorded and never ends the run. Returns all records."""
    records = []
    expected = [PASSES * expected_frames(source) for source in sources]
    with tqdm(total=sum(expected), desc="prepare", unit="frame", unit_scale=1 / PASSES) as bar:
        for index, source in enumerate(sources):
            relative = source.relative_to(folder)
            bar.set_postfix_str(printable(source.name))
            about = {"source": relative.as_posix(), "identity": identity_of(relative, identities)}
            done = []
            try:
                about["source_bytes"] = file_size(source)
                for record in prepare_source(source, about, writer, tools, bar):
                    done.append(record)
            except MediaError as error:
                if error.kind == "same name":
                    refused = clip_name(relative) + relative.suffix
                else:
                    refused = clip_name(relative, len(done) or None)  # the clips before stay
                about = {"source_bytes": 0} | about
                done.append(writer.reject(refused, about | {"last": True}, error.kind, str(error)))
                bar.write(f"refused: {error}")
            records += done
            bar.update(sum(expected[: index + 1]) - bar.n)
    return records


def find_videos(folder: Path) -> list[Path]:
    """All videos below a folder, sorted; links are followed, but into no folder twice.

    Raises MediaError where there is no folder or no video, OSError for a folder that cannot be read.
    """
    if not folder.is_dir():
        raise MediaError("unreadable", f"{folder}: there is no such folder; set hdtf_dir to your folder of videos")
    found, visited, tops = [], set(), [folder]
    for top in tops:
        for here, folders, files in os.walk(top, onerror=_raise):
            if os.path.realpath(here) in visited:
                folders.clear()
                continue
            visited.add(os.path.realpath(here))
            folders.sort()
            found += (Path(here, name) for name in files if Path(name).suffix.lower() in VIDEO_ENDINGS)
            links = (Path(here, name) for name in folders if Path(here, name).is_symlink())
            tops += (link for link in links if not folder.resolve().is_relative_to(link.resolve()))
    if not found:
        raise MediaError("no video", f"{folder}: no video in it ({', '.join(sorted(VIDEO_ENDINGS))})")
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def read_identities(folder: Path) -> dict[str, str]:
    """identities.json of a folder of videos, {} where there is none. Raises UserError where it is unfit."""
    path = folder / "identities.json"
    identities = read_json(path) if os.path.lexists(path) else {}  # a link to nothing is a fault
    if not all(isinstance(name, str) for name in identities.values()):
        raise UserError(f'{path}: must be one object of "path without ending": "name of the person"')
    return identities


def load_tools(config: PrepareConfig) -> Tools:
    """Networks and contract of a configuration. Raises WeightsError, ContractError."""
    base = CONTRACTS[config.contract]
    contract = replace(
        base,
        bbox_shift=config.bbox_shift,
        margins=config.margins or base.margins,
        encode_dtype=config.encode_dtype or base.encode_dtype,
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
    return Tools(backend, vae, audio_encoder, contract)


def expected_frames(source: Path) -> int:
    """Frames of a video by its own word, for the progress bar; 0 where it cannot be read, which is said later."""
    try:
        return count_frames(source)
    except MediaError:
        return 0


def prepare_source(source: Path, about: dict, writer: CacheWriter, tools: Tools, bar: tqdm) -> Iterator[dict]:
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
            yield writer.write(name, clip_tensors(name, cropped, usable, *sound, tools, bar), now)
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


def counted(items: Iterable, bar: tqdm) -> Iterator:
    """The items, each moving the bar on."""
    for item in items:
        yield item
        bar.update()


def clip_tensors(
    name: str,
    cropped: CroppedClip,
    usable: np.ndarray,
    features: np.ndarray,
    mel: np.ndarray,
    tools: Tools,
    bar: tqdm,
) -> dict[str, np.ndarray]:
    """Tensors of a clip as musetalk/cache.py lists them.

    features, mel: from the clip's first frame on, to the end of the source's sound.
    """
    count = len(usable)
    crops = [faces if good else None for faces, good in zip(cropped.crops, usable, strict=True)]
    masked_latents, latents = tools.vae.encode_clip(name, counted(crops, bar), tools.contract)
    none = [None] * len(tools.contract.margins)
    jpegs, offsets = encode_jpegs([image for faces in crops for image in faces or none])
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
    write_whole(path, cv2.imencode(".png", np.vstack(rows))[1].tobytes())
    return path


if __name__ == "__main__":
    run_script(main, tyro.cli(PrepareConfig, description=__doc__))
