"""Files on object stores such as S3, by URL; the only module that uses fsspec.

The S3 client inside pyarrow reads and writes `s3://`. It finds credentials, region and profile as AWS's own tools do
(AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_REGION...); AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL names another server that
speaks S3. For any other scheme, fsspec's driver is used.
"""

import mmap
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec  # type: ignore[import-untyped]
from fsspec.implementations.arrow import ArrowFSWrapper  # type: ignore[import-untyped]
from pyarrow.fs import AwsStandardS3RetryStrategy, FileSelector, S3FileSystem

from pipeline.errors import STOP_SIGNALS, AudioError, InputError, UnavailableError
from pipeline.files import replacing_file

T = TypeVar("T")

# With these limits a wrong URL is reported within seconds; AWS's own retries take minutes.
CONNECT_TIMEOUT_SECONDS = 5
REQUEST_TIMEOUT_SECONDS = 60
REQUEST_ATTEMPTS = 4  # the waits between them grow

# After a failed request to a server that has answered before, wait so long and try again; each is the client's own
# attempts once more.
RETRY_WAIT_SECONDS = (1.0, 4.0, 15.0)

# In the error of a request that will fail again, whenever it is sent.
LASTING_ERROR_WORDS = (
    *(
        "ACCESS_DENIED",
        "AccessDenied",
        "InvalidAccessKeyId",
        "INVALID_ACCESS_KEY_ID",
        "SignatureDoesNotMatch",
    ),
    *(
        "SIGNATURE_DOES_NOT_MATCH",
        "NO_SUCH_BUCKET",
        "NoSuchBucket",
        "INVALID_CLIENT_TOKEN_ID",
        "HTTP status 403",
    ),
)

COPY_BLOCK_BYTES = 2**24

# Members of a tar that are read one after the other are fetched together, more of them each time, up to this.
MAX_READ_AHEAD_BYTES = 2**24

MAX_SKIPPED_BYTES = 2**20  # between two members that count as read one after the other

# The minimum number of bytes that one request fetches, because headers are read in small steps.
READ_AHEAD_BYTES = 2**16

# Keys of an object's entry that change with the object; each driver has some of them.
VERSION_KEYS = ("size", "mtime", "created", "LastModified", "ETag", "etag", "md5Hash")

# The maximum size of one sound, which is read into memory as a whole.
MAX_REMOTE_SOUND_BYTES = 2**30


def is_remote_url(location: object) -> bool:
    """Return whether a location is a URL rather than a path of this machine."""
    return "://" in str(location)


def filesystem_and_path(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the filesystem of a URL and the path in it; InputError if no driver supports the scheme."""
    scheme, _, path = url.partition("://")
    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return _s3_filesystem(endpoint), path
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
    """Turn errors of the network, the credentials or the server into an InputError; local errors pass unchanged.

    pyarrow's errors from S3 have no errno, unless an object does not exist.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(
            f"{url}: no such object or bucket ({_server_error_line(error)}); check the URL"
        ) from None
    except OSError as error:
        # An errno means a fault of this machine, such as a full disk; only a PermissionError may come from the server.
        if error.errno is not None and not isinstance(error, PermissionError):
            raise
        message = (
            f"{url}: {_server_error_line(error)}; check the URL, the credentials, AWS_REGION and AWS_ENDPOINT_URL, "
            "and run the same command again"
        )
        is_lasting = isinstance(error, PermissionError) or any(
            word in str(error) for word in LASTING_ERROR_WORDS
        )
        raise (InputError if is_lasting else UnavailableError)(message) from None


def _with_retries(request: Callable[[], T]) -> T:
    """Return the result of a request that may be sent again; UnavailableError if the server fails to the end."""
    for seconds in RETRY_WAIT_SECONDS:
        try:
            return request()
        except UnavailableError:
            time.sleep(seconds)
    return request()


def _server_error_line(error: OSError) -> str:
    # Neither an errno nor the id of a request helps a user.
    text = (str(error) or type(error).__name__).splitlines()[0]
    return text.removeprefix("[Errno 2] ").partition(" (Request ID")[0]


def check_reachable(url: str) -> None:
    """Raise InputError unless the bucket of a URL exists and answers; nothing is tried again."""
    filesystem, path = filesystem_and_path(url)
    # Request the bucket, not the path, which need not exist yet. Other drivers report errors at first use.
    if url.startswith("s3://"):
        try:
            with _translate_errors(url):
                filesystem.info(path.partition("/")[0])
        except UnavailableError as error:
            raise InputError(str(error)) from None


def download_object(url: str, path: Path) -> bool:
    """Copy an object to a file, whole or not at all; False if there is no such object."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def download() -> bool:
        with _open_object(url) as source:
            if source is None:
                return False
            with replacing_file(path) as scratch, scratch.open("wb") as target:
                shutil.copyfileobj(source, target, COPY_BLOCK_BYTES)
        return True

    return _with_retries(download)


def download_into_file(url: str, target: BinaryIO) -> bool:
    """Copy an object into an open file; False if there is no such object."""

    def download() -> bool:
        target.seek(0)
        with _open_object(url) as source:
            if source is None:
                return False
            shutil.copyfileobj(source, target, COPY_BLOCK_BYTES)
        return True

    return _with_retries(download)


@contextmanager
def _open_object(url: str) -> Iterator[BinaryIO | None]:
    """Yield an object opened for reading, or None if there is no such object."""
    filesystem, name = filesystem_and_path(url)
    with _translate_errors(url):
        try:
            source = filesystem.open(name, "rb")
        except FileNotFoundError:
            source = None
        with source or nullcontext():
            yield source


def upload_file(path: Path, url: str) -> None:
    """Copy a file to an object, which becomes visible only when it is complete.

    The client completes an object when its stream is closed, whatever closed it. So the file is written at once, mapped
    into memory, and a signal that would raise an exception in between is handled after the upload.
    """
    filesystem, name = filesystem_and_path(url)

    def upload() -> None:
        with path.open("rb") as source, _translate_errors(url), ExitStack() as stack:
            content: Any = b""
            if os.fstat(source.fileno()).st_size:
                content = stack.enter_context(mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ))
            with _deferring_signals(), filesystem.open(name, "wb") as target:
                target.write(content)

    _with_retries(upload)


@contextmanager
def _deferring_signals() -> Iterator[None]:
    """Let signals that stop a run wait until the block has ended; only the main thread of a process handles any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    own_handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in own_handlers:
        signal.signal(number, lambda arriving, _: arrived.append(arriving))
    try:
        yield
    finally:
        for number, handler in own_handlers.items():
            signal.signal(number, handler)
        for arrived_number in arrived:
            signal.raise_signal(arrived_number)


def remove_object(url: str) -> None:
    """Remove an object, if it exists."""
    filesystem, name = filesystem_and_path(url)

    def remove() -> None:
        with _translate_errors(url), suppress(FileNotFoundError):
            filesystem.rm_file(name)

    _with_retries(remove)


def object_sizes(url: str) -> dict[str, int]:
    """Return the size in bytes of every object directly below a URL, by name; empty if there is none."""
    return {name: entry["size"] for name, entry in _list_objects(url).items()}


def object_versions(url: str) -> dict[str, str]:
    """Return a version for every object directly below a URL, by name: a text that changes with the object."""
    return {
        name: " ".join(f"{key}={entry[key]}" for key in VERSION_KEYS if key in entry)
        for name, entry in _list_objects(url).items()
    }


def _list_objects(url: str) -> dict[str, dict[str, Any]]:
    filesystem, path = filesystem_and_path(url)

    def list_entries() -> list[dict[str, Any]]:
        with _translate_errors(url):
            try:
                return filesystem.ls(path, detail=True)
            except FileNotFoundError:
                return []

    entries = _with_retries(list_entries)
    return {entry["name"].rpartition("/")[2]: entry for entry in entries if entry["type"] == "file"}


def list_files_below(url: str) -> tuple[str, list[str]]:
    """Return the URL of a folder, and the sorted paths in it of all objects below.

    For the URL of a single object, return its folder and its name. InputError if there is no object.
    """
    check_reachable(url)
    url = url.rstrip("/")
    filesystem, path = filesystem_and_path(url)
    with _translate_errors(url):
        if filesystem.isfile(path):
            folder, _, name = url.rpartition("/")
            return folder, [name]

        # On S3 fsspec's `find` sends one request per folder, a recursive selector one per thousand objects.
        if isinstance(filesystem, ArrowFSWrapper):
            selector = FileSelector(path, recursive=True, allow_not_found=True)
            paths = [info.path for info in filesystem.fs.get_file_info(selector) if info.is_file]
        else:
            paths = filesystem.find(path)
    if not paths:
        raise InputError(f"{url}: no object below it; check the URL")
    return url, sorted(object_path.removeprefix(path + "/") for object_path in paths)


@contextmanager
def open_range_reader(url: str) -> Iterator[tuple[Callable[[int, int], bytes], int]]:
    """Yield a function of (count, offset) that reads an object as `os.pread` reads a file, and the object's size.

    Raises InputError.
    """
    filesystem, path = filesystem_and_path(url)
    # Small reads within the bytes fetched last need no other request.
    buffer = b""
    buffer_offset = 0
    with _translate_errors(url), filesystem.open(path, "rb") as file:
        size: int = file.seek(0, os.SEEK_END)

        def read_range(count: int, offset: int) -> bytes:
            nonlocal buffer, buffer_offset
            if not buffer_offset <= offset <= offset + count <= buffer_offset + len(buffer):
                file.seek(min(offset, size))
                buffer = file.read(max(count, READ_AHEAD_BYTES))
                buffer_offset = offset
            return buffer[offset - buffer_offset :][:count]

        yield read_range, size


def read_remote_sound(url: str, offset: int = 0, size: int | None = None) -> bytes:
    """Read the bytes of a sound, a whole object or a part of one; AudioError if the object is missing or too large.

    A failing server raises UnavailableError: the clip may be good and must not be recorded as unreadable.
    """
    if size is None:
        return _with_retries(lambda: _read_object_part(url, offset, None))
    with _ARCHIVE_LOCK:
        return _with_retries(lambda: _last_archive(url).read(offset, size))


def _read_object_part(url: str, offset: int, size: int | None) -> bytes:
    filesystem, path = filesystem_and_path(url)
    with _translate_errors(url):
        try:
            file = filesystem.open(path, "rb")
        except FileNotFoundError:
            raise AudioError("missing", f"{path.rpartition('/')[2]} is gone; upload it again") from None
        with file:
            # The requested part may reach past the end of the object, or begin after it.
            object_bytes = file.seek(0, os.SEEK_END)
            rest_bytes = object_bytes - offset
            count = max(0, rest_bytes if size is None else min(size, rest_bytes))
            if count > MAX_REMOTE_SOUND_BYTES:
                raise AudioError(
                    "too_long", f"{count:,} bytes; up to {MAX_REMOTE_SOUND_BYTES:,} are read from a URL"
                )
            file.seek(min(offset, object_bytes))
            content: bytes = file.read(count)
    return content


class _RemoteArchive:
    """Reads members of one archive at a URL; those that follow one another are fetched with few requests.

    A member that is read alone costs no more than its bytes. While each begins where the last one ended, or shortly
    after, twice as much is fetched as the time before.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._buffer = b""
        self._buffer_offset = 0
        self._last_end = -1
        self._fetch_bytes = 0

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, fewer at the end of the object; raises as `read_remote_sound`."""
        follows = 0 <= offset - self._last_end <= MAX_SKIPPED_BYTES and self._last_end >= 0
        self._last_end = offset + size
        if self._buffer_offset <= offset and offset + size <= self._buffer_offset + len(self._buffer):
            return self._buffer[offset - self._buffer_offset :][:size]

        # A larger part, if members follow one another.
        self._fetch_bytes = min(2 * max(self._fetch_bytes, size), MAX_READ_AHEAD_BYTES) if follows else 0
        self._buffer = _read_object_part(self._url, offset, max(size, self._fetch_bytes))
        self._buffer_offset = offset
        return self._buffer[:size]


_ARCHIVE_LOCK = threading.Lock()  # held while a member is read: the buffer is that of one archive


@lru_cache(maxsize=1)
def _last_archive(url: str) -> _RemoteArchive:
    """Return the reader of an archive, kept until another archive is read."""
    return _RemoteArchive(url)
