"""Public data sets -> datasets/, checked and resumable.

    python -m plainst download dlpfc [--slices 151673,151674]
    python -m plainst download ca1 | hallmark | starmap | osmfish | connectomedb
    python -m plainst download hest --task IDC
    python -m plainst download hest1k --ids TENX95,TENX99

A file is streamed to `<name>.part`, checked (bytes received, size, SHA-256, kind of content) and
only then renamed: a final name is whole. An interrupted download goes on where it stopped (HTTP
Range + If-Range); without a validator from the server it starts again, as a mix of two versions
would go unseen. `<out>/manifest.json` records {relative path: {url, size, sha256, date}}. Few of
these files have a published SHA-256, so `sources` mostly holds None: the sum of the FIRST download
is recorded and later ones must equal it (trust on first use). That finds damage and silent
replacement afterwards, not a wrong first copy. `--mirror URL` replaces scheme and host of every
address and keeps the path (URL/files/39055568).
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from plainst.readers.checked import DataError, file_checksum
from plainst.sources import DONORS, ELSEWHERE, FIGSHARE, PLAIN, TERMS, dlpfc_homes

HDF5, CHUNK = b"\x89HDF\r\n\x1a\n", 1 << 18
HDF5_FILES = (".h5", ".h5ad", ".loom")
MAGIC = {**dict.fromkeys(HDF5_FILES, HDF5), ".png": b"\x89PNG\r\n\x1a\n", ".npz": b"PK\x03\x04"}


class DownloadError(DataError):
    """The other side failed (no answer, status, size, hash, content): another home may still have
    the file. A full disk is a plain DataError."""


class _Retry(Exception):
    """A failure that may pass; args: what happened, and the pause in seconds that it calls for or
    None."""


def fetch(url, path, size=None, sha256=None, *, retries=5, timeout=30.0, backoff=1.0):
    """Download `url` to `path`, or raise and leave `path` as it was; -> its manifest record {url,
    size, sha256, date}.

    size: expected bytes; sha256: expected hex digest; timeout: seconds without a byte before a
    connection is given up. The pause before retry n = 0, 1, ... is backoff * 2**n seconds (at most
    60) times a random factor in [0.5, 1.5], or the seconds of Retry-After (at most 120). Tried
    again: status 408, 425, 429, 5xx, time-outs, broken connections, short reads; other refusals are
    not. `<path>.part` stays for the next call after these and after a kill, and goes when its
    content is wrong. Raises DownloadError (the server's side) or DataError (the disk's side).
    """
    path, part = Path(path), Path(f"{path}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(retries + 1):
            try:
                _stream(url, part, size, timeout)
                break
            except _Retry as problem:
                what, wait = problem.args
                if attempt == retries:
                    raise DownloadError(
                        f"{url}: {what} ({retries + 1} attempts); run the same command again "
                        "to go on, or try --mirror URL"
                    ) from None
                time.sleep(
                    min(backoff * 2**attempt, 60) * random.uniform(0.5, 1.5)
                    if wait is None
                    else wait
                )
        # read back: what counts is on the disk
        got, digest, problem = (
            part.stat().st_size,
            file_checksum(part),
            content_problem(part, path.suffix),
        )
        if size not in (None, got):
            problem = f"{got} bytes arrived, expected {size}"
        elif problem is None and sha256 is not None and digest != sha256.lower():
            problem = (
                f"its SHA-256 is {digest}, expected {sha256} (if it was replaced on purpose, take "
                "its entry out of manifest.json)"
            )
        if not problem:
            os.replace(part, path)
        _discard(part)
    except OSError as error:
        # network errors have become _Retry or DownloadError: what arrives here is the disk
        raise DataError(
            f"{path}: {error.strerror or error}; free some space, check the permissions or "
            "choose another --out"
        ) from error
    if problem:
        raise DownloadError(
            f"{url}: {problem}; the bytes were thrown away, run again or try --mirror URL"
        )
    return {
        "url": url,
        "size": got,
        "sha256": digest,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _discard(part):
    for leftover in (part, Path(f"{part}.json")):
        leftover.unlink(missing_ok=True)


def _open(url, headers, part, timeout):
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        answer, pause = (
            f"the server answered {error.code} {error.reason}",
            error.headers.get("Retry-After", ""),
        )
        if error.code == 416:  # our part is longer than the file is now
            _discard(part)
        if error.code in (408, 416, 425, 429) or error.code >= 500:
            raise _Retry(answer, min(int(pause), 120) if pause.isdigit() else None) from None
        raise DownloadError(
            f"{url}: {answer}; try --mirror URL or put the file in place by hand"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise _Retry(
            f"no answer ({getattr(error, 'reason', None) or error or type(error).__name__})", None
        ) from None


def _stream(url, part, size, timeout):
    """One attempt: bring `part` to its full length or raise _Retry."""
    try:
        have, note = part.stat().st_size, json.loads(Path(f"{part}.json").read_text("utf-8"))
        whole = (
            isinstance(note["total"], int)
            and isinstance(note["validator"], str)
            and note["validator"].isascii()
            and note["validator"].isprintable()
        )
        have = (
            have
            if whole and note["url"] == url and note["validator"] and have <= note["total"]
            else 0
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        have = 0
    if have and have == note["total"]:  # killed between the last byte and the rename
        return
    headers = {"User-Agent": "plainst-download", "Accept-Encoding": "identity"}
    if have:
        headers.update({"Range": f"bytes={have}-", "If-Range": note["validator"]})
    with _open(url, headers, part, timeout) as response:
        etag, length, place = (
            response.headers.get(name, "") for name in ("ETag", "Content-Length", "Content-Range")
        )
        if have and response.status == 206:  # must continue exactly our part of exactly our file
            total = note["total"]
            if place != f"bytes {have}-{total - 1}/{total}" or (
                etag and note["validator"].startswith('"') and etag != note["validator"]
            ):
                _discard(part)
                raise _Retry(
                    f"the server resumed at the wrong place or in another file ({place})", 0
                )
        elif response.status == 200:  # no Range support, or the file has changed: all of it comes
            have, total = 0, int(length) if length.isdigit() else None
            if total is None and size is None and not response.chunked:
                raise DownloadError(
                    f"{url}: the server does not say how long the file is, so a cut could not "
                    "be seen; try --mirror URL"
                )
        else:
            raise DownloadError(
                f"{url}: the server answered {response.status} instead of the file; try "
                "--mirror URL"
            )
        if size is not None and total not in (None, size):
            _discard(part)
            raise DownloadError(
                f"{url}: the server offers {total} bytes, expected {size}; try --mirror URL"
            )
        # part away before its note, note before the first byte: a kill never leaves old bytes
        # beside a new validator
        if not have:
            _discard(part)  # If-Range takes a strong ETag or a date (RFC 9110, 13.1.5)
            validator = etag if etag.startswith('"') else response.headers.get("Last-Modified")
            _write_json(f"{part}.json", {"url": url, "validator": validator, "total": total})
        _receive(response, part, have, total)


def _receive(response, part, have, total):
    with (
        open(part, "ab") as out,
        tqdm(
            total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None
        ) as bar,
    ):
        while total is None or have < total:
            try:
                # never beyond Content-Length
                block = response.read1(CHUNK if total is None else min(CHUNK, total - have))
            except (OSError, http.client.HTTPException) as error:
                raise _Retry(
                    f"the connection broke after {have} of {total or 'unknown'} bytes "
                    f"({error or type(error).__name__})",
                    None,
                ) from None
            if not block:
                break
            have += out.write(block)
            bar.update(len(block))
        out.flush()
        # or a power cut after the rename could leave a hole under the final name
        os.fsync(out.fileno())
    if total is not None and have < total:
        raise _Retry(f"the connection closed after {have} of {total} bytes", None)


def content_problem(path, suffix):
    """Why the file cannot be what its suffix says (an error page served with status 200, a cut
    HDF5, PNG or zip), or None."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(64)
        file.seek(max(size - 4096, 0))
        tail = file.read()
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    page = (
        not text
        or text.startswith((b"<", b"version https://git-lfs"))
        or b"\0" in head
        or (suffix == ".json" and text[:1] not in b"{[")
    )
    if not head.startswith(MAGIC[suffix]) if suffix in MAGIC else page:
        return f"this is no {suffix} file: it begins with {head[:20]!r}"
    # superblock: version at byte 8, end-of-file address at 40, 44 or 28 (HDF5 File Format
    # Specification, II.A)
    if suffix in HDF5_FILES:
        start = {0: 40, 1: 44}.get(head[8], 28) if size >= 48 else 0
        cut = not start or size < int.from_bytes(head[start : start + 8], "little")
    else:
        cut = (suffix == ".png" and b"IEND\xaeB`\x82" not in tail) or (
            suffix == ".npz" and not zipfile.is_zipfile(path)
        )
    return f"the {suffix} file is cut short" if cut else None


def _write_json(path, content):
    Path(f"{path}.tmp").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    os.replace(f"{path}.tmp", path)


class Folder:
    """A data set's folder and manifest. options: keyword arguments of `fetch`; verify: compare
    SHA-256 of files already here, not only sizes."""

    def __init__(self, root, mirror=None, verify=False, **options):
        self.root, self.mirror, self.verify, self.options = Path(root), mirror, verify, options

    def manifest(self):
        path = self.root / "manifest.json"
        try:
            told = {
                name: {key: record[key] for key in ("url", "size", "sha256", "date")}
                for name, record in json.loads(path.read_text("utf-8")).items()
            }
            if not all(
                isinstance(r["size"], int)
                and isinstance(r["sha256"], str)
                and len(r["sha256"]) == 64
                for r in told.values()
            ):
                raise ValueError
            return told
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DataError(
                f"{path}: not a readable manifest; delete it to download its files afresh"
            ) from None

    def current(self, item):
        """Is the file here, as recorded and as pinned?"""
        record, path = self.manifest().get(item.name), self.root / item.name
        if (
            not record
            or not path.is_file()
            or path.stat().st_size != record["size"]
            or item.size not in (None, record["size"])
        ):
            return False
        return item.sha256 in (None, record["sha256"]) and (
            not self.verify or file_checksum(path) == record["sha256"]
        )

    def get(self, item):
        """Make the item current. A recorded file that is no longer what was recorded is first moved
        aside to `<name>.stale`."""
        if self.current(item):
            return
        recorded, path = self.manifest().get(item.name, {}), self.root / item.name
        if recorded and path.is_file():
            os.replace(path, f"{path}.stale")
            print(
                f"{path}: not what manifest.json records, kept as {path.name}.stale; "
                "downloading again",
                file=sys.stderr,
            )
        url = item.url
        if self.mirror is not None:
            parts = urlsplit(url)
            query = f"?{parts.query}" if parts.query else ""
            url = self.mirror.rstrip("/") + parts.path + query
        record = fetch(url, path, item.size, item.sha256 or recorded.get("sha256"), **self.options)
        _write_json(self.root / "manifest.json", {**self.manifest(), item.name: record})


def write_donors(root):
    """slice_donors.csv: the donor of every DLPFC slice, which its files do not tell and
    --split donor asks for."""
    rows = [f"{name},{donor}" for donor, names in DONORS.items() for name in names]
    path = Path(root, "slice_donors.csv")
    Path(f"{path}.tmp").write_text("\n".join(["slice,donor", *rows, ""]))
    os.replace(f"{path}.tmp", path)


def get_dlpfc(folder, slices):
    """Every slice from its first home, else from its second, and the donors; what came of the first
    home is then removed, as loaders take a folder before an h5ad."""
    if not set(slices) <= set(FIGSHARE):
        raise DataError(
            f"--slices {','.join(slices)!r}: the DLPFC slices are {', '.join(FIGSHARE)}"
        )
    for sample in slices:
        parts, h5ad = dlpfc_homes(sample)
        if all(map(folder.current, h5ad)):
            continue
        try:
            for item in parts:
                folder.get(item)
        except DownloadError as error:
            print(f"{sample}: {error}\n{sample}: trying the second home (h5ad)", file=sys.stderr)
            folder.get(h5ad[0])
            for item in parts[1:]:
                _discard(folder.root / f"{item.name}.part")
                if item.name in folder.manifest():
                    (folder.root / item.name).unlink(missing_ok=True)
            for name in (f"{sample}/spatial", sample):
                with contextlib.suppress(OSError):  # not empty: someone else's files stay
                    os.rmdir(folder.root / name)
    write_donors(folder.root)


def get_hub(out, repository, patterns, mirror=None):
    """Files of a gated Hugging Face data set (resumed and checked by huggingface_hub itself); each
    glob in `patterns` must match something."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise DataError(
            f"{repository} needs huggingface_hub: pip install huggingface_hub"
        ) from None
    page = f"https://huggingface.co/datasets/{repository}"
    try:
        snapshot_download(
            repository,
            repo_type="dataset",
            local_dir=str(out),
            allow_patterns=patterns,
            endpoint=mirror,
        )
    except (OSError, ValueError, *HfHubHTTPError.__bases__) as error:
        # the bases cover its HTTP library's own transport errors
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise DownloadError(
            f"{repository}: {reason} (accept its terms at {page}, then `hf auth login`)"
        ) from error
    if missing := [pattern for pattern in patterns if not any(Path(out).glob(pattern))]:
        raise DownloadError(
            f"{repository}: holds no {', '.join(missing)}; check the names at {page}"
        )


def build_parser():
    contents = "\n".join(
        f"  {name:13} {what}; licence: {terms}" for name, (what, terms) in TERMS.items()
    )
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"{contents}\n\n{ELSEWHERE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub = parser.add_subparsers(dest="dataset", required=True)
    flags = {
        "dlpfc": ("--slices", "151673,151674"),
        "hest": ("--task", "IDC,READ"),
        "hest1k": ("--ids", "TENX95,TENX99"),
    }
    for name, (what, terms) in TERMS.items():
        flag, text = flags.get(name, ("", ""))
        command = sub.add_parser(
            name,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            description=f"{what}. Licence: {terms}.",
        )
        if flag:
            command.add_argument(
                flag,
                type=lambda names: names.split(","),
                required=name != "dlpfc",
                default=list(FIGSHARE),
                help=f"e.g. {text}",
            )
        command.add_argument(
            "--out", type=Path, default=Path("datasets", name), help="folder to fill"
        )
        command.add_argument(
            "--mirror",
            metavar="URL",
            help="take files from this scheme://host[/prefix] instead, path kept",
        )
        command.add_argument(
            "--verify",
            action="store_true",
            help="compare SHA-256 of the files already here with the manifest, not only sizes",
        )
        command.add_argument(
            "--retries", type=int, default=5, help="further attempts after a failure that may pass"
        )
        command.add_argument(
            "--timeout",
            type=float,
            default=30.0,
            help="seconds without a byte before a connection is given up",
        )
        command.add_argument(
            "--backoff",
            type=float,
            default=1.0,
            help="seconds before the first retry, doubled each time",
        )
    return parser


def get(args):
    """What the parsed command line asks for."""
    if args.mirror and not (
        urlsplit(args.mirror).scheme in ("http", "https") and urlsplit(args.mirror).netloc
    ):
        raise DataError(
            f"--mirror {args.mirror}: give a full address such as https://mirror.example.org"
        )
    for name in getattr(args, "task", None) or getattr(args, "ids", None) or []:
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise DataError(
                f"{name!r} is no name of a task or sample: give names like IDC or TENX95"
            )
    if args.dataset == "hest":
        return get_hub(
            args.out, "MahmoodLab/hest-bench", [f"{task}/*" for task in args.task], args.mirror
        )
    if args.dataset == "hest1k":
        files = [
            name for sample in args.ids for name in (f"st/{sample}.h5ad", f"patches/{sample}.h5")
        ]
        return get_hub(args.out, "MahmoodLab/hest", ["HEST_v1_3_0.csv", *files], args.mirror)
    folder = Folder(
        args.out,
        args.mirror,
        args.verify,
        retries=max(args.retries, 0),
        timeout=max(args.timeout, 0.01),
        backoff=max(args.backoff, 0),
    )
    args.out.mkdir(parents=True, exist_ok=True)
    # two commands may share --out (make -j): the second waits; a killed one lets go
    with open(args.out / ".lock", "w") as lock:
        # Windows, or a network file system without locks
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        if args.dataset == "dlpfc":
            return get_dlpfc(folder, args.slices)
        for item in PLAIN[args.dataset]:
            folder.get(item)
    return None


def main(argv=None):
    """-> exit status: 0 done, 2 one sentence on stderr, 130 Ctrl-C (the part stays for the next
    run)."""
    args = build_parser().parse_args(argv)
    try:
        get(args)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except (DataError, OSError) as error:
        hint = (
            ""
            if isinstance(error, DataError)
            else "; free some space, check the permissions or choose another --out"
        )
        print(f"error: {error}{hint}", file=sys.stderr)
        return 2
    print(f"{args.dataset}: ready in {args.out} (licence: {TERMS[args.dataset][1]})")
    return 0
