"""Downloads from a local server that speaks plain HTTP and the part of the Hub's protocol that hf_hub_download uses."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tyro
from hostile import refusal
from huggingface_hub import constants, file_download

from musetalk.cli import run_script
from musetalk.download import DownloadConfig, main
from musetalk.models.sources import SOURCES, Source, hub
from musetalk.models.weights import WeightsError, find

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = "net/a.bin"
HUB_PATH = "/owner/repo/resolve/main/weights/a.bin"


@dataclass
class Served:
    """A file of the server."""

    content: bytes = CONTENT
    statuses: list[int] = field(default_factory=list)  # of the next responses
    cuts: list[int] = field(default_factory=list)  # bytes after which the next responses break off
    ranges: list[str | None] = field(default_factory=list)  # Range headers of all GET requests


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        served = self.server.files[self.path]
        size, start = len(served.content), int((self.headers["Range"] or "bytes=0-")[len("bytes=") : -1])
        status = served.statuses.pop(0) if served.statuses else 206 if start else 200
        self.send_response(status)
        self.send_header("Content-Length", str(size - start if status < 400 else 0))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("ETag", f'"{hashlib.sha256(served.content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.end_headers()
        if self.command == "GET":
            served.ranges.append(self.headers["Range"])
            if status < 400:
                self.wfile.write(served.content[start:][: served.cuts.pop(0) if served.cuts else None])

    do_HEAD = do_GET

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files = {}
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(params=["hub", "http"])
def serve(request, server, monkeypatch) -> Callable[..., Served]:
    """Returns a function that puts a file on the server and into `SOURCES`, as a file of the Hub or of another site."""
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    server.files.clear()

    def add(sha256: str = SHA256, **settings) -> Served:
        path = HUB_PATH if request.param == "hub" else "/a.bin"
        source = hub("owner/repo", "weights/a.bin", sha256) if request.param == "hub" else Source(url + path, sha256)
        monkeypatch.setitem(SOURCES, NAME, source)
        server.files[path] = Served(**settings)
        return server.files[path]

    return add


@pytest.fixture
def models(tmp_path) -> Path:
    return tmp_path / "models"


def get(models: Path, *places: str) -> None:
    main(DownloadConfig(places=places or (NAME,), models_dir=models))


def files(folder: Path) -> dict[str, bytes]:
    contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in contents.items() if name != ".lock"}


@pytest.mark.parametrize("sha256", [SHA256, ""])
def test_a_file_is_downloaded_once(serve, models, capsys, sha256):
    served = serve(sha256)
    get(models, NAME, "net", "net/")
    assert files(models) == {NAME: CONTENT}
    get(models)
    assert files(models) == {NAME: CONTENT} and served.ranges == [None]
    assert ("sha256 verified" in capsys.readouterr().out) == bool(sha256)


def test_a_file_with_another_sum_is_refused(serve, models):
    serve(hashlib.sha256(b"").hexdigest())
    with pytest.raises(WeightsError, match=f"is not the published file.* {SHA256} instead of e3b0"):
        get(models)
    assert files(models) == {}
    (models / NAME).write_bytes(CONTENT)
    with pytest.raises(WeightsError, match="a.bin cannot be used; delete it"):
        get(models)
    assert files(models) == {NAME: CONTENT}


@pytest.mark.parametrize("serve", ["hub"], indirect=True)
def test_a_broken_transfer_from_the_hub_is_resumed(serve, models, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    served = serve(cuts=[150_000])
    get(models)
    assert files(models) == {NAME: CONTENT}
    assert served.ranges == [None, "bytes=150000-"]


@pytest.mark.parametrize("fault", [{"statuses": [404] * 9}, {"cuts": [1000] * 99}], ids=repr)
def test_a_failed_transfer_is_reported_in_one_sentence_and_leaves_no_file(serve, models, capsys, fault):
    serve(**fault)
    with pytest.raises(SystemExit) as ended:
        run_script(main, DownloadConfig(places=(NAME,), models_dir=models))
    assert ended.value.code == 2
    assert "a.bin cannot be downloaded: " in capsys.readouterr().err.splitlines()[-1]
    assert files(models) == {} and not (models / ".download").exists()


def test_an_unreachable_server_is_reported_in_one_sentence(serve, models, monkeypatch):
    serve()
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:1/{repo_id}{revision}{filename}")
    if not SOURCES[NAME].repo:
        monkeypatch.setitem(SOURCES, NAME, Source("http://127.0.0.1:1/a.bin"))
    refusal(lambda: get(models), "a.bin cannot be downloaded: ")
    assert files(models) == {}


@pytest.mark.parametrize("place", ["", "..", "whisp", "whisper/../vgg"])
def test_an_unknown_place_is_refused(models, place):
    with pytest.raises(WeightsError, match="is not a known file or folder"):
        get(models, place)
    assert not models.exists()


def test_without_places_all_files_are_listed(models, capsys):
    (models / "whisper").mkdir(parents=True)
    (models / "whisper" / "tiny.pt").touch()
    main(tyro.cli(DownloadConfig, args=["--models-dir", str(models)]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SOURCES)
    assert all(line.endswith(str(source)) for line, source in zip(lines, SOURCES.values(), strict=True))
    assert [line.split()[0] for line in lines if " there " in line] == ["whisper/tiny.pt"]


def test_the_source_of_a_file_for_the_browser_is_printed(models, capsys):
    get(models, "musetalk/cunet.bin")
    assert "cunet.bin cannot be downloaded by this command: get it from https://drive." in capsys.readouterr().out


def test_the_message_of_a_missing_file_names_the_command():
    with pytest.raises(WeightsError, match="python -m musetalk.download vgg/lpips.pth --models-dir 'no models'"):
        find(Path("no models"), "vgg/lpips.pth")
    with pytest.raises(WeightsError, match="cunet.bin, .* and put it there$"):
        find(Path("models"), "musetalk/cunet.bin")
