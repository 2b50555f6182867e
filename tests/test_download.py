"""download.py against a local server that serves well, truncates, stalls, fails, lies and changes
its mind."""

import errno
import hashlib
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import h5py
import numpy as np
import pytest
from PIL import Image

import data
from data import DataError
from plainst import download, sources
from plainst.download import DownloadError, Folder, fetch
from plainst.sources import Item

ROOT = Path(__file__).resolve().parent.parent
FAST = {"retries": 3, "timeout": 5.0, "backoff": 0.001}
TEXT = b"Gene,x,y\n" + b"".join(b"Gad1,%d,%d\n" % (i, i * i % 977) for i in range(20000))
HTML = b"\n<!DOCTYPE html><html><body>Sorry, try later</body></html>"


def hdf5_bytes(libver="earliest", seed=0):
    memory = io.BytesIO()
    with h5py.File(memory, "w", libver=libver) as file:
        file["data"] = np.random.default_rng(seed).integers(0, 9, 30000)
    return memory.getvalue()


def png_bytes():
    memory = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (60, 50, 3), dtype=np.uint8)).save(
        memory, "PNG"
    )
    return memory.getvalue()


def npz_bytes():
    memory = io.BytesIO()
    np.savez_compressed(memory, row=np.arange(500))
    return memory.getvalue()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        with self.server.guard:
            earlier = sum(path == self.path for path, _ in self.server.log)
            self.server.log.append((self.path, dict(self.headers)))
        route = self.server.routes.get(self.path)
        if route is None:
            self.reply(b"not found", status=404)
        elif isinstance(route, list):  # one behaviour a request, the last one for ever
            route[min(earlier, len(route) - 1)](self)
        else:
            route(self)

    def reply(self, body, status=200, declared=None, **headers):
        """Send `body`; `declared`: a Content-Length that need not be true (the connection closes
        after the body)."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if declared is None else declared))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, *args):
        pass


def whole(body, **headers):
    return lambda handler: handler.reply(body, **headers)


def truncated(body, keep, **headers):
    return lambda handler: handler.reply(body[:keep], declared=len(body), **headers)


def status(code, **headers):
    return lambda handler: handler.reply(b"<html>error</html>", status=code, **headers)


def ranged(body, etag='"v1"', shift=0, total=None):
    """A correct Range/If-Range server; `shift` and `total` make it lie about the place."""

    def route(handler):
        wanted = handler.headers.get("Range")
        if not wanted or handler.headers.get("If-Range") != etag:
            return handler.reply(body, ETag=etag)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) + shift
        if start >= len(body):
            return handler.reply(b"", status=416, Content_Range=f"bytes */{len(body)}")
        return handler.reply(
            body[start:],
            status=206,
            ETag=etag,
            Content_Range=f"bytes {start}-{len(body) - 1}/{total or len(body)}",
        )

    return route


def stalled(body, keep, **headers):
    def route(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body[:keep])
        handler.wfile.flush()
        handler.server.sent.set()
        handler.server.release.wait(20)
        handler.close_connection = True

    return route


def reset(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.flush()
    # close() then sends RST
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


@pytest.fixture
def server(monkeypatch):
    for name in (
        "http_proxy",
        "HTTP_PROXY",
        "https_proxy",
        "HTTPS_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads, httpd.block_on_close = True, False
    httpd.handle_error = lambda request, client: None  # broken pipes are what these tests are about
    httpd.routes, httpd.log, httpd.guard = {}, [], threading.Lock()
    httpd.sent, httpd.release = threading.Event(), threading.Event()
    httpd.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    thread = threading.Thread(
        target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    yield httpd
    httpd.release.set()
    httpd.shutdown()
    httpd.server_close()


def at(server, route, name="/file.csv"):
    server.routes[name] = route
    return server.url + name


def headers_of(server, n):
    return server.log[n][1]


# --- good and recoverable servers


def test_good_file_record_and_no_leftovers(server, tmp_path):
    record = fetch(
        at(server, whole(TEXT)),
        tmp_path / "a" / "spots.csv",
        size=len(TEXT),
        sha256=hashlib.sha256(TEXT).hexdigest().upper(),
        **FAST,
    )
    assert (tmp_path / "a" / "spots.csv").read_bytes() == TEXT
    assert (
        record["size"] == len(TEXT)
        and record["sha256"] == hashlib.sha256(TEXT).hexdigest()
        and record["url"] == server.url + "/file.csv"
    )
    assert time.strptime(record["date"], "%Y-%m-%dT%H:%M:%SZ")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["spots.csv"]
    assert len(server.log) == 1


@pytest.mark.parametrize(
    "first",
    [
        truncated(TEXT, 5000),
        reset,
        status(500),
        status(503),
        status(429),
        status(408),
        truncated(TEXT, 0),
    ],
)
def test_passing_failure_is_tried_again(server, tmp_path, first):
    fetch(at(server, [first, first, whole(TEXT)]), tmp_path / "f.csv", **FAST)
    assert (tmp_path / "f.csv").read_bytes() == TEXT and len(server.log) == 3


def test_stalled_connection_times_out_and_is_tried_again(server, tmp_path):
    url = at(server, [stalled(TEXT, 3000, ETag='"v1"'), ranged(TEXT)])
    start = time.monotonic()
    fetch(url, tmp_path / "f.csv", retries=1, timeout=0.15, backoff=0.001)
    assert time.monotonic() - start < 3
    assert (tmp_path / "f.csv").read_bytes() == TEXT
    assert headers_of(server, 1)["Range"] == "bytes=3000-"


def test_resume_sends_range_and_if_range(server, tmp_path):
    fetch(
        at(server, [truncated(TEXT, 12345, ETag='"v1"'), ranged(TEXT)]), tmp_path / "f.csv", **FAST
    )
    assert "Range" not in headers_of(server, 0)
    assert (
        headers_of(server, 1)["Range"] == "bytes=12345-"
        and headers_of(server, 1)["If-Range"] == '"v1"'
    )
    assert (tmp_path / "f.csv").read_bytes() == TEXT


def test_resume_goes_on_in_a_later_call(server, tmp_path):
    url = at(server, [truncated(TEXT, 12345, ETag='"v1"'), ranged(TEXT)])
    with pytest.raises(DownloadError, match="12345 of"):
        fetch(url, tmp_path / "f.csv", retries=0)
    assert (tmp_path / "f.csv.part").stat().st_size == 12345 and not (tmp_path / "f.csv").exists()
    fetch(url, tmp_path / "f.csv", retries=0)
    assert headers_of(server, 1)["Range"] == "bytes=12345-"
    assert (tmp_path / "f.csv").read_bytes() == TEXT and [
        path.name for path in tmp_path.iterdir()
    ] == ["f.csv"]


def test_resume_by_date_when_the_etag_is_weak(server, tmp_path):
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    fetch(
        at(
            server,
            [truncated(TEXT, 100, ETag='W/"x"', Last_Modified=date), ranged(TEXT, etag=date)],
        ),
        tmp_path / "f.csv",
        **FAST,
    )
    assert headers_of(server, 1)["If-Range"] == date and (tmp_path / "f.csv").read_bytes() == TEXT


def test_no_validator_means_no_resume(server, tmp_path):
    fetch(at(server, [truncated(TEXT, 100), ranged(TEXT)]), tmp_path / "f.csv", **FAST)
    assert "Range" not in headers_of(server, 1) and (tmp_path / "f.csv").read_bytes() == TEXT


def test_server_that_ignores_range_restarts_from_zero(server, tmp_path):
    fetch(
        at(server, [truncated(TEXT, 777, ETag='"v1"'), whole(TEXT, ETag='"v1"')]),
        tmp_path / "f.csv",
        **FAST,
    )
    assert (
        headers_of(server, 1)["Range"] == "bytes=777-" and (tmp_path / "f.csv").read_bytes() == TEXT
    )


def test_changed_etag_restarts_from_zero(server, tmp_path):
    new = TEXT.replace(b"Gad1", b"Pvalb")
    fetch(
        at(server, [truncated(TEXT, 9000, ETag='"v1"'), ranged(new, etag='"v2"')]),
        tmp_path / "f.csv",
        **FAST,
    )
    assert headers_of(server, 1)["If-Range"] == '"v1"' and (tmp_path / "f.csv").read_bytes() == new


@pytest.mark.parametrize(
    "liar",
    [
        ranged(TEXT, shift=-7),
        ranged(TEXT, shift=7),
        ranged(TEXT, total=len(TEXT) + 5),
        lambda handler: handler.reply(TEXT[4000:], status=206),
        lambda handler: handler.reply(
            TEXT[4000:],
            status=206,
            ETag='"v2"',
            Content_Range=f"bytes 4000-{len(TEXT) - 1}/{len(TEXT)}",
        ),
    ],
)
def test_wrong_partial_answer_is_not_glued_on(server, tmp_path, liar):
    fetch(
        at(server, [truncated(TEXT, 4000, ETag='"v1"'), liar, ranged(TEXT)]),
        tmp_path / "f.csv",
        **FAST,
    )
    assert (tmp_path / "f.csv").read_bytes() == TEXT
    assert "Range" in headers_of(server, 1) and "Range" not in headers_of(server, 2)


def test_shrunk_file_416_restarts(server, tmp_path):
    short = TEXT[:3000]
    fetch(
        at(server, [truncated(TEXT, 4000, ETag='"v1"'), ranged(short), ranged(short)]),
        tmp_path / "f.csv",
        **FAST,
    )
    assert (tmp_path / "f.csv").read_bytes() == short and len(server.log) == 3


def test_a_part_of_another_address_or_without_note_is_not_used(server, tmp_path):
    with pytest.raises(DownloadError):
        fetch(
            at(server, truncated(TEXT, 4000, ETag='"v1"'), "/old.csv"),
            tmp_path / "f.csv",
            retries=0,
        )
    fetch(at(server, ranged(TEXT), "/new.csv"), tmp_path / "f.csv", **FAST)
    (tmp_path / "g.csv.part").write_bytes(b"x" * 500)
    fetch(at(server, ranged(TEXT), "/g.csv"), tmp_path / "g.csv", **FAST)
    (tmp_path / "h.csv.part").write_bytes(b"x" * 500)
    (tmp_path / "h.csv.part.json").write_text('{"url": ')
    fetch(at(server, ranged(TEXT), "/h.csv"), tmp_path / "h.csv", **FAST)
    for i, (validator, total) in enumerate(
        [
            ('"1"\r\nX: y', 9000),
            (["1"], 9000),
            (5, 9000),
            ('"1"', 9000.5),
            ('"1"', "9"),
            ("\u00e4", 9000),
        ]
    ):
        (tmp_path / f"n{i}.csv.part").write_bytes(b"x" * 500)
        (tmp_path / f"n{i}.csv.part.json").write_text(
            json.dumps({"url": f"{server.url}/n{i}.csv", "validator": validator, "total": total})
        )
        fetch(at(server, ranged(TEXT), f"/n{i}.csv"), tmp_path / f"n{i}.csv", **FAST)
        assert (tmp_path / f"n{i}.csv").read_bytes() == TEXT
    assert all((tmp_path / name).read_bytes() == TEXT for name in ("f.csv", "g.csv", "h.csv"))
    assert all("Range" not in headers for _, headers in server.log)


def test_complete_part_needs_no_request(server, tmp_path):
    url = server.url + "/f.csv"
    (tmp_path / "f.csv.part").write_bytes(TEXT)
    (tmp_path / "f.csv.part.json").write_text(
        json.dumps({"url": url, "validator": '"v1"', "total": len(TEXT)})
    )
    fetch(url, tmp_path / "f.csv", **FAST)
    assert (tmp_path / "f.csv").read_bytes() == TEXT and server.log == []


def test_chunked_answer(server, tmp_path):
    def chunked(handler, whole_body=True):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(TEXT) if whole_body else 50000, 50000):
            block = TEXT[start : start + 50000]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))
        if whole_body:
            handler.wfile.write(b"0\r\n\r\n")
        handler.close_connection = True

    fetch(
        at(server, [lambda handler: chunked(handler, False), chunked]), tmp_path / "f.csv", **FAST
    )
    assert (tmp_path / "f.csv").read_bytes() == TEXT and len(server.log) == 2


def test_pauses_double_and_retry_after_is_honoured(server, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    url = at(
        server,
        [
            status(503),
            status(503),
            status(503),
            status(429, Retry_After="7"),
            status(503, Retry_After="99999"),
            status(503, Retry_After="soon"),
            whole(TEXT),
        ],
    )
    fetch(url, tmp_path / "f.csv", retries=6, backoff=1.0)
    assert all(0.5 * 2**n <= pauses[n] <= 1.5 * 2**n for n in range(3))
    assert pauses[3] == 7 and pauses[4] == 120 and 16 <= pauses[5] <= 48


# --- servers that cannot be helped: nothing under the final name, manifest as it was


def expect_failure(server, tmp_path, route, name="file.csv", requests=None, match=None, **known):
    """Folder.get must raise DownloadError and leave neither the file nor a changed manifest; -> the
    folder."""
    folder = Folder(tmp_path, **FAST)
    folder.get(Item(at(server, whole(TEXT), "/good.csv"), "good.csv"))
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(DownloadError, match=match) as caught:
        folder.get(Item(at(server, route, f"/{name}"), name, **known))
    assert "\n" not in str(caught.value) and f"{server.url}/{name}" in str(caught.value)
    assert not (tmp_path / name).exists() and (tmp_path / "manifest.json").read_bytes() == before
    if requests is not None:
        assert len(server.log) - 1 == requests
    return folder


def test_bytes_beyond_the_declared_length_are_not_taken(server, tmp_path):
    """Content-Length ends the answer: what follows it belongs to no file, and a known size tells
    that the file is longer."""
    long = TEXT * 4
    url = at(server, lambda handler: handler.reply(long, declared=len(long) - 100))
    assert fetch(url, tmp_path / "f.csv", **FAST)["size"] == len(long) - 100
    expect_failure(
        server, tmp_path, server.routes["/file.csv"], "long.csv", size=len(long), match="offers"
    )


def test_always_truncated(server, tmp_path):
    expect_failure(
        server, tmp_path, truncated(TEXT, 1000), requests=4, match="closed after 1000 of"
    )


def test_always_500(server, tmp_path):
    expect_failure(server, tmp_path, status(500), requests=4, match="500")


@pytest.mark.parametrize("code", [404, 403, 401, 410])
def test_refusals_are_not_retried(server, tmp_path, code):
    expect_failure(server, tmp_path, status(code), requests=1, match=str(code))


def test_202_is_not_a_file(server, tmp_path):
    expect_failure(server, tmp_path, status(202), requests=1, match="202")


@pytest.mark.parametrize("size", [len(TEXT) - 1, len(TEXT) + 1])
def test_content_length_differs_from_the_known_size(server, tmp_path, size):
    expect_failure(server, tmp_path, whole(TEXT), size=size, requests=1, match="offers")
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize(
    "name,body",
    [
        ("m.h5", hdf5_bytes()),
        ("m.h5ad", hdf5_bytes("latest")),
        ("i.png", png_bytes()),
        ("n.npz", npz_bytes()),
    ],
)
def test_declared_shorter_than_the_file(server, tmp_path, name, body):
    """Content-Length and body agree with each other and no size is known: only the file's own
    structure shows the cut."""
    expect_failure(server, tmp_path, whole(body[:-40]), name, requests=1, match="cut short")
    Folder(tmp_path, **FAST).get(Item(at(server, whole(body), f"/whole/{name}"), name))
    assert (tmp_path / name).read_bytes() == body


def test_unknown_length_is_refused_unless_the_size_is_known(server, tmp_path):
    def endless(handler, keep=None):
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + TEXT[:keep])
        handler.close_connection = True

    folder = expect_failure(server, tmp_path, endless, match="how long")
    with pytest.raises(DownloadError, match="bytes arrived"):
        folder.get(
            Item(
                at(server, lambda handler: endless(handler, 50), "/cut.csv"),
                "cut.csv",
                size=len(TEXT),
            )
        )
    assert not (tmp_path / "cut.csv").exists()
    folder.get(Item(server.url + "/file.csv", "file.csv", size=len(TEXT)))
    assert (tmp_path / "file.csv").read_bytes() == TEXT


def test_wrong_hash_deletes_the_part(server, tmp_path):
    expect_failure(
        server, tmp_path, whole(TEXT, ETag='"v1"'), sha256="0" * 64, requests=1, match="SHA-256"
    )
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize(
    "name", ["m.h5", "m.h5ad", "i.png", "n.npz", "t.csv", "t.tsv", "s.json", "g.gmt"]
)
@pytest.mark.parametrize(
    "body", [HTML, b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:1"]
)
def test_error_page_in_place_of_the_file(server, tmp_path, name, body):
    expect_failure(
        server, tmp_path, whole(body, Content_Type="text/html"), name, requests=1, match="is no"
    )
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize(
    "name,body",
    [
        ("t.csv", png_bytes()),
        ("s.json", b"Gene,x,y"),
        ("i.png", hdf5_bytes()),
        ("m.h5", png_bytes()),
    ],
)
def test_another_kind_of_file(server, tmp_path, name, body):
    expect_failure(server, tmp_path, whole(body), name, requests=1, match="is no")


def test_nobody_listens(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(DownloadError, match="no answer"):
            fetch(f"http://127.0.0.1:{unused.getsockname()[1]}/x.csv", tmp_path / "x.csv", **FAST)
    assert not (tmp_path / "x.csv").exists()


def test_failed_update_leaves_the_old_file(server, tmp_path):
    (tmp_path / "f.csv").write_bytes(b"old")
    with pytest.raises(DownloadError):
        fetch(at(server, whole(HTML)), tmp_path / "f.csv", **FAST)
    assert (tmp_path / "f.csv").read_bytes() == b"old"


# --- the disk


def test_full_disk_is_a_data_error_that_names_the_file(server, tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    url = at(server, whole(TEXT))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # a real failing write(2)
    try:
        with pytest.raises(DataError, match="f.csv.*free some space") as caught:
            fetch(url, tmp_path / "f.csv", **FAST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # no retry, no other home
    assert not isinstance(caught.value, DownloadError) and len(server.log) == 1
    assert not (tmp_path / "f.csv").exists()


def test_no_space_at_the_last_moment(server, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download.os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        fetch(at(server, whole(TEXT)), tmp_path / "f.csv", **FAST)
    assert not (tmp_path / "f.csv").exists()


def test_out_below_a_file(server, tmp_path, capsys):
    (tmp_path / "plain").write_text("x")
    assert (
        download.main(
            ["hallmark", "--out", str(tmp_path / "plain" / "sub"), "--mirror", server.url]
        )
        == 2
    )
    assert str(tmp_path / "plain") in capsys.readouterr().err


# --- manifest


def test_present_files_are_skipped_and_damaged_ones_fetched_again(server, tmp_path):
    item = Item(at(server, whole(TEXT)), "file.csv")
    Folder(tmp_path, **FAST).get(item)
    Folder(tmp_path, **FAST).get(item)
    Folder(tmp_path, verify=True, **FAST).get(item)
    assert len(server.log) == 1
    flipped = bytearray(TEXT)
    flipped[100] ^= 1
    (tmp_path / "file.csv").write_bytes(flipped)
    Folder(tmp_path, **FAST).get(item)  # the same size: only --verify sees it
    assert len(server.log) == 1 and (tmp_path / "file.csv").read_bytes() == flipped
    Folder(tmp_path, verify=True, **FAST).get(item)
    assert len(server.log) == 2 and (tmp_path / "file.csv").read_bytes() == TEXT
    (tmp_path / "file.csv").write_bytes(TEXT[:-1])
    Folder(tmp_path, **FAST).get(item)
    assert len(server.log) == 3 and (tmp_path / "file.csv").read_bytes() == TEXT
    assert (tmp_path / "file.csv.stale").read_bytes() == TEXT[:-1]


def test_unrecorded_file_is_not_trusted(server, tmp_path):
    (tmp_path / "file.csv").write_bytes(TEXT[:500])
    Folder(tmp_path, **FAST).get(Item(at(server, whole(TEXT)), "file.csv"))
    assert (tmp_path / "file.csv").read_bytes() == TEXT


def test_trust_on_first_use(server, tmp_path):
    """A later download must have the recorded hash; a damaged file does not stay under its name
    when the new one is refused."""
    item = Item(at(server, [whole(TEXT), whole(TEXT.replace(b"Gad1", b"Gad2"))]), "file.csv")
    folder = Folder(tmp_path, **FAST)
    folder.get(item)
    before = (tmp_path / "manifest.json").read_bytes()
    (tmp_path / "file.csv").write_bytes(b"Gene")
    with pytest.raises(DownloadError, match="manifest.json"):
        folder.get(item)
    assert (
        not (tmp_path / "file.csv").exists() and (tmp_path / "manifest.json").read_bytes() == before
    )


def test_pinned_hash_beats_the_manifest(server, tmp_path):
    folder = Folder(tmp_path, **FAST)
    folder.get(Item(at(server, [whole(TEXT), whole(TEXT + b"x")]), "file.csv"))
    folder.get(
        Item(server.url + "/file.csv", "file.csv", sha256=hashlib.sha256(TEXT + b"x").hexdigest())
    )
    assert (tmp_path / "file.csv").read_bytes() == TEXT + b"x"


RECORD = '{"h.all.symbols.gmt": {"url": "", "size": %s, "sha256": %s, "date": ""}}'


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"a": 1}',
        '{"a": {"size": 1}}',
        '{"h.all.symbols.gmt": null}',
        RECORD % ('"1"', '"a"'),
        RECORD % ("1", "5"),
        RECORD % ("1", "null"),
        "[" * 100_000,
    ],
)
def test_broken_manifest(tmp_path, capsys, text):
    (tmp_path / "manifest.json").write_text(text)
    assert (
        download.main(["hallmark", "--out", str(tmp_path), "--mirror", "http://127.0.0.1:9"]) == 2
    )
    assert (
        "manifest.json" in capsys.readouterr().err
        and (tmp_path / "manifest.json").read_text() == text
    )


# --- command line, every address moved to the local server

GMT = b"".join(b"HALLMARK_%d\thttp://x\tTP53\tMYC\n" % i for i in range(50))
QUICK = ["--retries", "1", "--backoff", "0.001", "--timeout", "5"]


def publish(server, items, prefix="", route=whole):
    """Serve every item under its public path and query; -> {name: bytes}."""
    bodies = {}
    for number, item in enumerate(items):
        suffix = Path(item.name).suffix
        body = {
            ".h5": hdf5_bytes(seed=number),
            ".h5ad": hdf5_bytes(seed=number),
            ".loom": hdf5_bytes(seed=number),
            ".png": png_bytes(),
            ".npz": npz_bytes(),
            ".gmt": GMT,
            ".json": b'{"tissue_hires_scalef": 0.15}',
        }.get(suffix, TEXT + item.name.encode())
        bodies[item.name] = body
        parts = urlsplit(item.url)
        query = f"?{parts.query}" if parts.query else ""
        server.routes[prefix + parts.path + query] = route(body)
    return bodies


@pytest.mark.parametrize("dataset", sorted(download.PLAIN))
@pytest.mark.parametrize("prefix", ["", "/mirror"])
def test_cli_plain_files(server, tmp_path, capsys, monkeypatch, dataset, prefix):
    loose = [item._replace(size=None, sha256=None) for item in download.PLAIN[dataset]]
    monkeypatch.setitem(download.PLAIN, dataset, loose)
    bodies = publish(server, download.PLAIN[dataset], prefix)
    argv = [dataset, "--out", str(tmp_path), "--mirror", server.url + prefix, *QUICK]
    assert download.main(argv) == 0
    assert {name: (tmp_path / name).read_bytes() for name in bodies} == bodies
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert {name: (record["size"], record["sha256"]) for name, record in manifest.items()} == {
        name: (len(body), hashlib.sha256(body).hexdigest()) for name, body in bodies.items()
    }
    requests = len(server.log)
    assert (
        download.main(argv) == 0
        and download.main([*argv, "--verify"]) == 0
        and len(server.log) == requests
    )
    out = capsys.readouterr().out
    assert "ready" in out and f"licence: {sources.TERMS[dataset][1]}" in out


def test_pinned_file_from_a_mirror_must_be_the_pinned_one(server, tmp_path, capsys):
    publish(server, download.PLAIN["connectomedb"])
    argv = ["connectomedb", "--out", str(tmp_path), "--mirror", server.url, *QUICK]
    assert download.main(argv) == 2 and "expected 26348" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_files_of_git_repositories_are_pinned_to_a_commit():
    items = [item for items in sources.PLAIN.values() for item in items]
    items += [item for name in sources.FIGSHARE for item in sources.dlpfc_homes(name)[0]]
    urls = [item.url for item in items if item.url.startswith(sources.GITHUB)]
    assert len(urls) == 2 + 1 + 3 * 12
    assert all(re.match(rf"{sources.GITHUB}/[^/]+/[^/]+/[0-9a-f]{{40}}/", url) for url in urls)
    assert set(sources.TERMS) == {*sources.PLAIN, "dlpfc", "hest", "hest1k"}


def test_donors_of_all_slices(server, tmp_path, real_data):
    """The published files do not say whose sections they are: --split donor asked in vain."""
    argv = ["--slices", "151507,151673", "--out", str(tmp_path), "--mirror", server.url, *QUICK]
    for name in ("151507", "151673"):
        publish(server, sources.dlpfc_homes(name)[0])
    assert download.main(["dlpfc", *argv]) == 0
    rows = (tmp_path / "slice_donors.csv").read_text().split()
    donors = dict(row.split(",") for row in rows[1:])
    assert rows[0] == "slice,donor" and set(donors) == set(sources.FIGSHARE)
    for folder in [*(real_data / "dlpfc").iterdir(), *(real_data / "dlpfc_labels_only").iterdir()]:
        assert data.load_visium(folder, counts=False).patient == donors[folder.name]


def test_addresses_are_the_documented_ones():
    parts, h5ad = download.dlpfc_homes("151673")
    assert h5ad[0].url == "https://ndownloader.figshare.com/files/39055568"
    assert {item.url for item in parts} >= {
        "https://spatial-dlpfc.s3.us-east-2.amazonaws.com/h5/151673_filtered_feature_bc_matrix.h5",
        "https://spatial-dlpfc.s3.us-east-2.amazonaws.com/images/151673_tissue_hires_image.png",
        "https://raw.githubusercontent.com/LieberInstitute/HumanPilot/999faa39ed534993da1c9e491085adc6f60940bc/10X/151673/tissue_positions_list.txt",
        "https://raw.githubusercontent.com/LieberInstitute/HumanPilot/999faa39ed534993da1c9e491085adc6f60940bc/10X/barcode_level_layer_map.tsv",
    }
    assert len(download.FIGSHARE) == 12 and len(set(download.FIGSHARE.values())) == 12
    assert parts[-1].name == "151673/filtered_feature_bc_matrix.h5"


def test_cli_dlpfc_first_home(server, tmp_path):
    bodies = {}
    for sample in ("151673", "151674"):
        bodies.update(publish(server, download.dlpfc_homes(sample)[0]))
    assert (
        download.main(
            [
                "dlpfc",
                "--slices",
                "151673,151674",
                "--out",
                str(tmp_path),
                "--mirror",
                server.url,
                *QUICK,
            ]
        )
        == 0
    )
    assert {name: (tmp_path / name).read_bytes() for name in bodies} == bodies and len(bodies) == 11
    assert len(server.log) == 11  # the label map once
    assert not list(tmp_path.glob("**/*.part*"))


def test_cli_dlpfc_falls_back_to_the_second_home(server, tmp_path, capsys):
    parts, h5ad = download.dlpfc_homes("151673")
    publish(server, parts)
    server.routes[urlsplit(parts[-1].url).path] = status(500)
    bodies = publish(server, h5ad)
    argv = ["dlpfc", "--slices", "151673", "--out", str(tmp_path), "--mirror", server.url, *QUICK]
    assert download.main(argv) == 0
    assert (tmp_path / "151673.h5ad").read_bytes() == bodies["151673.h5ad"]
    assert not (tmp_path / "151673").exists()  # a loader would take the folder before the h5ad
    assert "second home" in capsys.readouterr().err
    requests = len(server.log)
    assert download.main(argv) == 0 and len(server.log) == requests


def test_downloaded_slice_loads(server, tmp_path, real_data):
    """Real files behind the public addresses -> the loader finds counts, positions, image and the
    labels of the one shared label map."""
    source = real_data / "dlpfc" / "151674"
    direct = data.load_visium(source)
    lowres = Image.open(source / "spatial" / "tissue_lowres_image.png")
    scales = json.loads((source / "spatial" / "scalefactors_json.json").read_text())
    ratio, hires = scales["tissue_hires_scalef"] / scales["tissue_lowres_scalef"], io.BytesIO()
    lowres.resize([round(side * ratio) for side in lowres.size]).save(
        hires, "PNG", compress_level=1
    )
    names = [name.replace("Layer", "L") for name in direct.classes]
    layer_map = "".join(
        f"{barcode}\t151674\t{names[label]}\n"
        for barcode, label in zip(direct.barcodes, direct.labels)
        if label >= 0
    )
    parts = download.dlpfc_homes("151674")[0]
    for item in parts:
        local = source / item.name.removeprefix("151674/")
        body = (
            hires.getvalue()
            if "hires" in item.name
            else layer_map.encode()
            if "layer_map" in item.name
            else local.read_bytes()
        )
        server.routes[urlsplit(item.url).path] = whole(body)
    assert (
        download.main(
            ["dlpfc", "--slices", "151674", "--out", str(tmp_path), "--mirror", server.url, *QUICK]
        )
        == 0
    )
    slide = data.load_slide(tmp_path, "151674")
    assert (
        (slide.counts != direct.counts).nnz == 0
        and (slide.barcodes == direct.barcodes).all()
        and np.array_equal(slide.xy, direct.xy)
    )
    assert (
        (slide.labels >= 0).sum() == 3635
        and np.array_equal(slide.labels, direct.labels)
        and len(slide.classes) == 7
    )
    assert slide.image_scale == scales["tissue_hires_scalef"] and slide.patient == "Br8100"
    data.check_donors([slide])


def test_cli_dlpfc_both_homes_down(server, tmp_path, capsys):
    assert (
        download.main(
            ["dlpfc", "--slices", "151673", "--out", str(tmp_path), "--mirror", server.url, *QUICK]
        )
        == 2
    )
    assert "404" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "151673.h5ad").exists() and not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    "argv,word",
    [
        (["dlpfc", "--slices", "151673,999"], "999"),
        (["dlpfc", "--slices", ""], "slices"),
        (["ca1", "--mirror", "ftp://x"], "--mirror"),
        (["ca1", "--mirror", "mirror.example.org"], "--mirror"),
    ],
)
def test_cli_bad_arguments(tmp_path, capsys, argv, word):
    assert download.main([*argv, "--out", str(tmp_path / "new")]) == 2
    err = capsys.readouterr().err
    assert word in err and err.count("\n") == 1


def test_ctrl_c_keeps_the_part(server, tmp_path, monkeypatch, capsys):
    publish(server, download.PLAIN["ca1"], route=ranged)
    argv = ["ca1", "--out", str(tmp_path), "--mirror", server.url, *QUICK]
    read1, calls = http.client.HTTPResponse.read1, []

    def interrupted(response, amount=-1):
        calls.append(amount)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return read1(response, min(amount, 4096))

    monkeypatch.setattr(http.client.HTTPResponse, "read1", interrupted)
    assert download.main(argv) == 130
    kept = (tmp_path / "spots.csv.part").stat().st_size
    assert (
        0 < kept <= 4096
        and not (tmp_path / "spots.csv").exists()
        and "again" in capsys.readouterr().err
    )
    assert download.main(argv) == 0 and headers_of(server, 1)["Range"] == f"bytes={kept}-"
    assert (tmp_path / "spots.csv").read_bytes() == TEXT + b"spots.csv"


def test_sigkill_in_the_middle_then_resume(server, tmp_path):
    bodies = publish(server, download.PLAIN["ca1"], route=ranged)
    path = urlsplit(download.PLAIN["ca1"][0].url).path
    body = bodies["spots.csv"]
    server.routes[path] = [stalled(body, 150_000, ETag='"v1"'), ranged(body)]
    argv = ["ca1", "--out", str(tmp_path), "--mirror", server.url, *QUICK, "--timeout", "30"]
    process = subprocess.Popen(
        [sys.executable, "-m", "plainst", "download", *argv],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    part, deadline = tmp_path / "spots.csv.part", time.monotonic() + 60
    while (
        not (part.exists() and part.stat().st_size > 0)
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = part.stat().st_size
    assert 0 < kept <= 150_000 and not (tmp_path / "spots.csv").exists()
    assert download.main(argv) == 0  # the lock of the killed process is gone too
    assert (
        server.log[1] == (path, server.log[1][1])
        and headers_of(server, 1)["Range"] == f"bytes={kept}-"
    )
    assert {name: (tmp_path / name).read_bytes() for name in bodies} == bodies


def test_two_commands_at_once_fetch_once(server, tmp_path):
    """make -j: the second command waits for the first one's lock and finds the files there."""
    pytest.importorskip("fcntl")
    bodies = publish(server, download.PLAIN["ca1"])
    path = urlsplit(download.PLAIN["ca1"][0].url).path

    def slow(handler):
        server.sent.set()
        server.release.wait(0.3)
        handler.reply(bodies["spots.csv"])

    server.routes[path] = slow
    argv = ["ca1", "--out", str(tmp_path), "--mirror", server.url, *QUICK]
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(download.main(argv))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [0, 0, 0] and len(server.log) == 2
    assert {name: (tmp_path / name).read_bytes() for name in bodies} == bodies


# --- Hugging Face, without network


def fake_hub(monkeypatch, files=(), error=None):
    calls = []

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        if error is not None:
            raise error
        for name in files:
            path = Path(options["local_dir"]) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download
    errors = types.ModuleType("huggingface_hub.errors")
    errors.HfHubHTTPError = type("HfHubHTTPError", (TransportError, OSError), {})
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return calls


class TransportError(Exception):
    """Stands for httpx.HTTPError, which is no OSError."""


@pytest.mark.parametrize(
    "argv",
    [
        ["hest", "--task", "/etc"],
        ["hest", "--task", "IDC,"],
        ["hest1k", "--ids", "../../x"],
        ["hest1k", "--ids", "*"],
    ],
)
def test_hub_names_stay_in_the_folder(tmp_path, capsys, argv):
    assert (
        download.main([*argv, "--out", str(tmp_path)]) == 2
        and "is no name" in capsys.readouterr().err
    )


def test_hest_without_huggingface_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # makes the import fail
    assert download.main(["hest", "--task", "IDC", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "pip install huggingface_hub" in err and err.count("\n") == 1


def test_hest_and_hest1k_patterns(tmp_path, monkeypatch):
    calls = fake_hub(
        monkeypatch,
        ["IDC/adata/a.h5ad", "READ/adata/b.h5ad", "HEST_v1_3_0.csv", "st/T1.h5ad", "patches/T1.h5"],
    )
    assert download.main(["hest", "--task", "IDC,READ", "--out", str(tmp_path)]) == 0
    assert (
        download.main(
            ["hest1k", "--ids", "T1", "--out", str(tmp_path), "--mirror", "https://hub.example.org"]
        )
        == 0
    )
    assert (
        calls[0][0] == "MahmoodLab/hest-bench"
        and calls[0][1]["allow_patterns"] == ["IDC/*", "READ/*"]
        and calls[0][1]["repo_type"] == "dataset"
    )
    assert calls[1][0] == "MahmoodLab/hest" and calls[1][1]["allow_patterns"] == [
        "HEST_v1_3_0.csv",
        "st/T1.h5ad",
        "patches/T1.h5",
    ]
    assert calls[1][1]["endpoint"] == "https://hub.example.org" and calls[0][1]["endpoint"] is None


@pytest.mark.parametrize(
    "error", [TransportError("no route"), OSError("gated"), ValueError("bad\nname"), OSError()]
)
def test_hest_failures_are_one_sentence(tmp_path, monkeypatch, capsys, error):
    fake_hub(monkeypatch, error=error)
    assert download.main(["hest", "--task", "IDC", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert (
        (str(error) or "OSError").splitlines()[0] in err and "terms" in err and err.count("\n") == 1
    )


def test_hest_unknown_task_or_sample(tmp_path, monkeypatch, capsys):
    fake_hub(monkeypatch, ["HEST_v1_3_0.csv"])  # snapshot_download is silent when no file matches
    assert download.main(["hest1k", "--ids", "NOPE", "--out", str(tmp_path)]) == 2
    assert "st/NOPE.h5ad" in capsys.readouterr().err


def test_the_real_hub_library_has_what_is_used():
    hub = pytest.importorskip("huggingface_hub")
    import inspect

    assert {"repo_type", "local_dir", "allow_patterns", "endpoint"} <= set(
        inspect.signature(hub.snapshot_download).parameters
    )
    errors = pytest.importorskip("huggingface_hub.errors")
    assert all(issubclass(base, Exception) for base in errors.HfHubHTTPError.__bases__)


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        download.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(
        word in out for word in (*sources.TERMS, "manifest.json", "licence: MIT", "GSE111672")
    )
