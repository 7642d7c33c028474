"""Files of a training: states to resume from and weights to use."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from hostile import refusal

from musetalk.contract import MUSETALK_V1, MUSETALK_V15, RIGID, ContractError
from musetalk.models.trained_unet import find_unet, load_trained_unet, read_unet_contract
from musetalk.models.unet import build_unet
from musetalk.models.weights import WeightsError
from musetalk.training.checkpoint import load_latest_state, save_state, save_unet


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# States to resume from.


def test_a_state_is_loaded_with_its_step(tmp_path):
    state = {"unet": {"weight": torch.randn(2, 3)}, "rng": torch.get_rng_state(), "scheduler": {"last_epoch": 3}}
    path = save_state(tmp_path, 12, state, keep=2)
    assert path == tmp_path / "training-state-0000012.pt" and names(tmp_path) == [path.name]
    where, loaded = load_latest_state(tmp_path)
    assert where == path and loaded.keys() == state.keys() | {"step"}
    assert loaded["step"] == 12 and loaded["scheduler"] == {"last_epoch": 3}
    assert torch.equal(loaded["unet"]["weight"], state["unet"]["weight"]) and torch.equal(loaded["rng"], state["rng"])
    assert "step" not in state


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_newest_states_are_kept(tmp_path, keep):
    steps = (0, 3, 20, 10**8)
    for step in steps:
        save_state(tmp_path, step, {}, keep)
    assert names(tmp_path) == sorted(f"training-state-{step:07d}.pt" for step in steps[-keep:])
    assert load_latest_state(tmp_path)[1]["step"] == 10**8


def test_the_newest_file_is_that_of_the_highest_step_not_the_last_by_name(tmp_path):
    for step in (9_999_999, 10_000_000):
        save_state(tmp_path, step, {}, keep=5)
        save_unet(tmp_path, step, {"a": torch.ones(1)}, RIGID)
    assert sorted(names(tmp_path))[-1] == "unet-9999999.safetensors"
    assert load_latest_state(tmp_path)[1]["step"] == 10_000_000
    assert find_unet(tmp_path).name == "unet-10000000.safetensors"


def test_other_files_are_neither_loaded_nor_deleted(tmp_path):
    others = [
        "training-state-0000099.pt.partial",
        "training-state-x.pt",
        "old-training-state-0000099.pt",
        "training-state-0000099.pt.bak",
        "unet-0000099.pth",
    ]
    for name in others:
        (tmp_path / name).write_bytes(b"half")
    for folder in (tmp_path, tmp_path / "none"):
        assert load_latest_state(folder) is None
        assert "unet-<step>.safetensors" in refusal(lambda folder=folder: find_unet(folder), str(folder))
    for step in (1, 2):
        save_state(tmp_path, step, {}, keep=1)
    assert load_latest_state(tmp_path)[1]["step"] == 2
    assert names(tmp_path) == sorted([*others, "training-state-0000002.pt"])


@pytest.mark.parametrize("save", [save_state, save_unet])
def test_an_interrupted_save_leaves_the_files_before_it(monkeypatch, tmp_path, save):
    rest = ({"a": 1}, 1) if save is save_state else ({"a": torch.ones(1)}, RIGID)
    first = save(tmp_path, 1, *rest)
    content = first.read_bytes()

    def fail(*paths):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    for step in (1, 2):
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, step, *rest)
    assert first.read_bytes() == content
    assert load_latest_state(tmp_path)[1]["step"] == 1 if save is save_state else find_unet(tmp_path) == first


@pytest.fixture
def saved(tmp_path) -> tuple[Path, dict]:
    """A small state and its path."""
    optimizer = {"state": {0: {"exp_avg": torch.randn(3)}}, "param_groups": [{"lr": 0.1}]}
    state = {"unet": {"weight": torch.randn(3)}, "optimizer": optimizer, "optimizer_name": "adam"}
    return save_state(tmp_path, 1, state, keep=1), state


def assert_refused(path: Path) -> None:
    assert "delete it to resume from the state before it" in refusal(lambda: load_latest_state(path.parent), str(path))


def test_a_flipped_bit_is_found_unless_it_changes_nothing(saved):
    """A bit of every ninth byte: of tensors, names, the zip's headers and directory, padding."""
    path, state = saved
    content = path.read_bytes()
    refused = 0
    for place in range(0, len(content), 9):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            _, loaded = load_latest_state(path.parent)
        except WeightsError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "delete it" in str(error)
        else:
            assert torch.equal(loaded["unet"]["weight"], state["unet"]["weight"])
            assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])
            assert (loaded["step"], loaded["optimizer_name"]) == (1, "adam")
    assert refused > len(content) / 27


def test_a_tensor_marked_as_a_folder_is_refused(saved):
    """torch would not read the entry, and uninitialised memory would become weights."""
    path, _ = saved
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"data/0"))
    content[entry + 38] |= 0x10  # of its external attributes
    path.write_bytes(content)
    assert_refused(path)


@pytest.mark.parametrize("check_sums", [True, False])
def test_a_compressed_state_is_refused(saved, check_sums):
    """A memory map would take compressed bytes for weights."""
    path, _ = saved
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="corrupted"):
        load_latest_state(path.parent, check_sums=check_sums)


def test_an_unreadable_state_is_refused_and_without_it_the_one_before_is_loaded(saved):
    path, state = saved
    newer = save_state(path.parent, 2, state, keep=2)
    content = newer.read_bytes()
    cut = [content[: int(share * len(content))] for share in (0, 0.5, 0.999)]
    for broken in (*cut, b"<html>", pickle.dumps({"step": 1})):
        newer.write_bytes(broken)
        assert_refused(newer)
    newer.unlink()
    newer.mkdir()
    assert_refused(newer)
    newer.rmdir()
    assert load_latest_state(path.parent)[0] == path


# Weights.


@pytest.fixture(scope="module")
def unet(small_models):
    return build_unet(small_models, 5, positional_encoding=False)


CONTRACT = replace(MUSETALK_V15, vae="abc", audio_encoder="def", positional_encoding=False)


def test_weights_carry_plain_names_and_the_contract_in_one_metadata_key(tmp_path, unet):
    path = save_unet(tmp_path, 7, unet.model.state_dict(), CONTRACT)
    assert path == tmp_path / "unet-0000007.safetensors" and names(tmp_path) == [path.name]
    with safetensors.safe_open(path, framework="pt") as file:
        assert list(file.metadata()) == ["contract"]
        assert set(file.keys()) == set(unet.model.state_dict())
    assert read_unet_contract(path) == CONTRACT


def test_the_same_weights_give_the_same_bytes(tmp_path, unet):
    first, second = (save_unet(tmp_path / x, 1, unet.model.state_dict(), CONTRACT).read_bytes() for x in "ab")
    assert first == second


def test_weights_are_loaded_with_their_contract(tmp_path, small_models, unet):
    path = save_unet(tmp_path, 7, unet.model.state_dict(), CONTRACT)
    loaded, contract = load_trained_unet(path, small_models)
    assert contract == CONTRACT and not loaded.positions.any()
    assert all(torch.equal(loaded.model.state_dict()[k], v) for k, v in unet.model.state_dict().items())
    with_positions, _ = load_trained_unet(save_unet(tmp_path, 8, unet.model.state_dict(), RIGID), small_models)
    assert with_positions.positions.any()


def test_diffusers_alone_can_load_the_weights(tmp_path, small_models, unet):
    path = save_unet(tmp_path, 7, unet.model.state_dict(), CONTRACT)
    config = json.loads((small_models / "musetalk" / "musetalk.json").read_text())
    model = UNet2DConditionModel(**{key: value for key, value in config.items() if not key.startswith("_")})
    model.load_state_dict(safetensors.torch.load_file(path), strict=True)
    x, tokens = torch.randn(1, 8, 32, 32), torch.randn(1, 50, 16)
    with torch.no_grad():
        assert torch.equal(model.eval()(x, 0, encoder_hidden_states=tokens).sample, unet.eval()(x, tokens))


def test_transposed_tensors_are_stored_by_their_values(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3)
    path = save_unet(tmp_path, 1, {"a": tensor.T}, RIGID)
    assert torch.equal(safetensors.torch.load_file(path)["a"], tensor.T)


def test_a_contract_that_cannot_be_read_is_refused_by_name(tmp_path):
    path = tmp_path / "unet-0000001.safetensors"
    refusal(lambda: read_unet_contract(path), str(path))
    for content in ("{", "[" * 100_000, "[]", "null", '{"fps": 25}'):
        safetensors.torch.save_file({"a": torch.ones(1)}, path, {"contract": content})
        refusal(lambda: read_unet_contract(path), str(path))


# Weights of other projects, without a contract.


def trainer_checkpoint(tensors: dict[str, torch.Tensor]) -> dict:
    """What MuseTalkTrainer saves of a training on several devices."""
    return {
        "state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "global_step": 3,
        "global_epoch": 1,
    }


PUBLISHED = {
    "musetalkV15/unet.pth": torch.save,
    "before zip.bin": lambda tensors, path: torch.save(tensors, path, _use_new_zipfile_serialization=False),
    "half.pth": lambda tensors, path: torch.save({name: x.half() for name, x in tensors.items()}, path),
    "unet_checkpoint_step000000003.pth": lambda tensors, path: torch.save(trainer_checkpoint(tensors), path),
    "diffusion_pytorch_model.safetensors": lambda tensors, path: safetensors.torch.save_file(
        tensors, path, {"format": "pt"}
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_of_other_projects_are_loaded_exactly_under_the_given_contract(tmp_path, small_models, unet, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    PUBLISHED[name](unet.model.state_dict(), path)
    assert find_unet(path) == path and read_unet_contract(path) is None
    loaded, contract = load_trained_unet(path, small_models, MUSETALK_V1)
    assert contract == MUSETALK_V1 and loaded.positions.any()
    for key, tensor in unet.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], tensor.half().float() if "half" in name else tensor), key
    with pytest.raises(ContractError, match="carries no feature contract.*musetalk_v15") as caught:
        load_trained_unet(path, small_models)
    assert str(path) in str(caught.value)


def test_weights_with_a_contract_are_refused_under_another(tmp_path, small_models, unet):
    path = save_unet(tmp_path, 7, unet.model.state_dict(), replace(MUSETALK_V15, vae="abc", audio_encoder="def"))
    _, contract = load_trained_unet(path, small_models, MUSETALK_V15)  # without fingerprints of networks
    assert contract.vae == "abc"
    for other in (RIGID, replace(MUSETALK_V15, vae="xyz")):
        with pytest.raises(ContractError):
            load_trained_unet(path, small_models, other)
