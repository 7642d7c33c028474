"""Fetching weights over real sockets: what comes is whole and right, or is not there; and it goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path

import pytest
import tyro

from musetalk import download
from musetalk.cli import run_script
from musetalk.download import DownloadConfig, main
from musetalk.errors import UserError
from musetalk.models.weights import SOURCES, Source, WeightsError, find

CONTENT, OTHER = (random.Random(seed).randbytes(300_000) for seed in (0, 1))
NAME = "net/a.bin"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Served:
    """A file of the server, and how it treats it."""

    content: bytes = CONTENT
    told: dict[str, str] = field(default_factory=lambda: {"ETag": '"1"'})
    ranges: bool = True
    heeds_if_range: bool = True
    cuts: list[int] = field(default_factory=list)  # bytes after which the answers, one by one, end
    statuses: list[int] = field(default_factory=list)  # of the answers, one by one, before any is good
    length: bool = True
    goes_on: threading.Event | None = None  # after a cut, waits for it and sends the rest
    asked: list[dict[str, str]] = field(default_factory=list)  # the headers of all requests


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        served = self.server.files[self.path]
        served.asked.append(dict(self.headers))
        whole, status, start, told = served.content, 200, 0, dict(served.told)
        asked = self.headers["Range"] if served.ranges else None
        if asked and (not served.heeds_if_range or self.headers["If-Range"] in (None, *served.told.values())):
            status, start = 206, int(asked.removeprefix("bytes=").removesuffix("-"))
            told["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        if status == 206 and start >= len(whole):
            status, told["Content-Range"] = 416, f"bytes */{len(whole)}"
        body, cut = whole[start:], None
        if served.statuses:
            status, body = served.statuses.pop(0), b"no"
        elif served.cuts:
            cut = served.cuts.pop(0)
        self.send_response(status)
        for key, value in (told | ({"Content-Length": str(len(body))} if served.length else {})).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        if served.goes_on:
            self.wfile.flush()
            served.goes_on.wait()
            self.wfile.write(body[cut:] if cut else b"")

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files = {}
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def serve(server, monkeypatch) -> Callable[..., Served]:
    """A function that puts a file on the server and among the sources, with a sha256 or what else a source says."""
    monkeypatch.setattr(download, "WAITS", (0,))
    monkeypatch.setenv("NO_PROXY", "*")
    server.files.clear()

    def add(name: str = NAME, source: dict | None = None, **treated) -> Served:
        server.files[f"/{name}"] = Served(**treated)
        monkeypatch.setitem(SOURCES, name, Source(f"http://127.0.0.1:{server.server_port}/{name}", **source or {}))
        return server.files[f"/{name}"]

    return add


@pytest.fixture
def models(tmp_path) -> Path:
    return tmp_path / "models"


def get(models: Path, *places: str, retries: int = 3) -> None:
    main(DownloadConfig(places=places or (NAME,), models_dir=models, timeout=10.0, retries=retries))


def files(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if name != ".lock"}


def pins(content: bytes) -> dict[str, bytes]:
    """The file of hashes after this first content of the one file."""
    return {"sha256.json": f"{json.dumps({NAME: sha256(content)}, indent=1)}\n".encode()}


# What comes.


@pytest.mark.parametrize("known", [0, 8, 64])
def test_a_file_comes_whole_and_its_hash_is_kept_where_it_was_not_known(serve, models, capsys, known):
    served = serve(source={"sha256": sha256(CONTENT)[:known], "size": len(CONTENT)})
    get(models)
    assert files(models) == {NAME: CONTENT} | (pins(CONTENT) if known < 64 else {})
    get(models)
    assert len(served.asked) == 1 and "Range" not in served.asked[0]
    assert "a.bin is there and is the right one" in capsys.readouterr().out


def test_a_folder_is_all_that_is_in_it_and_nothing_comes_twice(serve, models):
    served = [serve(name, content=name.encode()) for name in ("x/1", "x/y/2", "xy/3")]
    get(models, "x/", "x/1", "x/y")
    assert [len(one.asked) for one in served] == [1, 1, 0]
    assert files(models).keys() == {"x/1", "x/y/2", "sha256.json"}


def test_a_file_without_a_length_comes_in_pieces_or_not_at_all(serve, models):
    piece = b"%x\r\n" % len(CONTENT) + CONTENT + b"\r\n0\r\n\r\n"
    serve(content=piece, told={"Transfer-Encoding": "chunked"}, length=False)
    get(models)
    assert files(models)[NAME] == CONTENT
    serve("net/b", length=False)
    with pytest.raises(WeightsError, match="cannot be fetched: the server answers 200"):
        get(models, "net/b")
    assert "net/b" not in files(models)


def test_the_list_names_every_file_and_whether_it_is_there(models, capsys):
    (models / "whisper").mkdir(parents=True)
    (models / "whisper" / "tiny.pt").touch()
    main(DownloadConfig(models_dir=models))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SOURCES)
    assert all(line.endswith(str(source)) for line, source in zip(lines, SOURCES.values(), strict=True))
    assert [line.split()[0] for line in lines if " there " in line] == ["whisper/tiny.pt"]
    assert "75,572,083 bytes" in next(line for line in lines if line.startswith("whisper"))
    assert set(models.rglob("*")) == {models / "whisper", models / "whisper" / "tiny.pt"}


def test_what_is_in_no_file_of_the_web_is_named_and_the_rest_comes(serve, models, capsys):
    serve("musetalk/a.bin", source={"sha256": sha256(CONTENT)})
    get(models, "musetalk/cunet.bin", "musetalk/a.bin")
    words = capsys.readouterr().out
    assert f"{models}/musetalk/cunet.bin cannot be fetched by this command: get it from https://drive.google" in words
    assert files(models) == {"musetalk/a.bin": CONTENT}


def test_the_command_line_is_understood_and_a_missing_file_names_it(models):
    config = tyro.cli(DownloadConfig, args=["whisper/tiny.pt", "vgg", "--models-dir", "my models"])
    assert (config.places, config.models_dir) == (("whisper/tiny.pt", "vgg"), Path("my models"))
    assert tyro.cli(DownloadConfig, args=[]).places == ()
    with pytest.raises(WeightsError, match="python -m musetalk.download vgg/lpips.pth --models-dir 'no models' does"):
        find(Path("no models"), "vgg/lpips.pth")
    with pytest.raises(WeightsError, match="cunet.bin, .* and put it there$"):
        find(Path("models"), "musetalk/cunet.bin")


# Going on.


@pytest.mark.parametrize("told", [{"ETag": '"1"'}, {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT", "ETag": 'W/"1"'}])
def test_a_broken_transfer_goes_on_where_it_ended(serve, models, told):
    """After an error of the server that passes."""
    served = serve(statuses=[503], cuts=[150_000, 70_000], told=told)
    get(models)
    assert files(models) == {NAME: CONTENT} | pins(CONTENT)
    begins = [int(asked["Range"][6:-1]) for asked in served.asked[2:]]
    assert len(begins) == 2 and 0 < begins[0] <= 150_000 < begins[1] <= 220_000
    assert {asked["If-Range"] for asked in served.asked[2:]} == {next(iter(told.values()))}


def test_what_has_come_stays_for_the_next_run(serve, models):
    served = serve(cuts=[150_000])
    with pytest.raises(WeightsError, match="run the same command again to go on"):
        get(models, retries=0)
    come = files(models)[f"{NAME}.part"]
    assert NAME not in files(models) and CONTENT.startswith(come)
    get(models)
    assert served.asked[1]["Range"] == f"bytes={len(come)}-"
    assert files(models) == {NAME: CONTENT} | pins(CONTENT)


def test_a_file_that_was_whole_but_had_no_name_yet_is_not_fetched_again(serve, models):
    served = serve(cuts=[150_000])
    with pytest.raises(WeightsError):
        get(models, retries=0)
    (models / f"{NAME}.part").write_bytes(CONTENT)
    get(models)
    assert len(served.asked) == 1 and files(models) == {NAME: CONTENT} | pins(CONTENT)


def test_a_server_without_ranges_starts_over(serve, models):
    served = serve(ranges=False, cuts=[150_000])
    get(models)
    assert "Range" in served.asked[1] and files(models) == {NAME: CONTENT} | pins(CONTENT)


@pytest.mark.parametrize("heeds_if_range", [True, False])
@pytest.mark.parametrize("size", [300_000, 200_000, 100])
def test_a_file_that_changed_meanwhile_starts_over(serve, models, heeds_if_range, size):
    """The last size makes the part longer than the file."""
    served = serve(cuts=[150_000], heeds_if_range=heeds_if_range)
    with pytest.raises(WeightsError):
        get(models, retries=0)
    served.content, served.told = OTHER[:size], {"ETag": '"2"'}
    get(models)
    assert files(models) == {NAME: OTHER[:size]} | pins(OTHER[:size])


@pytest.mark.parametrize("known", [True, False])
def test_without_a_mark_of_its_version_only_a_file_of_a_known_hash_goes_on(serve, models, known):
    served = serve(source={"sha256": sha256(CONTENT)} if known else {}, cuts=[150_000], told={})
    get(models)
    assert files(models)[NAME] == CONTENT
    assert ("Range" in served.asked[1]) == known and "If-Range" not in served.asked[1]


def test_a_part_of_another_address_is_not_gone_on_with(serve, models):
    (models / "net").mkdir(parents=True)
    (models / f"{NAME}.part").write_bytes(OTHER[:1000])
    note = {"url": "https://example.org/a.bin", "validator": '"1"', "size": len(CONTENT)}
    (models / f"{NAME}.part.json").write_text(json.dumps(note))
    served = serve()
    get(models)
    assert "Range" not in served.asked[0] and files(models) == {NAME: CONTENT} | pins(CONTENT)


# What is not right.


@pytest.mark.parametrize("known", [8, 64])
def test_a_file_of_another_hash_does_not_stay(serve, models, known):
    wanted = sha256(OTHER)[:known]
    serve(source={"sha256": wanted})
    with pytest.raises(WeightsError, match=f"{NAME}.part has the sha256 {sha256(CONTENT)} and not {wanted}, as pub"):
        get(models)
    assert files(models).keys() == {f"{NAME}.part.json"}
    serve(source={"sha256": wanted}, content=OTHER)
    get(models)
    assert files(models)[NAME] == OTHER


def test_a_file_that_comes_again_must_be_the_same(serve, models):
    served = serve()
    get(models)
    (models / NAME).unlink()
    served.content = OTHER
    with pytest.raises(WeightsError, match="as noted in .*sha256.json, unless .*; it has been removed; try again"):
        get(models)
    assert NAME not in files(models) and f"{NAME}.part" not in files(models)
    served.content = CONTENT
    get(models)
    assert files(models)[NAME] == CONTENT


def test_a_file_that_is_there_and_is_another_is_named_and_stays(serve, models):
    served = serve(source={"sha256": sha256(CONTENT)})
    (models / "net").mkdir(parents=True)
    (models / NAME).write_bytes(OTHER)
    with pytest.raises(WeightsError, match="move it away and run the same command again"):
        get(models)
    assert files(models) == {NAME: OTHER} and not served.asked


def test_a_file_put_there_by_hand_is_held_against_what_it_was(models, monkeypatch):
    monkeypatch.setitem(SOURCES, NAME, Source("https://example.org/", look_for="a.bin"))
    (models / "net").mkdir(parents=True)
    (models / NAME).write_bytes(CONTENT)
    get(models)
    assert files(models) == {NAME: CONTENT} | pins(CONTENT)
    (models / NAME).write_bytes(OTHER)
    with pytest.raises(WeightsError, match=f"not {sha256(CONTENT)}, as noted in"):
        get(models)


def test_a_transfer_that_brings_nothing_new_ends_in_a_sentence(serve, models):
    served = serve(cuts=[150_000] * 9, ranges=False)
    with pytest.raises(WeightsError, match="run the same command again to go on"):
        get(models, retries=2)
    assert len(served.asked) == 3 and NAME not in files(models)


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (401, 1), (206, 1), (416, 1), (500, 3), (503, 3), (429, 3)])
def test_an_error_of_the_server_is_told(serve, models, status, tries):
    served = serve(statuses=[status] * 9)
    with pytest.raises(WeightsError, match=rf"/net/a.bin.* the server answers {status} \w+"):
        get(models, retries=2)
    assert len(served.asked) == tries and not files(models)


@pytest.mark.parametrize(
    ("treated", "words"),
    [
        ({"told": {"Content-Type": "text/html; charset=utf-8"}}, "gives a web page"),
        ({"content": OTHER[:7]}, "has 7 bytes and not 300000"),
        ({"told": {"Content-Encoding": "gzip"}}, "gives a web page"),
        ({"content": b""}, "0 of 0 bytes have come"),
    ],
)
def test_what_cannot_be_the_file_is_not_fetched(serve, models, treated, words):
    serve(source={"size": len(CONTENT)}, **treated)
    with pytest.raises(WeightsError, match=words):
        get(models)
    assert NAME not in files(models) and "sha256.json" not in files(models)


def test_a_server_that_falls_silent_is_left(serve, models):
    served = serve(cuts=[150_000] * 2, goes_on=threading.Event())
    try:
        with pytest.raises(WeightsError, match="the connection failed"):
            main(DownloadConfig(places=(NAME,), models_dir=models, timeout=0.2, retries=0))
    finally:
        served.goes_on.set()
    assert 0 < len(files(models)[f"{NAME}.part"]) <= 150_000


# Where it may come from and go to.


def test_redirects_are_followed(serve, models):
    serve("net/far", cuts=[150_000])
    served = serve(told={"Location": "/net/far"}, statuses=[302] * 9)
    get(models)
    assert files(models) == {NAME: CONTENT} | pins(CONTENT) and len(served.asked) == 2


@pytest.mark.parametrize(
    "target", ["file:///etc/hostname", "ftp://127.0.0.1/a", "http://example.org/a", "/net/a.bin", "http://["]
)
def test_redirects_to_elsewhere_are_refused(serve, models, target):
    serve(told={"Location": target}, statuses=[302] * 99)
    with pytest.raises(WeightsError, match="leads to where nothing is fetched from"):
        get(models)
    assert not files(models)


@pytest.mark.parametrize("url", ["http://example.org/a", "file:///etc/hostname", "ftp://example.org/a", "a", ""])
def test_nothing_but_https_is_fetched(serve, models, monkeypatch, url):
    serve()  # no proxy
    monkeypatch.setitem(SOURCES, NAME, Source(url))
    with pytest.raises(WeightsError, match="leads to where nothing is fetched from"):
        get(models)
    monkeypatch.setitem(SOURCES, NAME, Source("http://127.0.0.1:1/a"))  # this machine may, but has no server there
    with pytest.raises(WeightsError, match=":1/a: the connection failed"):
        get(models)


@pytest.mark.parametrize("place", ["", ".", "/", "../a", "/etc/hostname", "whisp", "whisper/../vgg", "vgg/lpips.pth/x"])
def test_a_place_that_is_none_is_refused_before_anything_comes(serve, models, place):
    served = serve()
    with pytest.raises(WeightsError, match="no weights have this place"):
        get(models, NAME, place)
    assert not served.asked and not models.exists()


def test_nothing_is_written_outside_of_the_folder(serve, models, tmp_path):
    served, outside = serve(), tmp_path / "outside"
    outside.mkdir()
    models.mkdir()
    (models / "net").symlink_to(outside)
    with pytest.raises(WeightsError, match="leads out of"):
        get(models)
    (models / "net").unlink()
    (models / "net").mkdir()
    (models / f"{NAME}.part").symlink_to(outside / "b")
    with pytest.raises(WeightsError, match="leads out of"):
        get(models)
    assert not list(outside.iterdir()) and not served.asked


@pytest.mark.parametrize("name", [NAME, f"{NAME}.part"])
def test_a_folder_in_the_way_is_named(serve, models, name):
    served = serve()
    (models / name).mkdir(parents=True)
    with pytest.raises(WeightsError, match=f"{name} is in the way"):
        get(models)
    assert not served.asked


# The end of a run.


def test_a_full_disk_is_one_sentence_and_the_next_run_goes_on(serve, models, capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    served = serve()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as ended:
            run_script(main, DownloadConfig(places=(NAME,), models_dir=models))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"{models}/{NAME}.part: File too large"
    assert files(models)[f"{NAME}.part"] == CONTENT[:100_000] and NAME not in files(models)
    get(models)
    assert served.asked[1]["Range"] == "bytes=100000-" and files(models) == {NAME: CONTENT} | pins(CONTENT)


def test_of_two_at_once_the_second_is_refused(serve, models):
    served = serve(cuts=[150_000], goes_on=threading.Event())
    first = get_context("fork").Process(target=get, args=(models,))
    first.start()
    try:
        while not served.asked:
            assert first.is_alive()
        with pytest.raises(UserError, match="in use by another process"):
            get(models)
    finally:
        served.goes_on.set()
        first.join()
    assert first.exitcode == 0 and len(served.asked) == 1 and files(models) == {NAME: CONTENT} | pins(CONTENT)


def test_ctrl_c_keeps_what_has_come(serve, models, tmp_path):
    def run() -> None:
        sys.stdout = sys.stderr = open(tmp_path / "words", "w")
        run_script(main, DownloadConfig(places=(NAME,), models_dir=models))

    served, part = serve(cuts=[150_000], goes_on=threading.Event()), models / f"{NAME}.part"
    process = get_context("fork").Process(target=run)
    process.start()
    try:
        while not (part.exists() and part.stat().st_size):
            assert process.is_alive()
        os.kill(process.pid, signal.SIGINT)
        process.join()
    finally:
        served.goes_on.set()
        process.kill()
        process.join()
    words = (tmp_path / "words").read_text()
    assert process.exitcode == 130 and words.endswith("\ninterrupted; run the same command again to resume\n")
    assert "Traceback" not in words and NAME not in files(models)
    come = part.read_bytes()
    get(models)
    assert CONTENT.startswith(come) and served.asked[1]["Range"] == f"bytes={len(come)}-"
    assert files(models) == {NAME: CONTENT} | pins(CONTENT)
