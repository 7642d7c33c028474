"""The built-in sample: eight short clips of an animated, babbling portrait, rendered without downloads.

`make_sample(folder)` writes `sample_00.mp4` ... `sample_07.mp4` (10.4 s, 25 fps, H.264 + AAC) and
`identities.json`. The portrait is the NASA photograph of Eileen Collins that scikit-image carries (public
domain). A random sequence of phones drives both audio and video: a formant synthesiser speaks it, and a smoothed
copy opens, spreads and rounds the mouth. So the audio predicts the lips, as in a real video.

Coordinates x, y and lengths are pixels of the 512x512 portrait; frames show a region of it magnified by `ZOOM`.
Shape legend: T video frames, N audio samples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from scipy import ndimage, signal
from skimage import data
from tqdm import tqdm

from musetalk.contract import AUDIO_SAMPLE_RATE, VIDEO_FPS
from musetalk.data.video import write_video
from musetalk.files import atomic_write_bytes, folder_lock

# One seed per clip, found by search: mouths open wide, and no two tracks correlate by 0.1 or more.
SEEDS: tuple[int, ...] = (93, 94, 278, 732, 1533, 1890, 3203, 3826)
NUM_FRAMES = 260  # 10.4 s
FRAME_SIZE = 384  # px, frames are square
ZOOM = 1.75  # frame px per portrait px: a face of about 160 px
VIEW_CENTRE = (224.0, 116.0)  # x, y of the portrait in the middle of the frame

# The smiling mouth of the portrait, measured by hand: both inner lip edges are parabolas between the corners, below
# a slightly tilted line.
MOUTH_X, MOUTH_HALF_WIDTH = 224.2, 21.5
CORNER_Y, CORNER_SLOPE = 140.1, 0.015
UPPER_SAG, LOWER_SAG = 2.7, 10.8  # depth of the inner edges under the corner line
TEETH_SAG = 9.2  # depth of the lower end of the upper teeth
CHIN_Y = 177.0

MIN_GAP, MAX_GAP = 0.7, 23.0  # portrait px between the lips, closed and wide open (eyes: 61 px apart)
CAVITY, TONGUE = (20, 16, 38), (66, 62, 138)  # BGR
TEETH_TINT, LIP_TINT = (0.82, 0.88, 0.91), (0.66, 0.64, 0.88)

TICKS = 1000  # controls per second
VOICE_BLUR, MOUTH_BLUR = 0.012, 0.04  # s, Gaussian sigma of the voice and of the jaw


@dataclass(frozen=True)
class Phone:
    """A speech sound and its mouth shape."""

    formants: tuple[int, ...]  # Hz
    gain: float  # loudness, 1 is the loudest vowel
    opening: float  # 0 lips together .. 1 wide open
    width: float  # of the mouth; 1: the smile of the portrait
    noise: bool = False  # hiss instead of voice


VOWELS = {  # average formants of Peterson and Barney, "Control methods used in a study of the vowels" (1952)
    "a": Phone((730, 1090, 2440), 1.0, 1.0, 0.80),
    "e": Phone((530, 1840, 2480), 0.8, 0.65, 0.95),
    "i": Phone((270, 2290, 3010), 0.6, 0.35, 1.0),
    "o": Phone((570, 840, 2410), 0.8, 0.6, 0.68),
    "u": Phone((300, 870, 2240), 0.55, 0.35, 0.62),
}
CONSONANTS = {
    "m": Phone((250, 1000, 2200), 0.30, 0.0, 0.84),
    "n": Phone((250, 1700, 2600), 0.30, 0.15, 0.88),
    "l": Phone((360, 1300, 2700), 0.40, 0.3, 0.88),
    "s": Phone((4800, 5800, 7000), 0.18, 0.1, 0.95, noise=True),
    "S": Phone((2400, 3400, 5200), 0.22, 0.15, 0.68, noise=True),
    "p": Phone((700, 1300, 2400), 0.10, 0.0, 0.82, noise=True),
    "t": Phone((3200, 4200, 6000), 0.14, 0.1, 0.9, noise=True),
}
PHONES = VOWELS | CONSONANTS
REST_WIDTH = 0.84


@dataclass(frozen=True)
class Script:
    """Audio and mouth movement of a clip. Frame k shows the mouth at (k + 0.5) / 25 s."""

    audio: np.ndarray  # float32 (N,), in [-1, 1], 16 kHz
    opening: np.ndarray  # float32 (T,), 0 lips together .. 1 widest
    width: np.ndarray  # float32 (T,), 1 is the width in the portrait
    speaking: np.ndarray  # bool (T,), False in the pauses between phrases


def clip_script(index: int) -> Script:
    """Generates the script of clip `index`, deterministically."""
    rng = np.random.default_rng(SEEDS[index])
    score = _score(rng, tempo=rng.uniform(0.85, 1.15))
    audio = _speak(score, pitch=rng.uniform(95, 230), rng=rng)

    # The mouth follows the score slowly, sampled at the middle of each frame
    slow = ndimage.gaussian_filter1d(score, MOUTH_BLUR * TICKS, axis=1)
    loudness = slow.sum(0)
    opening = np.array([phone.opening for phone in PHONES.values()]) @ slow
    width = REST_WIDTH + np.array([phone.width - REST_WIDTH for phone in PHONES.values()]) @ slow
    middle = ((np.arange(NUM_FRAMES) + 0.5) * TICKS / VIDEO_FPS).astype(int)
    opening, width = (track[middle].astype(np.float32) for track in (opening, width))
    return Script(audio, opening, width, loudness[middle] > 0.02)


def _score(rng: np.random.Generator, tempo: float) -> np.ndarray:
    """Generates random phrases of syllables: (phones, ticks), the stress of the active phone in [0.7, 1], else 0."""
    names, vowels, consonants = list(PHONES), list(VOWELS), list(CONSONANTS)
    score = np.zeros((len(names), NUM_FRAMES * TICKS // VIDEO_FPS))
    now = rng.uniform(0.1, 1.0)
    while now < score.shape[1] / TICKS:
        end_of_phrase = now + rng.uniform(1.0, 2.3)
        while now < end_of_phrase:
            syllable, consonant = rng.uniform(0.14, 0.30) / tempo, rng.uniform(0.05, 0.09)
            stress = rng.uniform(0.7, 1.0)
            for name, duration in (
                (rng.choice(consonants), consonant),
                (rng.choice(vowels), syllable - consonant),
            ):
                score[names.index(name), round(now * TICKS) : round((now + duration) * TICKS)] = stress
                now += duration
        now += rng.uniform(0.35, 0.9)
    score[:, -round(0.25 * TICKS) :] = 0
    return score


def _speak(score: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """Formant synthesis, float32 (N,): a glottal pulse train or noise through three resonators per phone."""
    num_samples = score.shape[1] * AUDIO_SAMPLE_RATE // TICKS
    seconds = (np.arange(num_samples) + 0.5) / AUDIO_SAMPLE_RATE
    ticks = (np.arange(score.shape[1]) + 0.5) / TICKS  # s
    melody = ndimage.gaussian_filter1d(rng.standard_normal(len(ticks)), 0.12 * TICKS)
    melody = np.interp(seconds, ticks, melody / melody.std())
    cycles = np.cumsum(pitch * (1 + 0.12 * melody)) / AUDIO_SAMPLE_RATE
    noise = rng.standard_normal(num_samples)
    pulses = np.diff(np.floor(cycles), prepend=0.0)
    voice = signal.lfilter([1.0], [1.0, -0.9], pulses + 0.01 * noise)  # falling spectrum with breath noise

    controls = ndimage.gaussian_filter1d(score, VOICE_BLUR * TICKS, axis=1)
    audio = 0.0005 * rng.standard_normal(num_samples)  # room noise
    for phone, control in zip(PHONES.values(), controls, strict=True):
        sound = signal.sosfilt(_resonators(phone), noise if phone.noise else voice)
        audio += 0.16 * phone.gain * np.interp(seconds, ticks, control) * sound / sound.std()
    return np.clip(audio, -1, 1).astype(np.float32)


def _resonators(phone: Phone) -> np.ndarray:
    """Returns a two-pole resonator per formant as second-order sections (Klatt, JASA 67, 1980)."""
    sections = []
    for formant in phone.formants:
        radius = np.exp(-np.pi * (60 + 0.05 * formant) / AUDIO_SAMPLE_RATE)
        denominator = [1.0, -2 * radius * np.cos(2 * np.pi * formant / AUDIO_SAMPLE_RATE), radius**2]
        sections.append([sum(denominator), 0.0, 0.0, *denominator])
    return np.array(sections)


def render_frames(index: int) -> Iterator[np.ndarray]:
    """Renders the frames of clip `index`, BGR uint8 (384, 384, 3), lazily."""
    script = clip_script(index)
    rng = np.random.default_rng((SEEDS[index], 1))
    portrait = cv2.cvtColor(data.astronaut(), cv2.COLOR_RGB2BGR)
    tables = _light(rng)
    for k, (x, y) in enumerate(_head_motion(rng)):
        frame = _talk(portrait, x, y, script.opening[k], script.width[k])
        yield cv2.LUT(frame, tables[k])


def _drift(rng: np.random.Generator, amplitude: float) -> np.ndarray:
    """Returns a slow smooth drift within [-amplitude, amplitude], (T,)."""
    seconds = np.arange(NUM_FRAMES) / VIDEO_FPS
    periods, phases = rng.uniform(2.5, 9.0, 3), rng.uniform(0, 2 * np.pi, 3)
    return amplitude * np.sin(2 * np.pi * seconds[:, None] / periods + phases).mean(1)


def _light(rng: np.random.Generator) -> np.ndarray:
    """Returns lookup tables uint8 (T, 1, 256, 3) of gain, gamma and warmth, which drift within a clip."""
    gain = rng.uniform(0.85, 1.08) + _drift(rng, 0.06)
    gamma = rng.uniform(0.85, 1.2) + _drift(rng, 0.05)
    warmth = rng.uniform(-0.06, 0.06) + _drift(rng, 0.03)
    channels = gain[:, None] * (1 + warmth[:, None] * np.array([-1, 0, 1]))  # BGR
    levels = np.linspace(0, 1, 256) ** gamma[:, None]
    return np.clip(255 * levels[:, None, :, None] * channels[:, None, None], 0, 255).round().astype(np.uint8)


def _head_motion(rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields for each frame the portrait coordinates of every pixel: x, y, each float32 (384, 384).

    The head drifts, tilts and approaches; the background follows it only partly.
    """
    right, down = _drift(rng, 7.0), _drift(rng, 5.0)  # portrait px
    tilt, zoom = np.radians(_drift(rng, 6.0)), 1 + _drift(rng, 0.05)
    axis = (np.arange(FRAME_SIZE, dtype=np.float32) - (FRAME_SIZE - 1) / 2) / ZOOM
    x, y = np.meshgrid(axis, axis)  # from the middle of the frame
    follow = 0.35 + 0.65 * _fade(np.hypot(x / 80, y / 90) - 1)
    for k in range(NUM_FRAMES):
        cos, sin = np.cos(tilt[k]) / zoom[k], np.sin(tilt[k]) / zoom[k]
        head_x = cos * (x - right[k]) + sin * (y - down[k])
        head_y = cos * (y - down[k]) - sin * (x - right[k])
        yield (
            (VIEW_CENTRE[0] + x + follow * (head_x - x)).astype(np.float32),
            (VIEW_CENTRE[1] + y + follow * (head_y - y)).astype(np.float32),
        )


def _fade(distance: np.ndarray) -> np.ndarray:
    """Smooth step: 1 where distance <= 0, 0 where distance >= 1."""
    distance = np.clip(distance, 0, 1)
    return 1 - distance * distance * (3 - 2 * distance)


def _talk(portrait: np.ndarray, x: np.ndarray, y: np.ndarray, opening: float, width: float) -> np.ndarray:
    """Renders the portrait at x, y with another mouth: uint8 (H, W, 3).

    The skin is warped with a discontinuity along the mouth: above, it follows the upper lip, below, the lower lip and
    the jaw. The inside of the mouth is painted.
    """
    gap = MIN_GAP + (MAX_GAP - MIN_GAP) * float(opening)
    rounding = 1 - float(width)

    # Narrow or spread: the portrait column that each pixel shows
    near = _fade(np.hypot((x - MOUTH_X) / 40, (y - 150) / 30))
    column = x + (x - MOUTH_X) * (rounding / width) * near
    t = (column - MOUTH_X) / MOUTH_HALF_WIDTH
    arch = np.clip(1 - t * t, 0, None)

    # Inner lip edges in the portrait and in this frame: opening lowers the corners, rounding lowers everything
    corners = CORNER_Y + CORNER_SLOPE * (column - MOUTH_X)
    source_upper, source_lower = corners + UPPER_SAG * arch**2, corners + LOWER_SAG * arch
    fall = (6 * rounding + 0.25 * gap) * _fade((np.abs(t) - 1) / 1.2)
    upper = corners + fall + (UPPER_SAG - 0.25 * gap) * arch
    lower = upper + gap * arch**0.75

    # The skin moves with the nearby lip, further down with the jaw, and not at all far away
    above, below = upper - y, y - lower
    wider = gap - (LOWER_SAG - UPPER_SAG)  # than in the portrait
    jaw = wider * (0.75 if wider > 0 else 0.35) * _fade(np.abs(x - MOUTH_X) / 46)
    with_lip = _fade((below - 5) / 20)
    upper_shift = (upper - source_upper) * _fade((above - 4) / 14)
    lower_shift = (jaw + with_lip * (lower - source_lower - jaw)) * _fade((y - CHIN_Y - 6) / 36)
    # Rounded lips are thicker
    upper_shift -= 1.1 * rounding * above * _fade(above / 12)
    lower_shift += 1.1 * rounding * below * _fade(below / 16)
    row = y - np.where(above > below, upper_shift, lower_shift)
    frame = cv2.remap(portrait, column, row, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)

    # Paint the rows of the mouth: the sides of a wide lower lip, which is thin in the portrait, then the inside
    coverage = np.clip(0.5 + ZOOM * np.minimum(-above, -below) / 1.5, 0, 1) * (arch > 0)  # anti-aliased
    rows = slice(*(np.flatnonzero(coverage.any(axis=1))[[0, -1]] + (0, 8)))
    depth = below[rows] / np.hypot(1, 1.5 * gap * t[rows] / MOUTH_HALF_WIDTH)  # px into the lip
    lip = 0.8 * _fade(np.abs(depth) / 4.5) * np.abs(t[rows]) * np.sqrt(arch[rows])
    skin = _over(frame[rows], frame[rows] * np.array(LIP_TINT, np.float32), lip * np.clip(gap / 8, 0, 1))
    inside = _inside_mouth(portrait, x[rows], y[rows], above[rows], below[rows])
    frame[rows] = _over(skin, inside, coverage[rows]).round()
    return frame


def _inside_mouth(
    portrait: np.ndarray, x: np.ndarray, y: np.ndarray, above: np.ndarray, below: np.ndarray
) -> np.ndarray:
    """Renders the inside of the mouth, float32 (H, W, 3): cavity, tongue, upper teeth and a shadow.

    above, below: px above the edge of the upper lip and below that of the lower one, negative inside.
    The teeth are those of the portrait and fixed to the head.
    """
    tongue = 0.8 * _fade(np.hypot((x - MOUTH_X) / 15, below / 9) ** 2)
    inside = _over(np.array(CAVITY, np.float32), np.array(TONGUE, np.float32), tongue)
    arch = np.clip(1 - ((x - MOUTH_X) / MOUTH_HALF_WIDTH) ** 2, 0, None)
    corners = CORNER_Y + CORNER_SLOPE * (x - MOUTH_X)
    top, end = corners + (UPPER_SAG + 1.5) * arch**2, corners + TEETH_SAG * arch
    teeth = cv2.remap(portrait, x, np.clip(y, top, end - 0.5), cv2.INTER_CUBIC) * np.array(TEETH_TINT, np.float32)
    inside = _over(inside, teeth, np.clip(0.5 + ZOOM * (end - y) / 2, 0, 1))
    return inside * (0.35 + 0.65 * np.clip(-above / 4, 0, 1))[..., None]


def _over(under: np.ndarray, colour: np.ndarray, coverage: np.ndarray) -> np.ndarray:
    """Blends a colour over another. coverage: (H, W) in [0, 1]."""
    return under + coverage[..., None] * (colour - under)


def make_sample(folder: Path) -> list[Path]:
    """Renders the sample clips and `identities.json` into a new folder, atomically, and returns the paths of the clips.

    Raises FileExistsError. Takes about a minute.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} already exists; choose a new folder for the sample")
    unfinished = folder.with_name(folder.name + ".unfinished")
    names = [f"sample_{index:02d}" for index in range(len(SEEDS))]
    with folder_lock(unfinished) as lock:
        for index, name in enumerate(tqdm(names, "sample", unit="clip")):
            audio = clip_script(index).audio
            write_video(unfinished / f"{name}.mp4", render_frames(index), audio, AUDIO_SAMPLE_RATE)
        identities = dict.fromkeys(names, "astronaut")
        atomic_write_bytes(unfinished / "identities.json", (json.dumps(identities, indent=2) + "\n").encode())
        lock.unlink()
        os.replace(unfinished, folder)
    return [folder / f"{name}.mp4" for name in names]
