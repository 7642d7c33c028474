"""Fetches published weights into a models folder.

    python -m musetalk.download                                    what there is to fetch, and what of it is here
    python -m musetalk.download sd-vae-ft-mse whisper/tiny.pt      these folders and files of that list

A file comes to `<name>.part` first. It gets its name when it is whole and has the sha256 that it must have: the
published one or, where none is known, that of the first file, which is kept in `sha256.json` of the models folder. A
file that is there is not fetched but held against the same. Run the same command again to go on after an interruption:
what has come is kept, and is not fetched again unless the server has another file by then.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests
import tyro
from tqdm import tqdm

from musetalk.cli import CountOrZero, Positive, check_constants, run_script
from musetalk.files import atomic_write_bytes, folder_lock, read_json
from musetalk.models.sources import SOURCES
from musetalk.models.weights import WeightsError

BLOCK = 1 << 16  # bytes
WAITS = (1, 2, 4, 8, 16, 32)  # seconds before another try, the last one for all further ones
LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass
class DownloadConfig:
    """The constants of fetching; override them on the command line."""

    places: tyro.conf.Positional[tuple[str, ...]] = ()  # files or folders of the list; none prints the list
    models_dir: Path = Path("models")
    timeout: Positive = 30.0  # seconds that a server may be silent
    retries: CountOrZero = 5  # tries in a row that bring nothing new


class Broken(Exception):
    """A transfer ended before the file was whole; another try may get on."""


def main(config: DownloadConfig) -> None:
    """Provide the files of some places, or print what there is."""
    check_constants(config)
    if not config.places:
        for name, source in SOURCES.items():
            size = f"{source.size:,}" if source.size else "?"
            state = "there" if (config.models_dir / name).is_file() else "-"
            print(f"{name:<50} {size:>13} bytes  {state:<5}  {source}")
        return
    names = [name for place in config.places for name in files_of(place)]
    with folder_lock(config.models_dir):
        for name in dict.fromkeys(names):
            provide(name, config)


def files_of(place: str) -> list[str]:
    """The files that a place names. Raises WeightsError where it names none."""
    names = [name for name in SOURCES if f"{name}/".startswith(f"{place.rstrip('/')}/")]
    if not names:
        raise WeightsError(
            f"{place}: no weights have this place; python -m musetalk.download lists those that there are"
        )
    return names


def provide(name: str, config: DownloadConfig) -> None:
    """See to it that a file is there and is the right one. Raises WeightsError, OSError."""
    source, folder, path = SOURCES[name], config.models_dir, config.models_dir / name
    part, note = (path.with_name(f"{path.name}.part{ending}") for ending in ("", ".json"))
    for item in (path, part):
        if item.exists() and not item.is_file():
            raise WeightsError(f"{item} is in the way of a file; move it away")
    if path.is_file():
        verify(path, name, folder, "move it away and run the same command again to fetch it")
        print(f"{path} is there and is the right one")
        return
    if source.look_for:
        print(f"{path} cannot be fetched by this command: get it from {source} and put it there")
        return
    if not part.resolve().is_relative_to(folder.resolve()):
        raise WeightsError(f"{part} leads out of {folder}; remove the link that it goes through")
    part.parent.mkdir(parents=True, exist_ok=True)
    fetch(name, part, note, config)
    try:
        verify(part, name, folder, f"it has been removed; try again, and see what has become of {source.url}")
    except WeightsError:
        part.unlink()
        raise
    os.replace(part, path)
    note.unlink(missing_ok=True)
    print(f"{path} has been fetched and is the right one")


def verify(path: Path, name: str, folder: Path, remedy: str) -> None:
    """Hold a file against the sha256 of its place; where there is none, keep the file's. Raises WeightsError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file, _bar("verify", name, path.stat().st_size) as bar:
        while block := file.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    found, published, pins_path = digest.hexdigest(), SOURCES[name].sha256, folder / "sha256.json"
    pins = read_json(pins_path) if pins_path.exists() else {}
    for wanted, owner in (
        (published, "published"),
        (pins.get(name, ""), f"noted in {pins_path}, unless you remove that"),
    ):
        if not found.startswith(str(wanted)):
            raise WeightsError(f"{path} has the sha256 {found} and not {wanted}, as {owner}; {remedy}")
    if len(published) < len(found) and not pins.get(name):
        atomic_write_bytes(pins_path, f"{json.dumps(pins | {name: found}, indent=1, sort_keys=True)}\n".encode())


def fetch(name: str, part: Path, note: Path, config: DownloadConfig) -> None:
    """Make a part the whole file, going on where it ends. Raises WeightsError, and OSError that names the part."""
    most, failures = -1, 0
    while True:
        try:
            fetch_rest(name, part, note, config.timeout)
            return
        except (Broken, requests.RequestException) as error:
            come = part.stat().st_size if part.exists() else 0
            most, failures = max(most, come), 1 if come > most else failures + 1
            if failures > config.retries:
                reason = str(error) if isinstance(error, Broken) else f"the connection failed ({type(error).__name__})"
                raise WeightsError(f"{SOURCES[name].url}: {reason}; run the same command again to go on") from error
        except OSError as error:
            raise OSError(error.errno, error.strerror, error.filename or str(part)) from error
        time.sleep(WAITS[min(failures, len(WAITS)) - 1])


def fetch_rest(name: str, part: Path, note: Path, timeout: float) -> None:
    """Ask once for what a part lacks, or for all where the part may be of another file.

    Raises Broken or requests' own errors where the part is not whole after that, WeightsError where another try is of
    no use.
    """
    source = SOURCES[name]
    noted = read_json(note) if note.exists() else {}
    known = noted.get("url") == source.url and (noted.get("validator") or len(source.sha256) == 64)
    begun = part.stat().st_size if known and part.exists() else 0
    if begun and begun == noted.get("size"):
        return
    headers = {"Accept-Encoding": "identity"}  # the bytes of the file as they are
    if begun:
        headers |= {"Range": f"bytes={begun}-"} | ({"If-Range": noted["validator"]} if noted.get("validator") else {})
    with ask(source.url, headers, timeout) as response:
        told, status = response.headers, response.status_code
        etag = told.get("ETag", "W/")  # a weak one says nothing about bytes
        news = {"url": source.url, "validator": told.get("Last-Modified", "") if etag.startswith("W/") else etag}
        length, ends = told.get("Content-Length", "0"), told.keys() & {"Content-Length", "Transfer-Encoding"}
        if status == 200 and length.isdecimal() and ends:
            begun, news["size"] = 0, int(length)
        elif begun and status in (206, 416):
            range_told = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", told.get("Content-Range", ""))
            first, last, news["size"] = map(int, range_told.groups()) if range_told else (-1, -1, -1)
            if status == 416 or (first, last) != (begun, news["size"] - 1) or news != noted:
                part.unlink()
                raise Broken("the server has another file than before")
        elif status >= 500 or status in (408, 429):
            raise Broken(f"the server answers {status} {response.reason}")
        else:
            raise WeightsError(f"{source.url} cannot be fetched: the server answers {status} {response.reason}")
        if "text/html" in told.get("Content-Type", "") or told.get("Content-Encoding", "identity") != "identity":
            raise WeightsError(f"{source.url} gives a web page and not the file; get it by hand")
        if source.size and news["size"] not in (0, source.size):
            raise WeightsError(f"{source.url} has {news['size']} bytes and not {source.size}; get the file elsewhere")
        with open(part, "ab" if begun else "wb") as file, _bar("fetch", name, news["size"], begun) as bar:
            if not begun:
                atomic_write_bytes(note, json.dumps(news).encode())
            for block in response.iter_content(BLOCK):
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    come = part.stat().st_size
    if come != (news["size"] or come) or not come:
        raise Broken(f"{come} of {news['size']} bytes have come")


def ask(url: str, headers: dict[str, str], timeout: float) -> requests.Response:
    """The answer to a request over https or to a server on this machine, and so wherever it is redirected.

    Raises requests' own errors where there is none, WeightsError where another try is of no use.
    """
    session = requests.Session()
    del session.adapters["http://"]
    if (address := urlsplit(url)).hostname in LOCAL:
        session.mount(f"http://{address.netloc}/", requests.adapters.HTTPAdapter())
    try:
        return session.get(url, headers=headers, stream=True, timeout=timeout)
    except (ValueError, requests.TooManyRedirects) as error:
        raise WeightsError(f"{url} leads to where nothing is fetched from ({error})") from error


def _bar(doing: str, name: str, size: int, begun: int = 0) -> tqdm:
    return tqdm(desc=f"{doing} {name}", total=size or None, initial=begun, unit="B", unit_scale=True, leave=False)


if __name__ == "__main__":
    run_script(main, tyro.cli(DownloadConfig, description=__doc__))
