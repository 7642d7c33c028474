"""Files of a training: states to resume from, and weights that diffusers can load."""

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
from hypothesis import given
from hypothesis import strategies as st

from musetalk.contract import MUSETALK_V1, MUSETALK_V15, RIGID, ContractError, FeatureContract
from musetalk.models.trained_unet import find_unet, load_trained_unet, read_unet_contract
from musetalk.models.unet import build_unet
from musetalk.models.weights import WeightsError
from musetalk.training.checkpoint import load_latest_state, save_state, save_unet


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# States to resume from.


def test_a_state_comes_back_with_its_step(tmp_path):
    state = {"unet": {"weight": torch.randn(2, 3)}, "rng": torch.get_rng_state(), "scheduler": {"last_epoch": 3}}
    path = save_state(tmp_path, 12, state, keep=2)
    assert path == tmp_path / "training-state-0000012.pt" and names(tmp_path) == [path.name]
    where, found = load_latest_state(tmp_path)
    assert (
        where == path
        and found["step"] == 12
        and found["scheduler"] == {"last_epoch": 3}
        and found.keys() == state.keys() | {"step"}
    )
    assert torch.equal(found["unet"]["weight"], state["unet"]["weight"]) and torch.equal(found["rng"], state["rng"])
    assert "step" not in state


@given(steps=st.lists(st.integers(0, 10**9), min_size=1, max_size=8, unique=True), keep=st.integers(1, 4))
def test_only_the_newest_states_are_kept(tmp_path_factory, steps, keep):
    folder = tmp_path_factory.mktemp("run")
    for step in sorted(steps):
        save_state(folder, step, {}, keep)
    assert names(folder) == sorted(f"training-state-{step:07d}.pt" for step in sorted(steps)[-keep:])
    assert load_latest_state(folder)[1]["step"] == max(steps)


def test_the_newest_is_the_highest_step_not_the_last_in_the_alphabet(tmp_path):
    for step in (9_999_999, 10_000_000):
        save_state(tmp_path, step, {}, keep=5)
        save_unet(tmp_path, step, {"a": torch.ones(1)}, RIGID)
    assert sorted(names(tmp_path))[-1] == "unet-9999999.safetensors"
    assert load_latest_state(tmp_path)[1]["step"] == 10_000_000
    assert find_unet(tmp_path).name == "unet-10000000.safetensors"


def test_other_files_are_neither_taken_nor_deleted(tmp_path):
    others = [
        "training-state-0000099.partial",
        "training-state-0000099.pt.partial",
        "training-state-x.pt",
        "old-training-state-0000099.pt",
        "training-state-0000099.pt.bak",
        "unet-0000099.partial",
        "unet-0000099.pth",
        "notes.txt",
    ]
    for name in others:
        (tmp_path / name).write_bytes(b"half")
    assert load_latest_state(tmp_path) is None
    with pytest.raises(WeightsError, match="unet-<step>.safetensors"):
        find_unet(tmp_path)
    for step in (1, 2):
        save_state(tmp_path, step, {}, keep=1)
    assert load_latest_state(tmp_path)[1]["step"] == 2
    assert names(tmp_path) == sorted([*others, "training-state-0000002.pt"])


def test_no_folder_is_no_state_and_no_weights(tmp_path):
    assert load_latest_state(tmp_path / "none") is None
    with pytest.raises(WeightsError, match="none"):
        find_unet(tmp_path / "none")


@pytest.mark.parametrize("save", [save_state, save_unet])
def test_a_save_cut_off_leaves_what_was_there(monkeypatch, tmp_path, save):
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


def test_a_state_that_cannot_be_read_is_named(tmp_path):
    save_state(tmp_path, 1, {}, keep=5)
    (tmp_path / "training-state-0000002.pt").write_bytes(b"cut off")
    with pytest.raises(WeightsError, match="training-state-0000002.pt"):
        load_latest_state(tmp_path)


@pytest.fixture
def saved(tmp_path) -> tuple[Path, dict]:
    """A state of a few numbers and where it is."""
    numbers = {"weight": torch.randn(3)}
    optimizer = {"state": {0: {"exp_avg": torch.randn(3)}}, "param_groups": [{"lr": 0.1}]}
    state = {"unet": numbers, "optimizer": optimizer, "optimizer_name": "adam"}
    return save_state(tmp_path, 1, state, keep=1), state


def assert_refused_in_a_sentence(path: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        load_latest_state(path.parent)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.endswith("delete it to resume from the state before it")


def test_a_state_of_which_a_bit_has_changed_is_refused_unless_the_bit_means_nothing(saved):
    """A bit of every third byte: of numbers, of names, of the zip's headers and directory, of padding."""
    path, state = saved
    content = path.read_bytes()
    refused = 0
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            _, found = load_latest_state(path.parent)
        except WeightsError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "delete it" in str(error)
        else:
            assert torch.equal(found["unet"]["weight"], state["unet"]["weight"])
            assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])
            assert (found["step"], found["optimizer_name"]) == (1, "adam")
    assert refused > len(content) / 9


def test_numbers_that_torch_would_take_for_a_folder_are_refused(saved):
    """Marked as a folder in the zip's directory, a record is not read at all: memory as it was would become weights."""
    path, _ = saved
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"data/0"))
    content[entry + 38] |= 0x10  # of its external attributes
    path.write_bytes(content)
    assert_refused_in_a_sentence(path)


@pytest.mark.parametrize("check_sums", [True, False])
def test_a_state_that_was_compressed_is_refused(saved, check_sums):
    """Mapped, its bytes would become weights as they are."""
    path, _ = saved
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="corrupted"):
        load_latest_state(path.parent, check_sums=check_sums)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_a_state_that_was_cut_off_is_refused(saved, share):
    path, _ = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert_refused_in_a_sentence(path)


def test_a_state_that_is_something_else_is_refused(saved):
    path, _ = saved
    for content in (b"<html>", pickle.dumps({"step": 1})):
        path.write_bytes(content)
        assert_refused_in_a_sentence(path)
    path.unlink()
    path.mkdir()
    assert_refused_in_a_sentence(path)


def test_after_a_broken_state_is_deleted_the_one_before_is_found(saved):
    path, state = saved
    newer = save_state(path.parent, 2, state, keep=2)
    newer.write_bytes(newer.read_bytes()[:-9])
    assert_refused_in_a_sentence(newer)
    newer.unlink()
    assert load_latest_state(path.parent)[0] == path


# Weights.


@pytest.fixture(scope="module")
def unet(mini):
    return build_unet(mini, 5, positional_encoding=False)


CONTRACT = replace(MUSETALK_V15, vae="abc", audio_encoder="def", positional_encoding=False)


def test_weights_carry_plain_names_and_the_contract_in_one_metadata_key(tmp_path, unet):
    path = save_unet(tmp_path, 7, unet.model.state_dict(), CONTRACT)
    assert path == tmp_path / "unet-0000007.safetensors" and names(tmp_path) == [path.name]
    with safetensors.safe_open(path, framework="pt") as file:
        assert list(file.metadata()) == ["contract"]
        assert set(file.keys()) == set(unet.model.state_dict())
    assert read_unet_contract(path) == CONTRACT


def test_the_same_weights_give_the_same_bytes(tmp_path, unet):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    contents = [save_unet(tmp_path / x, 1, unet.model.state_dict(), CONTRACT).read_bytes() for x in "ab"]
    assert contents[0] == contents[1]


def test_weights_and_contract_come_back_as_a_network(tmp_path, mini, unet):
    path = save_unet(tmp_path, 7, unet.model.state_dict(), CONTRACT)
    found, contract = load_trained_unet(path, mini)
    assert contract == CONTRACT and not found.positions.any()
    assert all(torch.equal(found.model.state_dict()[k], v) for k, v in unet.model.state_dict().items())
    with_positions, _ = load_trained_unet(save_unet(tmp_path, 8, unet.model.state_dict(), RIGID), mini)
    assert with_positions.positions.any()


def test_diffusers_alone_can_load_the_weights(tmp_path, mini, unet):
    path = save_unet(tmp_path, 7, unet.model.state_dict(), CONTRACT)
    config = json.loads((mini / "musetalk" / "musetalk.json").read_text())
    model = UNet2DConditionModel(**{key: value for key, value in config.items() if not key.startswith("_")})
    model.load_state_dict(safetensors.torch.load_file(path), strict=True)
    x, tokens = torch.randn(1, 8, 32, 32), torch.randn(1, 50, 64)
    with torch.no_grad():
        assert torch.equal(model.eval()(x, 0, encoder_hidden_states=tokens).sample, unet.eval()(x, tokens))


def test_transposed_tensors_are_stored_by_their_values(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3)
    path = save_unet(tmp_path, 1, {"a": tensor.T}, RIGID)
    assert torch.equal(safetensors.torch.load_file(path)["a"], tensor.T)


@pytest.mark.parametrize("fault", ["missing", "text", "no json"])
def test_a_contract_that_cannot_be_read_is_refused_by_name(tmp_path, fault):
    path = tmp_path / "unet-0000001.safetensors"
    if fault == "text":
        path.write_bytes(b"what? " * 99)
    elif fault != "missing":
        safetensors.torch.save_file({"a": torch.ones(1)}, path, {"contract": "{"})
    with pytest.raises(WeightsError) as caught:
        read_unet_contract(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "3", '{"fps": 25}', "null", '"x"'])
def test_a_contract_of_other_fields_is_refused_by_name(tmp_path, content):
    path = tmp_path / "unet-0000001.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1)}, path, {"contract": content})
    with pytest.raises((WeightsError, ContractError)) as caught:
        read_unet_contract(path)
    assert str(path) in str(caught.value)


def test_weights_of_another_network_are_refused_by_name(tmp_path, mini):
    path = save_unet(tmp_path, 1, {"conv_in.weight": torch.ones(1)}, FeatureContract())
    with pytest.raises(WeightsError, match="missing") as caught:
        load_trained_unet(path, mini)
    assert str(path) in str(caught.value) and "wrongly shaped: conv_in.weight" in str(caught.value)


# Weights of others, which carry no contract.


def wrapped(tensors: dict[str, torch.Tensor]) -> dict:
    """As MuseTalkTrainer saves them, from several devices."""
    return {
        "state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "global_step": 3,
        "global_epoch": 1,
    }


PUBLISHED = {
    "musetalk/pytorch_model.bin": torch.save,
    "musetalk/cunet.bin": torch.save,
    "musetalkV15/unet.pth": torch.save,
    "before zip.bin": lambda tensors, path: torch.save(tensors, path, _use_new_zipfile_serialization=False),
    "half.pth": lambda tensors, path: torch.save({name: x.half() for name, x in tensors.items()}, path),
    "unet_checkpoint_step000000003.pth": lambda tensors, path: torch.save(wrapped(tensors), path),
    "diffusion_pytorch_model.safetensors": safetensors.torch.save_file,
    "from hub.safetensors": lambda tensors, path: safetensors.torch.save_file(tensors, path, {"format": "pt"}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_are_read_bit_by_bit_under_the_contract_that_is_named(tmp_path, mini, unet, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    PUBLISHED[name](unet.model.state_dict(), path)
    assert find_unet(path) == path and read_unet_contract(path) is None
    found, contract = load_trained_unet(path, mini, MUSETALK_V1)
    assert contract == MUSETALK_V1 and found.positions.any()
    for key, tensor in unet.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[key], tensor.half().float() if "half" in name else tensor), key
    with pytest.raises(ContractError, match="carries no feature contract.*musetalk_v15") as caught:
        load_trained_unet(path, mini)
    assert str(path) in str(caught.value)


def test_weights_with_a_contract_are_not_taken_for_those_of_another(tmp_path, mini, unet):
    path = save_unet(tmp_path, 7, unet.model.state_dict(), replace(MUSETALK_V15, vae="abc", audio_encoder="def"))
    _, contract = load_trained_unet(path, mini, MUSETALK_V15)  # whose networks are not known
    assert contract.vae == "abc"
    with pytest.raises(ContractError, match="crop = 'nose_centred', but 'rigid'"):
        load_trained_unet(path, mini, RIGID)
    with pytest.raises(ContractError, match="vae = 'abc', but 'xyz'"):
        load_trained_unet(path, mini, replace(MUSETALK_V15, vae="xyz"))


def test_a_training_state_is_not_taken_for_weights(tmp_path, mini, unet):
    path = save_state(tmp_path, 1, {"unet": unet.model.state_dict(), "contract": {}}, keep=1)
    with pytest.raises(
        WeightsError, match="training-state-0000001.pt holds no tensors by name, only unet, contract, step"
    ):
        load_trained_unet(path, mini, RIGID)
