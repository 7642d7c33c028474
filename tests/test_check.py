"""The check reports whether training could start, and which file prevents it."""

from __future__ import annotations

import re
import shutil

import pytest

from musetalk.check import CheckConfig, main
from musetalk.errors import UserError


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


def test_every_fault_is_named_and_the_other_files_are_checked(mini, tmp_path, capsys):
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
