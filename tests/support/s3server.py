"""A real S3 server for the tests: moto's threaded server in a process of its own, on 127.0.0.1 and
a free port.

``S3Server`` is a handle: small, picklable, usable from any process. The process behind it is
started by ``running_server`` and ends with it, and also when the test process is killed: it watches
its standard input, which the kernel closes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import selectors
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

__all__ = ["S3Server", "running_server"]

_START_S = 60.0
#: Where the server that is started here takes the paths of local files, to store them all at once:
#: a PUT takes 2.5 ms of CPU.
_TREES = "/-/trees/"
_PLAIN_KEY = re.compile(r"[\w./-]+", re.ASCII).fullmatch


@dataclass(frozen=True)
class S3Server:
    """Where an S3 server listens and how to talk to it.

    Attributes
    ----------
    endpoint_url : str
        ``http://127.0.0.1:PORT``.
    key, secret : str
        Credentials that the server takes.
    log : Path or None
        One line a request, as the server saw it; None for a server that was not started here and
        keeps none that can be read.
    checks_credentials : bool
        moto takes whatever it is given.
    """

    endpoint_url: str
    key: str = "testing"
    secret: str = "testing"
    log: Path | None = field(default=None, compare=False)
    checks_credentials: bool = False

    @property
    def _takes_trees(self) -> bool:
        return self.log is not None and not self.checks_credentials

    @property
    def host(self) -> str:
        return str(urlsplit(self.endpoint_url).hostname)

    @property
    def port(self) -> int:
        return int(urlsplit(self.endpoint_url).port or 80)

    @property
    def s3_kwargs(self) -> dict[str, Any]:
        """A fresh dict as ``s3fs.S3FileSystem`` and ``ZarrS3Reader(s3_kwargs=...)`` take it."""
        return {"key": self.key, "secret": self.secret, "endpoint_url": self.endpoint_url}

    def kwargs_at(self, endpoint_url: str) -> dict[str, Any]:
        """The same credentials with another address, for a proxy in front of this server."""
        return {**self.s3_kwargs, "endpoint_url": endpoint_url}

    def client(self) -> Any:
        """A boto3 client, for set-up and inspection: it does not use fsspec's and obstore's
        threads.
        """
        return _client(self, os.getpid())

    def fs(self) -> Any:
        """A separate s3fs filesystem: shares no instance and no listing with the code under
        test.
        """
        import s3fs

        return s3fs.S3FileSystem(
            **self.s3_kwargs, skip_instance_cache=True, use_listings_cache=False
        )

    def new_bucket(self, prefix: str = "densities") -> str:
        """Make a bucket for one test; its name."""
        name = f"{prefix}-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name

    def put(self, url: str, body: bytes, **extra: Any) -> str:
        """Write one object; its ETag without quotes. ``extra`` goes to boto3's ``put_object``."""
        bucket, key = _split(url)
        return str(
            self.client().put_object(Bucket=bucket, Key=key, Body=body, **extra)["ETag"]
        ).strip('"')

    def put_tree(self, path: Path, url: str) -> list[str]:
        """Upload a file to ``url``, or a directory below it; the keys in the bucket, sorted."""
        bucket, root = _split(url)
        if path.is_file():
            files = {root: path}
        else:
            found = {file.relative_to(path).as_posix(): file for file in path.rglob("*")}
            prefix = f"{root}/" if root else ""
            files = {f"{prefix}{name}": file for name, file in found.items() if file.is_file()}
        if self._takes_trees and all(map(_PLAIN_KEY, files)):
            document = json.dumps({key: str(file) for key, file in files.items()})
            url = f"{self.endpoint_url}{_TREES}{bucket}"
            with build_opener(ProxyHandler({})).open(url, document.encode()) as answer:
                assert answer.status == 200
        else:
            for key, file in files.items():
                self.client().put_object(Bucket=bucket, Key=key, Body=file.read_bytes())
        return sorted(files)

    def delete(self, url: str) -> None:
        """Remove one object."""
        bucket, key = _split(url)
        self.client().delete_object(Bucket=bucket, Key=key)

    def keys(self, url: str) -> list[str]:
        """Every key below ``url``, with the bucket's own spelling, sorted."""
        bucket, prefix = _split(url)
        pages = (
            self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        )
        return sorted(item["Key"] for page in pages for item in page.get("Contents", ()))


@functools.cache
def _client(server: S3Server, _: int) -> Any:
    """One per process: a forked child cannot use its parent's connections."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=server.endpoint_url,
        aws_access_key_id=server.key,
        aws_secret_access_key=server.secret,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 2}),
    )


def _split(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key.rstrip("/")


@contextlib.contextmanager
def running_server(log: Path, environment: Mapping[str, str] | None = None) -> Iterator[S3Server]:
    """Start a server, yield its handle, stop it. Its address is free again at once, so a test may
    stop it to go offline.
    """
    # A new session: Ctrl-C in the terminal reaches the tests first, and they stop the server when
    # they are done with it.
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=None if environment is None else dict(environment),
            start_new_session=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        endpoint_url = _first_line(process)
        yield S3Server(endpoint_url, log=log)
    finally:
        process.stdin.close()
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _first_line(process: subprocess.Popen[bytes]) -> str:
    """The address that the server prints when it listens."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        line = process.stdout.readline().decode().strip() if selector.select(_START_S) else ""
    if not line.startswith("http://"):
        raise RuntimeError(
            f"the S3 server did not start within {_START_S:.0f} s; install it with: pip install -e "
            "'.[demo]'"
        )
    return line


def _serve() -> None:
    """Run in the server's process: listen, print the address, end when standard input ends."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.moto_server.werkzeug_app import create_backend_app
    from moto.s3.models import s3_backends
    from werkzeug.serving import WSGIRequestHandler, make_server

    # Only S3: moto's dispatcher searches 180
    # service directories at every request.
    WSGIRequestHandler.protocol_version = "HTTP/1.1"  # keeps connections open, as S3 does
    WSGIRequestHandler.disable_nagle_algorithm = (
        True  # head and body are two packets: the second would wait for the first one's ACK
    )
    s3 = create_backend_app("s3")

    def app(environ: Any, start_response: Any) -> Any:
        if not environ["PATH_INFO"].startswith(_TREES):
            return s3(environ, start_response)
        bucket = environ["PATH_INFO"].removeprefix(_TREES)
        files = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
        for key, file in files.items():
            s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(bucket, key, Path(file).read_bytes())
        start_response("200 OK", [("Content-Length", "0")])
        return []

    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=WSGIRequestHandler)

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _serve()
