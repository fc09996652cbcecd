"""Resumable downloads, verified by checksum."""

import http.client
import urllib.error
import urllib.request
from pathlib import Path

from scoresde.data import _cache, _checksum
from scoresde.errors import InputError
from scoresde.progress import Progress

_ATTEMPTS = 3
_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 2**18
_MOST = 2**30  # bytes, far above the size of any requested file
_FAILURES = (OSError, http.client.HTTPException)  # includes the errors of urllib


def fetch(url: str, path: Path, checksum: str) -> None:
    """Downloads a file into a folder of the cache, unless it exists.

    Received data is kept in ``NAME.part``, and another call resumes from it. The file is renamed
    when its checksum is correct.

    Arguments:
        url: Address of the file.
        path: Target path; its folder must exist.
        checksum: md5, sha1 or sha256 of the file.

    Raises:
        InputError: If the file cannot be downloaded, or its checksum differs.
    """
    part = path.with_name(path.name + ".part")
    try:
        with _cache.alone(path):
            if path.is_file():
                return
            _receive_all(url, part)
            found = _checksum.of(part.read_bytes(), _checksum.kind(checksum))
            if found == checksum:
                part.replace(path)
                return
            part.unlink()
    except _FAILURES as error:
        raise InputError(
            f"Cannot download {path.name} to {path.parent} from {url} ({_reason(error)}); set "
            "data.root to the folder of your own copy."
        ) from error
    raise InputError(
        f"The file from {url} must have the {_checksum.kind(checksum)} checksum {checksum}, got "
        f"{found}, and was deleted; try again, or set data.root to the folder of your own copy."
    )


def _receive_all(url: str, part: Path) -> None:
    """Receives a file, with a limited number of further requests after failures."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return _receive(url, part)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            part.unlink()  # the partial file was longer than the file
        except _FAILURES:
            if attempt == _ATTEMPTS:
                raise
    return None


def _receive(url: str, part: Path) -> None:
    """Receives a file, or its remaining part."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            start = 0  # the server sends the whole file again
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        label = f"downloading {part.stem}"
        bar = Progress(total, label, "B", start=start, leave=True, scale=True)
        with part.open("r+b" if start else "wb") as file, bar:
            file.seek(start)
            file.truncate()
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
                if file.tell() > _MOST:
                    raise ConnectionError(f"the file has more than {_MOST:,} bytes")
            if total is not None and file.tell() < total:
                raise ConnectionError(
                    f"the connection closed after {file.tell():,} of {total:,} bytes"
                )


def _reason(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    code = f"{error.code} " if isinstance(error, urllib.error.HTTPError) else ""
    return f"{code}{getattr(reason, 'strerror', None) or reason}"
