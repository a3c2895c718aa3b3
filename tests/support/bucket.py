"""A bucket on the loopback interface, found through the environment as a user's server would be."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from pyarrow.fs import FileSelector, S3FileSystem

from pipeline.object_store import download_object, filesystem_and_path

BUCKET = "ajepa-tests"


@contextmanager
def serving_bucket() -> Iterator[str]:
    """Serve an empty bucket from threads of this process; the server's address. ImportError without moto."""
    from moto import backends
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    services = tuple(backends.list_of_moto_modules())
    variables = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_REGION": "us-east-1",
    }
    # It would list its own folder, of 175 services, twice for each request: a third of its time.
    with (
        mock.patch.object(backends, "list_of_moto_modules", return_value=services),
        mock.patch.dict(os.environ, variables),
    ):
        S3FileSystem(endpoint_override=address, allow_bucket_creation=True).create_dir(BUCKET)
        yield address
    server.stop()


def download_all(url: str, folder: Path) -> Path:
    """Copy every object below a URL into a folder."""
    client, path = filesystem_and_path(url)
    for entry in client.fs.get_file_info(FileSelector(path, recursive=True)):
        if entry.is_file:
            download_object(f"s3://{entry.path}", folder / entry.path[len(path) + 1 :])
    return folder
