"""Creates the small VAE of models/mini, which loads like the real one and runs fast on a CPU.

    python -m tools.make_mini.vae

Trains on the faces of the people that are not held out (see material.py); the figures printed at the end are measured
on the validation people. Writes `<models_dir>/sd-vae-ft-mse/{config.json,diffusion_pytorch_model.safetensors}`, a
diffusers `AutoencoderKL` in fp16. The EMA of the VAE is saved every `save_every` steps, so it can be used before the
end.

Takes about 45 minutes on one core that supports bfloat16; more threads help only on idle cores. The same videos, seed
and number of threads give the same weights, up to rounding on other CPUs.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import tyro
from diffusers import AutoencoderKL

from musetalk.cli import run_script
from tools.make_mini.config import Config
from tools.make_mini.crops import training_crops, validation_crops
from tools.make_mini.figures import evaluate
from tools.make_mini.network import build_vae, start_as_colour_pyramid
from tools.make_mini.training import save_vae, train_vae


def main(config: Config) -> None:
    """Trains the VAE on crops, writes it to `models_dir` and prints figures on the validation people."""
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    images, points = training_crops(config, rng)
    print(f"{len(images)} crops to train on")
    vae = build_vae(config)
    start_as_colour_pyramid(vae)
    try:
        average = train_vae(vae, images, points, config, rng)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {config.models_dir} has the VAE of the last save, and the same command starts again"
        ) from None
    folder = save_vae(average, images, config)
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()
    for identity, (faces, landmarks) in validation_crops(config).items():
        figures = evaluate(vae, faces, landmarks)
        print(json.dumps({"identity": identity} | {name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    run_script(main, tyro.cli(Config, description=__doc__))
