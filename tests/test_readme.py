"""What the README and the notebook say is so."""

import ast
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import nbformat
import tyro
from nbclient import NotebookClient

from datasets_process import PrepareConfig
from musetalk.check import CheckConfig
from musetalk.contract import CONTRACTS
from musetalk.data.cache import Cache
from musetalk.data.dataset import split_clips
from musetalk.data.sample import SEEDS
from musetalk.download import DownloadConfig
from musetalk.export import ExportConfig
from musetalk.models.sources import SOURCES
from musetalk.models.unet import build_unet
from musetalk.training.checkpoint import save_unet
from musetalk_trainer import PRESETS, TrainConfig, parse
from syncnet_trainer import SyncConfig

ROOT = Path(__file__).parents[1]
MODULES = {"musetalk.check": CheckConfig, "musetalk.export": ExportConfig, "musetalk.download": DownloadConfig}
README = (ROOT / "README.md").read_text()
NOTEBOOK = nbformat.read(ROOT / "demo.ipynb", as_version=4)


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def test_the_tree_names_every_module_and_nothing_else():
    tree = README.split("## The files")[1].split("```")[1]
    named, folders = set(), []  # folders: those that the line is in, by its indentation
    for line in tree.strip().splitlines():
        indent, entry = re.match(r"( *)(\S+)", line).groups()
        folders = folders[: len(indent) // 2]
        named.add("".join(folders) + entry)
        folders.append(entry)
    modules = {name for name in tracked() if name.endswith((".py", ".ipynb")) and not name.startswith("tests/")}
    whole = r"^(musetalk/data/face|musetalk/models/syncnet|benchmarks|tools/gpu_check)/.*"  # folders that are one line
    shown = {re.sub(whole, r"\1/", name) for name in modules if "__init__" not in name}
    parts = {f"musetalk/{part}/" for part in ("models", "data", "inference", "training")}
    assert shown == named - parts - {"musetalk/", "losses/", "models/", "tests/"}
    assert all((ROOT / name).exists() for name in named)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_commands_are_understood():
    options = {field.name.replace("_", "-") for field in fields(PrepareConfig)}
    commands = [line.strip() for line in README.splitlines() if line.strip().startswith("python ")]
    assert "python datasets_process.py" in commands and "python musetalk_trainer.py" in commands
    for command in commands:
        script, *arguments = command.split()[1:]
        if script == "musetalk_trainer.py":
            parse(arguments)
        elif script == "-m":
            tyro.cli(MODULES[arguments[0]], args=arguments[1:])
        else:
            assert {word[2:] for word in arguments if word.startswith("--")} <= options


def test_presets_contracts_and_weights_are_described():
    assert all(f"`{name}`" in README for name in (*PRESETS, *CONTRACTS))
    weights = README + (ROOT / "models" / "README.md").read_text()
    assert all(name in weights for name in SOURCES)


def test_constants_have_a_unit_or_a_reason_beside_them():
    for script, config in (
        ("datasets_process.py", PrepareConfig),
        ("musetalk_trainer.py", TrainConfig),
        ("syncnet_trainer.py", SyncConfig),
    ):
        text = (ROOT / script).read_text()
        assert all(re.search(rf"^    {field.name}: ", text, re.MULTILINE) for field in fields(config))


def test_the_notebook_is_short_and_has_no_logic():
    cells = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    assert len(NOTEBOOK.cells) <= 8 and all(len(source.splitlines()) <= 10 for source in cells)
    logic = (ast.For, ast.While, ast.If, ast.FunctionDef, ast.ClassDef, ast.Try)
    assert not [node for source in cells for node in ast.walk(ast.parse(source)) if isinstance(node, logic)]
    assert not any(cell.get("outputs") for cell in NOTEBOOK.cells)


def test_the_notebook_uses_clips_that_the_demo_holds_out(random_tensors, tmp_path):
    from musetalk.data.cache import CacheWriter

    writer = CacheWriter(tmp_path, CONTRACTS["rigid"])
    for index in range(len(SEEDS)):
        about = {"source": f"sample_{index:02d}.mp4", "source_bytes": 9, "identity": "astronaut", "last": True}
        writer.write(f"sample_{index:02d}", random_tensors(1), about)
    demo = PRESETS["demo"]
    _, held_out, _ = split_clips(Cache(tmp_path), demo.held_out, demo.seed)
    assert set(re.findall(r"sample_\d\d", NOTEBOOK.cells[1].source)) == set(held_out)


def test_the_notebook_runs(small_clips, sample_cache, tmp_path):
    """With short clips and an untrained UNet in the places it names, and without the training code."""
    shutil.copytree(ROOT / "musetalk", tmp_path / "musetalk", ignore=shutil.ignore_patterns("training"))
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "data/sample").mkdir(parents=True)
    for index, source in enumerate(sorted(small_clips.glob("*.mp4"))[:2]):
        (tmp_path / f"data/sample/sample_{5 + index:02d}.mp4").symlink_to(source)
    (tmp_path / "log/demo/samples").mkdir(parents=True)
    (tmp_path / "log/demo/samples/0000001.png").touch()
    (tmp_path / "checkpoints/demo").mkdir(parents=True)
    unet = build_unet(tmp_path / "models/mini", 0, positional_encoding=True)
    save_unet(tmp_path / "checkpoints/demo", 1, unet.model.state_dict(), sample_cache.contract)
    ran = NotebookClient(NOTEBOOK, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(output.get("text", "") for output in ran.cells[-1].outputs)
    assert "video: output/demo.mp4, sample grid: log/demo/samples/0000001.png" in printed
    assert re.search(r"mouth follows audio: r = -?\d\.\d\d over 30 frames", printed)
    assert (tmp_path / "output/demo.mp4").exists()
