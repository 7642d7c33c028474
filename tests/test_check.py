"""The check reports whether training could start, and which file prevents it."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from seeded import random_weights

from musetalk.check import CheckConfig, files, main, optional_networks, trial
from musetalk.errors import UserError
from musetalk.models.inception import Inception
from musetalk.models.syncnet_v2 import SyncNetV2


def test_a_report_has_no_fault_and_is_reproducible(sample_cache, mini, capsys):
    reports = []
    for _ in range(2):
        main(CheckConfig(models_dir=mini, hdtf_samples_dir=sample_cache.folder))
        reports.append(capsys.readouterr().out)
    assert not re.search("^!", reports[0], re.MULTILINE)
    for part in ("VAE: loads", "audio encoder: loads", "UNet, untrained: loads", "3 clips", sample_cache.contract.vae):
        assert part in reports[0]
    first, second = (re.findall(r"output \S+", report) for report in reports)
    assert first == second != []


def test_networks_of_the_evaluation_are_checked_if_they_are_there(tmp_path):
    published = {"syncnet/syncnet_v2.model": SyncNetV2(), "inception/pt_inception-2015-12-05-6726825d.pth": Inception()}
    for file, network in published.items():
        (tmp_path / file).parent.mkdir()
        torch.save(random_weights(network).state_dict(), tmp_path / file)
    findings = {name: trial(name, load, run)[1] for name, load, run in optional_networks(tmp_path, states=1)}
    assert findings.keys() == {"SyncNet v2", "Inception"}
    assert all(": loads strictly" in finding.text and not finding.fault for finding in findings.values())
    assert len(list(files(tmp_path))) == 2


def test_every_fault_is_named_and_the_other_publishedare_checked(mini, tmp_path, capsys):
    """A truncated VAE and an empty cache."""
    models = shutil.copytree(mini, tmp_path / "models")
    vae = models / "sd-vae-ft-mse/diffusion_pytorch_model.safetensors"
    vae.write_bytes(vae.read_bytes()[:1000])
    with pytest.raises(UserError, match="could not start"):
        main(CheckConfig(models_dir=models, hdtf_samples_dir=tmp_path / "cache"))
    out = capsys.readouterr().out
    faults = re.findall("^!.*", out, re.MULTILINE)
    assert len(faults) == 2 and str(vae) in faults[0] and str(tmp_path / "cache") in faults[1]
    assert "audio encoder: loads" in out
