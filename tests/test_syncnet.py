"""Sync experts by name: sizes, saving, loading, refusals. test_published_networks.py has their layers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from musetalk.models.syncnet import ARCHITECTURES, PUBLISHED, Wav2LipSyncNet, build_syncnet, load_syncnet, save_syncnet
from musetalk.models.weights import WeightsError
from tests.conftest import assert_equal

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "frames", "parameters"),
    [
        ("wav2lip", 5, 16_435_072),
        ("wav2lip_narrow", 5, 1_035_616),
        ("latentsync", 16, 371_766_496),
        ("latentsync_attention", 16, 401_306_080),
        ("latentsync_narrow", 16, 16_341_664),
    ],
)
def test_each_architecture_has_its_window_and_its_number_of_parameters(name, frames, parameters):
    with torch.device("meta"), torch.no_grad():
        network = ARCHITECTURES[name]()
        images, mel = torch.empty(2, frames, 3, 256, 256), torch.empty(2, network.mel_frames, 80)
        face_embeddings, audio_embeddings = network(images, mel)
    assert face_embeddings.shape == audio_embeddings.shape
    assert sum(x.numel() for x in network.parameters()) == parameters
    assert len(ARCHITECTURES) == 5 and set(PUBLISHED.values()) < set(ARCHITECTURES)


def test_an_untrained_expert_depends_on_its_seed_alone():
    expert = build_syncnet("wav2lip_narrow", 4).state_dict()
    before = torch.random.get_rng_state()
    assert_equal(expert, build_syncnet("wav2lip_narrow", 4).state_dict())
    assert torch.equal(before, torch.random.get_rng_state())
    name = "face_encoder.0.conv_block.0.weight"
    assert not torch.equal(expert[name], build_syncnet("wav2lip_narrow", 5).state_dict()[name])


def test_a_saved_expert_is_loaded_by_file_and_the_newest_by_folder(tmp_path):
    for step in (3, 20, 100):
        network = build_syncnet("wav2lip_narrow", step)
        path = save_syncnet(tmp_path / "run", step, network.state_dict(), "wav2lip_narrow")
    shutil.copy(path, tmp_path / "renamed.safetensors")
    (tmp_path / "run" / "syncnet-9999999.safetensors.5.partial").touch()
    for place in (tmp_path / "run", path, tmp_path / "renamed.safetensors"):
        loaded = load_syncnet(Path("nowhere"), str(place), CPU)
        assert_equal(loaded.state_dict(), network.state_dict())
        assert not loaded.training and not any(x.requires_grad for x in loaded.parameters())


def test_files_that_are_no_trained_expert_are_refused_by_name(tmp_path):
    weights = Wav2LipSyncNet(8).state_dict()
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("no weights")
    save_file(weights, tmp_path / "bare.safetensors")
    save_file(weights, tmp_path / "unknown.safetensors", {"architecture": "x" * 999})
    save_file(weights, tmp_path / "other.safetensors", {"architecture": "wav2lip"})
    for name, reason in {
        "nowhere": "is no sync expert",
        "empty": "is no sync expert",
        "text.safetensors": "cannot be read",
        "bare.safetensors": "architecture is None",
        "unknown.safetensors": "architecture is 'xxx",
        "other.safetensors": "does not fit",
    }.items():
        with pytest.raises(WeightsError, match=reason) as caught:
            load_syncnet(Path("nowhere"), str(tmp_path / name), CPU)
        assert str(tmp_path / name) in str(caught.value) and len(str(caught.value)) < 600
    with pytest.raises(WeightsError, match="nowhere/syncnet/lipsync_expert.pth is missing"):
        load_syncnet(Path("nowhere"), "syncnet/lipsync_expert.pth", CPU)
