"""Downloads published weights into a models folder.

    python -m musetalk.download                                  lists all files with their sources
    python -m musetalk.download sd-vae-ft-mse whisper/tiny.pt    downloads these folders and files

Files on Hugging Face come through huggingface_hub (the environment variable HF_ENDPOINT selects a mirror), all others
by plain HTTP. A file gets its name when it is complete and has the published sha256; an existing file is only
verified. After an interruption run the same command again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import requests
import tyro
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError
from tqdm import tqdm

from musetalk.cli import check_constants, run_script
from musetalk.files import atomic_write, folder_lock
from musetalk.models.sources import SOURCES, Source
from musetalk.models.weights import WeightsError, first_line

BLOCK = 1 << 20  # bytes
TIMEOUT = 30  # seconds without an answer


@dataclass
class DownloadConfig:
    """The constants of a download; override them on the command line."""

    places: tyro.conf.Positional[tuple[str, ...]] = ()  # files or folders of the list; if empty, the list is printed
    models_dir: Path = Path("models")


def main(config: DownloadConfig) -> None:
    """Downloads or verifies the files of the given places, or lists all files."""
    check_constants(config)
    if not config.places:
        for name, source in SOURCES.items():
            size = f"{source.size:,}" if source.size else "?"
            state = "there" if (config.models_dir / name).is_file() else "-"
            print(f"{name:<50} {size:>13} bytes  {state:<5}  {source}")
        return
    names = dict.fromkeys(name for place in config.places for name in files_of(place))
    with folder_lock(config.models_dir):
        for name in names:
            provide(name, config.models_dir)


def files_of(place: str) -> list[str]:
    """Returns the names of a file or of all files of a folder. Raises WeightsError if there are none."""
    names = [name for name in SOURCES if f"{name}/".startswith(f"{place.rstrip('/')}/")]
    if not names:
        raise WeightsError(f"{place} is not a known file or folder; python -m musetalk.download lists them")
    return names


def provide(name: str, models_dir: Path) -> None:
    """Downloads a file, or verifies it if it exists. Raises WeightsError, or OSError if it cannot be written."""
    source, path = SOURCES[name], models_dir / name
    if path.is_file():
        check_sum(path, source, f"{path} cannot be used; delete it and run the same command again")
        print(f"{path} exists" + (", sha256 verified" if source.sha256 else ""))
    elif source.look_for:
        print(f"{path} cannot be downloaded by this command: get it from {source} and put it there")
    else:
        with atomic_write(path) as partial:
            download(source, partial, models_dir / ".download")
            check_sum(partial, source, f"{source.url} is not the published file; get it elsewhere")
        print(f"{path} downloaded" + (", sha256 verified" if source.sha256 else ""))


def check_sum(path: Path, source: Source, message: str) -> None:
    """Raises WeightsError with this message if a file does not have the sha256 of its source."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if source.sha256 and digest != source.sha256:
        raise WeightsError(f"{message} (its sha256 is {digest} instead of {source.sha256})")


def download(source: Source, path: Path, hub_dir: Path) -> None:
    """Downloads a file to a path. Raises WeightsError if the transfer fails, OSError if the file cannot be written.

    hub_dir: a folder on the same disk for huggingface_hub, deleted afterwards.
    """
    try:
        if source.repo:
            os.replace(hf_hub_download(source.repo, source.filename, local_dir=hub_dir), path)
        else:
            download_http(source.url, path)
    except (HTTPError, OSError, RuntimeError) as error:  # of httpx; of requests and the system; of hf_xet
        if getattr(error, "errno", None):  # of the disk
            raise
        reason = first_line(error.__cause__ or error)
        raise WeightsError(f"{source.url} cannot be downloaded: {reason}; run the same command again") from error
    finally:
        shutil.rmtree(hub_dir, ignore_errors=True)


def download_http(url: str, path: Path) -> None:
    """Downloads a URL to a path. Raises requests.RequestException, also if the transfer is incomplete."""
    with requests.get(url, stream=True, timeout=TIMEOUT) as response, open(path, "wb") as file:
        response.raise_for_status()
        size = int(response.headers.get("Content-Length", 0))
        with tqdm.wrapattr(file, "write", total=size or None, desc=url.rpartition("/")[2]) as output:
            for block in response.iter_content(BLOCK):
                output.write(block)


if __name__ == "__main__":
    run_script(main, tyro.cli(DownloadConfig, description=__doc__))
