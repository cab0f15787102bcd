"""A real S3-compatible server on loopback, and the environment that leads clients to it."""

import contextlib
import json
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.request import Request, urlopen

from data_shards.storage.store import Store

KEY, SECRET = "AKIDEXAMPLE0FORTESTS", "secret+not/to/be+seen0123456789abcdefgh"
BUCKET = "bucket"


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Run a server with one empty bucket that anybody may read; yields its address, host:port."""
    from moto.s3.responses import S3Response  # most test processes start no server
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    put = S3Response.put_object
    lock = threading.Lock()

    def put_alone(response: S3Response) -> Any:
        """S3 looks and writes in one step; this server would let two create the same object."""
        with lock:
            return put(response)

    with mock.patch.object(S3Response, "put_object", put_alone):
        server.start()
        try:
            host, port = server.get_host_and_port()
            _put(f"http://{host}:{port}/{BUCKET}", b"")
            _put(f"http://{host}:{port}/{BUCKET}?policy", json.dumps(_PUBLIC).encode())
            yield f"{host}:{port}"
        finally:
            server.stop()


def _put(url: str, body: bytes) -> None:
    headers = {
        # Enough of a signature for the server to know which service is meant.
        "Authorization": "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request",
        "Content-Type": "application/json",
    }
    urlopen(Request(url, body, headers, method="PUT"), timeout=30).close()


_PUBLIC = {
    "Version": "2012-10-17",
    "Statement": [
        {
            "Effect": "Allow",
            "Principal": "*",
            # HeadObject: this server asks for it, AWS for GetObject.
            "Action": ["s3:GetObject", "s3:HeadObject", "s3:ListBucket"],
            "Resource": [f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*"],
        }
    ],
}


def s3_environment(endpoint: str, **changes: str) -> dict[str, str]:
    """Return the variables that lead every S3 client of a process to `endpoint` (a URL)."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        **changes,
    }


@contextlib.contextmanager
def s3_clients(endpoint: str, **changes: str) -> Iterator[None]:
    """Lead the S3 clients of this process to `endpoint`."""
    with mock.patch.dict(os.environ, s3_environment(endpoint, **changes)):
        yield


def upload(folder: Path) -> str:
    """Copy the files of a shard set to a new place in the bucket; returns its URL."""
    store = Store(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    for path in sorted(folder.iterdir()):
        store.write(path.name, path.read_bytes())
    return store.url
