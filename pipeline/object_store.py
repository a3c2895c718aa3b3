"""Remote: files on object stores by URL, through fsspec; the only door to them.

`s3://` is read and written by the S3 client inside pyarrow; credentials, region and profile are found as AWS's own
tools find them (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_REGION...), AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL names another
server that speaks S3. Any other scheme is left to the driver that fsspec knows for it.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import fsspec  # type: ignore[import-untyped]
from fsspec.implementations.arrow import ArrowFSWrapper  # type: ignore[import-untyped]
from pyarrow.fs import AwsStandardS3RetryStrategy, FileSelector, S3FileSystem

from pipeline.errors import AudioError, InputError
from pipeline.files import replacing_file

CONNECT_TIMEOUT_SECONDS, REQUEST_TIMEOUT_SECONDS = 5, 60

REQUEST_ATTEMPTS = 4  # of one request; the waits between them grow

COPY_BLOCK_BYTES = 2**24

READ_AHEAD_BYTES = 2**16  # read at least, where headers are looked for

VERSION_KEYS = ("size", "mtime", "created", "LastModified", "ETag", "etag", "md5Hash")  # as drivers name them

MAX_REMOTE_SOUND_BYTES = 2**30  # of one sound, which is held in memory


def is_remote_url(location: object) -> bool:
    """Whether a place is a URL, not a path of this machine."""
    return "://" in str(location)


def filesystem_and_path(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Who reads and writes at a URL, and the path by which; InputError where there is no driver for the scheme."""
    scheme, _, path = url.partition("://")
    if scheme == "s3":
        return _s3_filesystem(
            os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        ), path
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"{url}: {error}") from None
    return filesystem, path


@lru_cache
def _s3_filesystem(endpoint: str | None) -> ArrowFSWrapper:
    client = S3FileSystem(
        endpoint_override=endpoint,
        connect_timeout=CONNECT_TIMEOUT_SECONDS,
        request_timeout=REQUEST_TIMEOUT_SECONDS,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=REQUEST_ATTEMPTS),
    )
    return ArrowFSWrapper(client, skip_instance_cache=True)


@contextmanager
def _translate_errors(url: str) -> Iterator[None]:
    """What the network, the credentials or the server refuse, as an InputError; local errors pass.

    pyarrow's errors of S3 have no errno, but for what is not there.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(
            f"{url}: no such object or bucket ({_server_error_line(error)}); check the URL"
        ) from None
    except OSError as error:
        if error.errno is not None and not isinstance(error, PermissionError):
            raise
        raise InputError(
            f"{url}: {_server_error_line(error)}; check the URL, the credentials, AWS_REGION and AWS_ENDPOINT_URL, "
            "and run the same command again"
        ) from None


def _server_error_line(error: OSError) -> str:
    text = (str(error) or type(error).__name__).splitlines()[0]
    return text.removeprefix("[Errno 2] ").partition(" (Request ID")[0]


def check_reachable(url: str) -> None:
    """Do nothing if the bucket of a URL is there and answers, else raise InputError."""
    filesystem_, path = filesystem_and_path(url)
    if url.startswith("s3://"):
        with _translate_errors(url):
            filesystem_.info(path.partition("/")[0])


def download_object(url: str, path: Path) -> bool:
    """Copy an object to a file, whole or not at all; False where there is no such object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _open_object(url) as source:
        if source is None:
            return False
        with replacing_file(path) as scratch, scratch.open("wb") as target:
            shutil.copyfileobj(source, target, COPY_BLOCK_BYTES)
    return True


def download_into_file(url: str, target: BinaryIO) -> bool:
    """Copy an object to an open file; False where there is no such object."""
    with _open_object(url) as source:
        if source is None:
            return False
        shutil.copyfileobj(source, target, COPY_BLOCK_BYTES)
    return True


@contextmanager
def _open_object(url: str) -> Iterator[BinaryIO | None]:
    """An object to read; None where there is no such object."""
    filesystem_, name = filesystem_and_path(url)
    with _translate_errors(url):
        try:
            source = filesystem_.open(name, "rb")
        except FileNotFoundError:
            source = None
        with source or nullcontext():
            yield source


def upload_file(path: Path, url: str) -> None:
    """Copy a file to an object; object stores show it when it is whole."""
    filesystem_, name = filesystem_and_path(url)
    with path.open("rb") as source, _translate_errors(url), filesystem_.open(name, "wb") as target:
        shutil.copyfileobj(source, target, COPY_BLOCK_BYTES)


def remove_object(url: str) -> None:
    """Remove an object, if it is there."""
    filesystem_, name = filesystem_and_path(url)
    with _translate_errors(url):
        try:
            filesystem_.rm_file(name)
        except FileNotFoundError:
            return


def object_sizes(url: str) -> dict[str, int]:
    """Name and bytes of the objects right below a URL; none where there is nothing."""
    return {name: entry["size"] for name, entry in _list_objects(url).items()}


def object_versions(url: str) -> dict[str, str]:
    """Name of the objects right below a URL, and a text that changes with each; none where there is nothing."""
    return {
        name: " ".join(f"{key}={entry[key]}" for key in VERSION_KEYS if key in entry)
        for name, entry in _list_objects(url).items()
    }


def _list_objects(url: str) -> dict[str, dict[str, Any]]:
    filesystem_, path = filesystem_and_path(url)
    with _translate_errors(url):
        try:
            entries: list[dict[str, Any]] = filesystem_.ls(path, detail=True)
        except FileNotFoundError:
            return {}
    return {e["name"].rpartition("/")[2]: e for e in entries if e["type"] == "file"}


def list_files_below(url: str) -> tuple[str, list[str]]:
    """A folder's URL and all objects below it by their paths in it, sorted; of one object its folder and its name.

    InputError where there is nothing.
    """
    check_reachable(url)
    url = url.rstrip("/")
    filesystem_, path = filesystem_and_path(url)
    with _translate_errors(url):
        if filesystem_.isfile(path):
            folder, _, name = url.rpartition("/")
            return folder, [name]
        if isinstance(
            filesystem_, ArrowFSWrapper
        ):  # fsspec's own way asks once a folder, this once a thousand objects
            chosen = FileSelector(path, recursive=True, allow_not_found=True)
            found = [info.path for info in filesystem_.fs.get_file_info(chosen) if info.is_file]
        else:
            found = filesystem_.find(path)
    if not found:
        raise InputError(f"{url}: no object below it; check the URL")
    return url, sorted(name.removeprefix(path + "/") for name in found)


@contextmanager
def open_range_reader(url: str) -> Iterator[tuple[Callable[[int, int], bytes], int]]:
    """Reads of (count, offset) of an object as `os.pread` does them of a file, and its size; InputError."""
    filesystem_, path = filesystem_and_path(url)
    held, begin = b"", 0
    with _translate_errors(url), filesystem_.open(path, "rb") as file:
        size: int = file.seek(0, os.SEEK_END)

        def read_range(count: int, offset: int) -> bytes:
            nonlocal held, begin
            if not begin <= offset <= offset + count <= begin + len(held):
                file.seek(min(offset, size))
                held, begin = file.read(max(count, READ_AHEAD_BYTES)), offset
            return held[offset - begin :][:count]

        yield read_range, size


def read_remote_sound(url: str, offset: int = 0, size: int | None = None) -> bytes:
    """The bytes of a sound, all of an object or a part of it; AudioError for what is not there or too large.

    InputError where the server fails: no clip is at fault, so none is condemned.
    """
    filesystem_, path = filesystem_and_path(url)
    with _translate_errors(url):
        try:
            file = filesystem_.open(path, "rb")
        except FileNotFoundError:
            raise AudioError("missing", f"{path.rpartition('/')[2]} is gone; upload it again") from None
        with file:
            there = file.seek(0, os.SEEK_END)
            count = max(0, there - offset if size is None else min(size, there - offset))
            if count > MAX_REMOTE_SOUND_BYTES:
                raise AudioError(
                    "too_long", f"{count:,} bytes; up to {MAX_REMOTE_SOUND_BYTES:,} are read from a URL"
                )
            file.seek(min(offset, there))
            content: bytes = file.read(count)
    return content
