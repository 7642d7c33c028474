"""Dubs a video: the face in it speaks an audio.

    python -m musetalk.dub face.mp4 speech.wav --output out.mp4
    python -m musetalk.dub face.mp4 speech.wav --checkpoint checkpoints/demo --preview 3

Uses the small networks in models/mini by default, which run on a CPU. The audio may be the soundtrack of a video. The
result is an mp4 as long as the audio: a longer video is cut, a shorter one plays forwards and backwards.

With several people in the video, the one with the largest face is dubbed. --face chooses another by number, from left
to right in the first frame that shows the most people. --preview dubs only the first seconds, to see whether the result
is worth waiting for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from musetalk.cli import Count, Positive, check_constants, run_script
from musetalk.contract import VIDEO_FPS
from musetalk.data.video import read_audio
from musetalk.errors import UserError
from musetalk.inference.blend import Blend
from musetalk.inference.pipeline import LipSyncPipeline, count_speech_frames
from musetalk.inference.stage_timer import StageTimer
from musetalk.models.tiny_decoder import decoder_psnr

COMPARED = 5  # first frames with a face, on which a tiny decoder is compared with the VAE's


@dataclass
class DubConfig:
    """The constants of a dubbing; override them on the command line."""

    video: tyro.conf.Positional[Path]  # with the face
    audio: tyro.conf.Positional[Path]  # an audio file, or a video with a soundtrack
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # mp4; None: output/<video>_<audio>.mp4
    face: Count | None = None  # number of the person, from left to right; None: the one with the largest face
    preview: Positive | None = None  # seconds; None: everything
    checkpoint: Path = Path("models/mini/musetalk/unet.safetensors")  # or a folder: its newest unet-<step>.safetensors
    models_dir: Path = Path("models/mini")  # with the VAE and the audio encoder of the checkpoint's training
    contract: Literal["rigid", "musetalk_v15", "musetalk_v1"] | None = None  # of weights without one, as MuseTalk's own
    blend: Blend = "landmarks"  # how the generated face is masked; all others need a face parser
    tiny_decoder: Path | None = None  # file of tools/distil_decoder.py that decodes faster; None: the VAE decodes
    compile: bool = False  # torch.compile the networks: minutes at the start, faster on a GPU
    device: str = "auto"  # cpu, cuda, cuda:<number>, mps; auto: CUDA's GPU, or the CPU without one


def main(config: DubConfig) -> None:
    """Writes the dubbed video. Raises UserError for files and constants that cannot be used."""
    check_constants(config)
    output = config.output or Path("output") / f"{config.video.stem}_{config.audio.stem}.mp4"
    check_output(output, config.video, config.audio)
    max_frames = count_speech_frames(read_audio(config.audio), config.audio)
    if config.preview is not None:
        max_frames = min(max_frames, max(1, round(config.preview * VIDEO_FPS)))

    timer = StageTimer()
    with timer("load"):
        pipeline = LipSyncPipeline.from_checkpoint(
            config.checkpoint,
            config.models_dir,
            contract=config.contract,
            blend=config.blend,
            tiny_decoder=config.tiny_decoder,
            compile=config.compile,
            device=config.device,
        )
    with timer("prepare"):
        prepared = pipeline.prepare(config.video, face=config.face, max_frames=max_frames)
    if prepared.people > 1 and config.face is None:
        print(
            f"{config.video} shows {prepared.people} people, of whom the one with the largest face is dubbed; "
            f"--face 1 to {prepared.people} chooses from left to right"
        )
    if pipeline.tiny_decoder:
        with_face = [index for index, face in enumerate(prepared.faces) if face][:COMPARED]
        latents = torch.from_numpy(prepared.latents[with_face]).to(pipeline.device)
        loss = decoder_psnr(pipeline.tiny_decoder, pipeline.vae, latents)
        print(f"the tiny decoder's faces have a PSNR of {loss:.1f} dB against those of the VAE's decoder")
    with timer("generate and write"):
        count = pipeline.speak(prepared, config.audio, output, max_frames=max_frames)
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in timer.seconds.items())
    print(f"wrote {output}: {count} frames, {count / VIDEO_FPS:.1f} s of video; took {stages}")


def check_output(output: Path, *inputs: Path) -> None:
    """Raises UserError if the output is not named as an mp4 or is one of the inputs."""
    if output.suffix.lower() != ".mp4":
        raise UserError(f"output is {output}, but the result is an mp4; choose a name that ends in .mp4")
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise UserError(f"output would replace {path}, which is read; choose another name")


if __name__ == "__main__":
    run_script(main, tyro.cli(DubConfig, description=__doc__))
