"""The README, the manuals and the notebook agree with the code."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import get_type_hints
from unittest.mock import create_autospec, patch

import nbformat
import pytest
import torch
import tyro
from nbclient import NotebookClient

from musetalk.contract import AUDIO_SAMPLE_RATE, CONTRACTS, SAMPLES_PER_FRAME
from musetalk.data.cache import Cache
from musetalk.data.cache_writer import CacheWriter
from musetalk.data.dataset import SAMPLE_HELD_OUT, split_clips
from musetalk.data.sources import find_videos, read_identities
from musetalk.data.video import read_audio, read_frames, write_video
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models.sources import SOURCES
from musetalk.models.unet import build_unet
from musetalk.models.vae import load_vae
from musetalk.training.checkpoint import save_unet
from musetalk_trainer import PRESETS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
NOTEBOOK = nbformat.read(ROOT / "demo.ipynb", as_version=4)
if not shutil.which("git"):
    pytest.skip("needs git", allow_module_level=True)
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
PAGES = [name for name in TRACKED if name.endswith(".md")]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
PROGRAMS = ("python", "torchrun", "accelerate", "make", "pip", "bash", "pre-commit")


def commands(page: str) -> Iterator[str]:
    """Lines of code blocks without a language, and inline code that starts with a program, unless it has "..."."""
    text = (ROOT / page).read_text()
    for language, block in FENCE.findall(text):
        if not language:
            yield from (line.strip() for line in block.splitlines() if line.strip())
    for span in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        if span.split()[0] in PROGRAMS and len(span.split()) > 1 and "..." not in span:
            yield " ".join(span.split())


def parse_command(command: str) -> None:
    """Fails if a command names a script, option, preset, target or file that does not exist."""
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    program, *arguments = words
    assert program in PROGRAMS, command
    if program == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
        assert set(arguments) <= set(targets.split())
    elif program == "bash":
        assert (ROOT / arguments[0]).exists()
    elif program == "pip":
        assert arguments[0] == "install"
        assert all((ROOT / word).exists() for word in arguments if word.endswith(".txt"))
    elif program in ("python", "torchrun", "accelerate"):
        if program != "python":  # the launcher's own options come first
            arguments = arguments[next(i for i, word in enumerate(arguments) if word.endswith(".py")) :]
        if arguments[:2] == ["-m", "pytest"]:
            assert all((ROOT / name).exists() for name in arguments[2:])
        elif arguments[:2] == ["musetalk_trainer.py", "plan"]:
            parse_arguments("tools.plan.command", arguments[2:])
        elif arguments[0] == "-m":
            parse_arguments(arguments[1], arguments[2:])
        else:
            parse_arguments(arguments[0].removesuffix(".py"), arguments[1:])


def parse_arguments(name: str, arguments: list[str]) -> None:
    """Parse the command line of a script or module. Raises SystemExit for an unknown option."""
    if (ROOT / name.replace(".", "/") / "__main__.py").exists():
        name += ".__main__"
    module = import_module(name)
    if hasattr(module, "parse"):  # has presets
        module.parse(arguments)
        return
    config = get_type_hints(module.main)["config"]
    tyro.cli(config, args=arguments)


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page):
    for command in commands(page):
        parse_command(command)


def test_commands_are_found_and_wrong_ones_fail():
    assert {"make demo", "python datasets_process.py", "python musetalk_trainer.py"} <= set(commands("README.md"))
    for command in ("python -m musetalk.check --no-such-option", "make no_such_target", "bash none"):
        with pytest.raises((AssertionError, SystemExit)):
            parse_command(command)


def test_python_snippets_run():
    """With a mock pipeline that checks the arguments of its calls."""
    pipeline = create_autospec(LipSyncPipeline)
    pipeline.from_checkpoint.return_value = create_autospec(LipSyncPipeline, instance=True)
    snippets = [block for page in PAGES for lang, block in FENCE.findall((ROOT / page).read_text()) if lang == "python"]
    assert snippets
    for snippet in snippets:
        with patch("musetalk.inference.pipeline.LipSyncPipeline", pipeline):
            exec(snippet, {})


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    for target in re.findall(r"\]\((?!https://)([^)]+)\)", FENCE.sub("", (ROOT / page).read_text())):
        path, _, anchor = target.partition("#")
        path = (ROOT / page).parent / path if path else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_the_tree_names_files_that_exist():
    tree = re.search(r"## The tree\n+```text\n(.*?)```", README, re.DOTALL)[1]
    for entry, text in (line.split(maxsplit=1) for line in tree.splitlines()):
        assert (ROOT / entry).exists(), entry
        if entry.startswith(("musetalk/", "losses/", "tools/")):
            for name in re.findall(r"\w+\b(?!:)", text):
                assert (ROOT / entry / name).is_dir() or (ROOT / entry / f"{name}.py").exists(), entry + name


def test_pages_stay_short():
    lines = {page: len((ROOT / page).read_text().splitlines()) for page in PAGES}
    assert lines["README.md"] <= 130
    assert all(count <= 150 for page, count in lines.items() if page.startswith("docs/"))


def test_presets_contracts_and_weights_are_described():
    text = "".join((ROOT / page).read_text() for page in PAGES)
    assert all(f"`{name}`" in text for name in (*PRESETS, *CONTRACTS))
    table = (ROOT / "models/README.md").read_text()
    assert all(name in table and source.sha256 in table for name, source in SOURCES.items())


def test_versions_agree():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version


def test_the_notebook_is_short_and_has_no_logic():
    cells = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    assert len(NOTEBOOK.cells) <= 8 and all(len(source.splitlines()) <= 10 for source in cells)
    logic = (ast.For, ast.While, ast.If, ast.FunctionDef, ast.ClassDef, ast.Try)
    assert not [node for source in cells for node in ast.walk(ast.parse(source)) if isinstance(node, logic)]
    assert not any(cell.get("outputs") for cell in NOTEBOOK.cells)


def test_the_demo_holds_out_seven_clips_of_the_sample(random_tensors, tmp_path):
    writer, identities = CacheWriter(tmp_path, CONTRACTS["rigid"]), read_identities(ROOT / "sample")
    for video in find_videos(ROOT / "sample"):
        metadata = {"source": video.name, "source_bytes": 9, "identity": identities[video.stem], "last": True}
        writer.write(video.stem, random_tensors(1), metadata)
    demo = PRESETS["demo"]
    train, held_out, _ = split_clips(Cache(tmp_path), demo.held_out, demo.held_out_identities)
    assert len(train) == 21 and sorted(held_out) == sorted(SAMPLE_HELD_OUT)


def test_the_notebook_runs(tmp_path):
    """With short clips, an untrained UNet, and no training code."""
    shutil.copytree(ROOT / "musetalk", tmp_path / "musetalk", ignore=shutil.ignore_patterns("training"))
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "sample").mkdir()
    for name in SAMPLE_HELD_OUT:
        video = ROOT / "sample" / f"{name}.mp4"
        audio = read_audio(video)[: 4 * SAMPLES_PER_FRAME]
        write_video(tmp_path / "sample" / video.name, read_frames(video, 0, 4), audio, AUDIO_SAMPLE_RATE)
    (tmp_path / "log/demo/samples").mkdir(parents=True)
    (tmp_path / "log/demo/samples/0000001.png").touch()
    (tmp_path / "checkpoints/demo").mkdir(parents=True)
    unet = build_unet(tmp_path / "models/mini", 0, positional_encoding=True)
    vae = load_vae(tmp_path / "models/mini", torch.device("cpu"), torch.float32)
    contract = replace(CONTRACTS["rigid"], vae=vae.fingerprint)
    save_unet(tmp_path / "checkpoints/demo", 1, unet.model.state_dict(), contract)
    ran = NotebookClient(NOTEBOOK, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(output.get("text", "") for output in ran.cells[-1].outputs)
    assert "videos: output, sample grid: log/demo/samples/0000001.png" in printed
    figure = r"-?\d\.\d\d"
    line = f"mouths follow the audio: r = {figure} over 7 clips, chance {figure}, before training {figure}\n"
    assert re.search(line, printed)
    for folder in (tmp_path / "output", tmp_path / "output/before"):
        assert {path.stem for path in folder.glob("*.mp4")} == set(SAMPLE_HELD_OUT)
