"""Fixtures of several test files: real clips, small networks, small videos and synthetic clips of a cache."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from hypothesis import settings

from datasets_process import PrepareConfig
from datasets_process import main as prepare
from musetalk.contract import (
    AUDIO_SAMPLE_RATE,
    IMAGE_SIZE,
    LATENT_CHANNELS,
    LATENT_SIZE,
    SAMPLES_PER_FRAME,
    SYNC_MEL_BINS,
)
from musetalk.data.cache import Cache
from musetalk.data.video import write_video
from musetalk.training.run import Run
from tests.sample import sample_audio, sample_frames

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
SMALL_CLIP = (20, 50)  # frames

# The same examples at every run, and no clock.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=10)
settings.load_profile("repeatable")


def assert_equal(x: dict, y: dict) -> None:
    """Asserts that nested values are equal, tensors bit for bit."""
    leaves = [torch.utils._pytree.tree_flatten_with_path(values)[0] for values in (x, y)]
    assert [path for path, _ in leaves[0]] == [path for path, _ in leaves[1]]
    for (path, a), (_, b) in zip(*leaves, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


@contextmanager
def interrupted_after_a_save() -> Iterator[None]:
    """Interrupts the training inside the context, as Ctrl-C would, after it has saved its first state."""
    save_state = Run.save_state

    def save_and_interrupt(run: Run) -> None:
        save_state(run)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save_state", save_and_interrupt)
        yield


@pytest.fixture(autouse=True)
def begin_as_a_new_process() -> None:
    """Resets the precision of accelerate, which holds for a whole process, before each test."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Runs torch on one thread: with more, the last bits depend on the batch size, and small networks are slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c():
    """Restores the handler of Ctrl-C, which a shell disables for jobs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def clips() -> Path:
    """The folder of real clips."""
    folder = SHARED / "clips"
    if not folder.is_dir():
        pytest.skip(f"needs the real clips in {folder}")
    return folder


@pytest.fixture(scope="session")
def mini() -> Path:
    """The models folder of the small networks that are committed."""
    return ROOT / "models" / "mini"


@pytest.fixture(scope="session")
def small_models(tmp_path_factory) -> Path:
    """A models folder of seeded networks: the configuration of a UNet for audio features of width 16, and a VAE."""
    folder = tmp_path_factory.mktemp("small_models")
    unet = {
        "in_channels": 2 * LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
    }
    (folder / "musetalk").mkdir()
    (folder / "musetalk" / "musetalk.json").write_text(json.dumps(unet))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(4, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
        )
    vae.save_pretrained(folder / "sd-vae-ft-mse")
    return folder


@pytest.fixture(scope="session")
def real_whisper_models(tmp_path_factory) -> Path:
    """A models folder whose whisper/tiny.pt is the published English one."""
    weights = SHARED / "weights" / "whisper" / "tiny.en.pt"
    if not weights.is_file():
        pytest.skip(f"needs the published weights {weights}")
    folder = tmp_path_factory.mktemp("real_whisper")
    (folder / "whisper").mkdir()
    (folder / "whisper" / "tiny.pt").symlink_to(weights)
    return folder


@pytest.fixture(scope="session")
def face_backend():
    from musetalk.data.face import load_face_backend  # heavy

    return load_face_backend("mediapipe", Path(), "cpu")


@pytest.fixture(scope="session")
def face_embedder(mini):
    """The published embedder of faces."""
    from musetalk.models.face_embedding import WEIGHTS, load_face_embedder

    if not (mini / WEIGHTS).is_file():
        pytest.skip(f"needs {mini / WEIGHTS}")
    return load_face_embedder(mini)


@pytest.fixture(scope="session")
def voice() -> Callable[[float], np.ndarray]:
    """A function: seconds -> float32 samples at 16 kHz of a synthetic voice that never repeats."""

    def make(seconds: float) -> np.ndarray:
        time = np.arange(round(seconds * AUDIO_SAMPLE_RATE)) / AUDIO_SAMPLE_RATE
        pitch = 110 + 30 * np.sin(2 * np.pi * 0.7 * time) + 4 * time
        phase = 2 * np.pi * np.cumsum(pitch) / AUDIO_SAMPLE_RATE
        tone = sum(np.sin(k * phase) / k for k in range(1, 12))
        loudness = np.clip(np.sin(2 * np.pi * 1.9 * time) + 0.3 * np.sin(2 * np.pi * 0.31 * time), 0, None)
        return (0.1 * tone * loudness).astype(np.float32)

    return make


@pytest.fixture(scope="session")
def write_source() -> Callable:
    """A function that writes a video with any container, codec, frame times and audio."""

    def write(
        path: Path,
        pictures: Sequence[np.ndarray],
        times: Sequence[Fraction] = (),
        *,
        rate: Fraction = Fraction(25),
        codec: str = "libx264",
        keyframe_every: int = 12,
        audio: np.ndarray | None = None,
        audio_start: Fraction = Fraction(0),
    ) -> Path:
        """times: seconds of each frame, k / rate by default; audio: mono at 16 kHz."""
        options = {"crf": "8", "preset": "veryfast"} if codec == "libx264" else {}
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=rate, options=options)
            stream.height, stream.width = pictures[0].shape[:2]
            stream.pix_fmt = "yuv420p"
            stream.gop_size = keyframe_every
            if codec != "libx264":
                stream.bit_rate = 4_000_000
            tick = Fraction(1, 90_000) if times else 1 / Fraction(rate)
            stream.codec_context.time_base = tick
            if audio is not None:
                sound = container.add_stream("aac", rate=AUDIO_SAMPLE_RATE, layout="mono")
                frame = av.AudioFrame.from_ndarray(audio[None].astype(np.float32), format="fltp", layout="mono")
                frame.sample_rate, frame.time_base = AUDIO_SAMPLE_RATE, Fraction(1, AUDIO_SAMPLE_RATE)
                frame.pts = round(audio_start * AUDIO_SAMPLE_RATE)
                container.mux(sound.encode(frame))
                container.mux(sound.encode(None))
            for index, picture in enumerate(pictures):
                frame = av.VideoFrame.from_ndarray(picture, format="bgr24")
                frame.pts, frame.time_base = round(times[index] / tick) if times else index, tick
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return write


@pytest.fixture(scope="session")
def random_tensors() -> Callable[..., dict[str, np.ndarray]]:
    """A function: sizes -> the tensors of a synthetic clip, see musetalk/data/cache_format.py."""
    from musetalk.data.cache_writer import JpegBuffer

    def make(
        frames: int,
        *,
        variants: int = 1,
        features: int | None = None,
        mels: int = 7,
        states: int = 2,
        width: int = 3,
        unusable: Sequence[int] = (),
        seed: int = 0,
    ) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        usable = np.ones(frames, bool)
        usable[list(unusable)] = False
        images = [
            np.full((IMAGE_SIZE, IMAGE_SIZE, 3), rng.integers(256, size=3), np.uint8) if good else None
            for good in usable
            for _ in range(variants)
        ]
        jpegs, offsets = JpegBuffer(images).tensors()
        latents = (frames, variants, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
        features = 2 * frames if features is None else features
        return {
            "face_jpeg": jpegs,
            "face_jpeg_offsets": offsets,
            "latents": rng.standard_normal(latents).astype(np.float16),
            "masked_latents": rng.standard_normal(latents).astype(np.float16),
            "audio_features": rng.standard_normal((features, states, width)).astype(np.float16),
            "mel": rng.uniform(-4, 4, (mels, SYNC_MEL_BINS)).astype(np.float16),
            "landmarks": rng.uniform(0, 500, (frames, 68, 2)).astype(np.float32),
            "boxes": rng.integers([0, 0, 250, 250], [250, 250, 500, 500], (frames, variants, 4)).astype(np.int32),
            "usable": usable,
            "audio": rng.integers(-(2**15), 2**15, SAMPLES_PER_FRAME * (frames + 30)).astype(np.int16),
            "face_shapes": rng.uniform(-1, 1, (frames, 25, 2)).astype(np.float32),
        }

    return make


@pytest.fixture(scope="session")
def small_clips(tmp_path_factory) -> Path:
    """A folder of videos: 30 frames with speech of three clips of the built-in sample, with their identities.json."""
    folder = tmp_path_factory.mktemp("videos")
    for index in range(3):
        frames, audio = (read(index, *SMALL_CLIP) for read in (sample_frames, sample_audio))
        write_video(folder / f"sample_{index:02d}.mp4", frames, audio, AUDIO_SAMPLE_RATE)
    (folder / "identities.json").write_text(json.dumps({f"sample_{index:02d}": "grid_s1" for index in range(3)}))
    return folder


@pytest.fixture(scope="session")
def make_cache(small_clips, tmp_path_factory) -> Callable[[str], Cache]:
    """Prepares `small_clips` under a contract of a name by the real script, once."""
    made = {}

    def make(contract: str) -> Cache:
        if contract not in made:
            made[contract] = tmp_path_factory.mktemp(contract)
            prepare(PrepareConfig(hdtf_dir=small_clips, hdtf_samples_dir=made[contract], contract=contract))
        return Cache(made[contract])

    return make


@pytest.fixture
def interrupt(tmp_path) -> Callable[[list, Callable[[], bool]], tuple[int, str]]:
    """A function that runs a script, sends Ctrl-C when it is ready, and returns its exit code and output.

    The signal goes to the whole group of processes, as a terminal sends it; none of them may be left.
    """

    def run(arguments: list, ready: Callable[[], bool]) -> tuple[int, str]:
        with open(tmp_path / "words", "w") as words:
            process = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=words,
                stderr=words,
                start_new_session=True,
            )
        try:
            while not ready():
                assert process.poll() is None, (tmp_path / "words").read_text()
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGINT)
            process.wait()
            with pytest.raises(ProcessLookupError):
                for _ in range(500):  # multiprocessing's resource tracker ends shortly after its parent
                    os.killpg(process.pid, 0)
                    time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
        return process.returncode, (tmp_path / "words").read_text()

    return run


@pytest.fixture
def sample_cache(make_cache) -> Cache:
    """`small_clips` as the demo prepares them."""
    return make_cache("rigid")
