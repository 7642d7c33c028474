"""Draws the pictures and the video of dubbed people in docs/.

    make demo
    python -m tools.draw_dub

docs/demo.jpg: the first held-out clip of the built-in sample as `make demo` dubbed it. docs/dub.jpg and docs/dub.mp4:
test people of GRID (M. Cooke, J. Barker, S. Cunningham, X. Shao 2006, CC BY 4.0) dubbed by the small model in
models/mini, which has never seen them. Each shows the video, the same video dubbed with the words of another clip, and
that other clip.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import tyro

from musetalk.cli import run_script
from musetalk.contract import AUDIO_SAMPLE_RATE, SAMPLES_PER_FRAME
from musetalk.data.crop import RIGID_HALF_HEIGHT, RIGID_HALF_WIDTH, crop_face, face_box
from musetalk.data.dataset import SAMPLE_HELD_OUT
from musetalk.data.face import load_face_backend
from musetalk.data.video import read_audio, read_frames, write_video
from musetalk.inference.pipeline import LipSyncPipeline

MODELS = Path("models/mini")
TEST_PAIRS = (  # the face's clip, and the one whose words it speaks
    ("others/grid_s31_lwiu7s.mpg", "others/grid_s31_bgix9s.mpg"),
    ("s1/swib5a.mp4", "s1/pgby6p.mp4"),
)
ROWS = ("video", "dubbed", "its words")
FRAMES = np.arange(20, 60, 5)  # of a picture, from the middle of GRID's three seconds
PANEL, HEADER = (120, round(120 * RIGID_HALF_HEIGHT / RIGID_HALF_WIDTH)), 24  # px
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class DrawConfig:
    """Folders of videos; override on the command line."""

    grid: Path = Path("../shared/corpus/grid")
    demo: Path = Path("output")  # of demo.ipynb


Clips = tuple[Path, Path, Path]  # video, dubbed, where its words are from


def draw_faces(clips: Clips) -> np.ndarray:
    """The faces of three clips in the same frames, a row for each clip: BGR uint8."""
    backend, rows = load_face_backend("mediapipe", Path(), "cpu"), []
    for name, clip in zip(ROWS, clips, strict=True):
        frames = list(read_frames(clip))
        faces = []
        for index in FRAMES:
            [[face, *_]] = backend.detect([frames[index]])
            box = face_box(face.landmarks, frames[index].shape, crop="rigid")
            assert box is not None
            faces.append(cv2.resize(crop_face(frames[index], box), PANEL, interpolation=cv2.INTER_AREA))
        rows.append(titled(cv2.hconcat(faces), name))
    return cv2.vconcat(rows)


def titled(image: np.ndarray, name: str) -> np.ndarray:
    """An image with a title above."""
    header = np.zeros((HEADER, image.shape[1], 3), np.uint8)
    cv2.putText(header, name, (8, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, WHITE, 1, cv2.LINE_AA)
    return cv2.vconcat([header, image])


def side_by_side(clips: Clips) -> Iterator[np.ndarray]:
    """Frames of three clips beside each other."""
    for images in zip(*map(read_frames, clips), strict=False):
        yield cv2.hconcat([titled(image, name) for name, image in zip(ROWS, images, strict=True)])


def main(config: DrawConfig) -> None:
    """Draws the demo, then dubs and draws the test people."""
    face, speech = (Path("sample") / f"{name}.mp4" for name in SAMPLE_HELD_OUT[:2])
    save(Path("docs/demo.jpg"), draw_faces((face, config.demo / face.name, speech)))

    pipeline = LipSyncPipeline.from_checkpoint(MODELS / "musetalk/unet.safetensors", MODELS)
    pictures, frames, audio = [], [], []
    with TemporaryDirectory() as folder:
        for names in TEST_PAIRS:
            face, speech = (config.grid / name for name in names)
            dubbed = Path(folder) / f"{face.stem}.mp4"
            pipeline(face, speech, dubbed)
            clips = face, dubbed, speech
            pictures.append(draw_faces(clips))
            shown = list(side_by_side(clips))
            frames += shown
            audio.append(np.resize(read_audio(speech), len(shown) * SAMPLES_PER_FRAME))
    save(Path("docs/dub.jpg"), cv2.vconcat(pictures))
    write_video(Path("docs/dub.mp4"), frames, np.concatenate(audio), AUDIO_SAMPLE_RATE)


def save(path: Path, image: np.ndarray) -> None:
    cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 88])


if __name__ == "__main__":
    run_script(main, tyro.cli(DrawConfig, description=__doc__))
