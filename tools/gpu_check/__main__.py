"""Checks training, resuming and dubbing on a GPU, and measures their cost.

    python -m tools.gpu_check --material data/gpu_material            within 10 minutes
    python -m tools.gpu_check --material data/gpu_material --quick    within 3 minutes

Prints a table and writes it to `<output>/results.md`, with the figures in results.json and images beside it:

    learning  training of the full-size UNet from scratch for some minutes at each learning rate: losses, and whether
              the mouth follows the audio on held-out clips; then saving, loading and repeating a step
    steps     one micro step of `stage1` and `stage2` at full size, by `chunk_size`: time, operations, memory
    dubbing   frames a second of each stage at each of `heights`

Needs torch 2.11 or newer and numpy 2, but no internet. Network sizes are those of `models_dir`, with
random weights. The material is a cache of clips of one person, made with the small VAE. Twenty sentences of a GRID
speaker take 60 MB, made with Whisper's weights instead of the random ones of models/mini:

    python datasets_process.py --hdtf-dir grid/s1 --hdtf-samples-dir data/gpu_material --models-dir models/with_whisper
"""

from __future__ import annotations

import importlib.util
import json
import sys

from tools.gpu_check.config import GpuCheckConfig

PACKAGES = "accelerate av cv2 diffusers librosa matplotlib pydantic safetensors skimage tensorboard tqdm tyro whisper"


def main(config: GpuCheckConfig) -> None:
    """Runs all checks and prints each row as soon as it is measured."""
    from musetalk.devices import describe
    from musetalk.training.distributed import start_processes
    from tools.gpu_check.dubbing import dub
    from tools.gpu_check.learning import learn
    from tools.gpu_check.steps import time_steps

    config.output.mkdir(parents=True, exist_ok=True)
    accelerator = start_processes("auto")
    rows: list[dict[str, float | str]] = []

    def report(check: str, case: str, **figures: float | str) -> None:
        rows.append({"check": check, "case": case, **figures})
        print(table(rows[-1:]), flush=True)
        (config.output / "results.json").write_text(json.dumps(rows, indent=1))
        (config.output / "results.md").write_text(table(rows) + "\n")

    report("device", describe(accelerator.device))
    run = {"learning": learn, "steps": time_steps, "dubbing": dub}
    for check in config.checks:
        run[check](config, accelerator, report)
    print(f"\n{table(rows)}\n\nresults: {config.output}")


def table(rows: list[dict]) -> str:
    """A Markdown table, with the figures of a row in one cell."""
    lines = ["| check | case | figures |", "|---|---|---|"] if len(rows) > 1 else []
    for row in rows:
        figures = (f"{k.replace('_', ' ')} {_format(v)}" for k, v in row.items() if k not in ("check", "case"))
        lines.append(f"| {row['check']} | {row['case']} | {', '.join(figures)} |")
    return "\n".join(lines)


def _format(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


if __name__ == "__main__":
    missing = [name for name in PACKAGES.split() if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"missing packages: {', '.join(missing)}; install those of requirements.txt")
    import tyro

    from musetalk.cli import run_script

    run_script(main, tyro.cli(GpuCheckConfig, description=__doc__))
