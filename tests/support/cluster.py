"""Several nodes of one cluster on this machine: each with its own served cache directory, all with
one S3 server.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.readers import make_reader
from zarrcache import ZarrS3Reader
from zarrcache.peers.server import EntryServer

__all__ = ["Cluster", "Node", "payload", "start_cluster"]


@dataclass(frozen=True)
class Node:
    """One node; picklable."""

    root: Path
    url: str
    s3_kwargs: dict[str, Any] | None
    cache: dict[str, Any]

    def reader(self, **block: Any) -> ZarrS3Reader:
        """As a new run on the node makes it."""
        return make_reader(
            self.root, self.url, s3_kwargs=self.s3_kwargs, cache={**self.cache, **block}
        )

    @property
    def directory(self) -> Path:
        """Its ``cache.dir``."""
        return Path(self.cache["dir"])

    def files(self) -> list[Path]:
        """Its array entries that hold densities; listings are smaller."""
        return sorted(
            path
            for path in (self.directory / "zarrcache-v1" / "entries").rglob("*")
            if path.is_file() and payload(path)[1].ndim == 3
        )


def payload(path: Path) -> tuple[dict[str, Any], NDArray[Any]]:
    """Contents of an entry, read without the package: one page of header, then the values."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[12:16], "little")
    fields = json.loads(raw[20 : 20 + length])
    start = -(-(20 + length) // 4096) * 4096
    values = np.frombuffer(raw[start : start + fields["nbytes"]], fields["dtype"])
    return fields, values.reshape(fields["shape"])


@dataclass
class Cluster:
    """Nodes that know each other, and the servers of their caches."""

    nodes: list[Node]
    servers: list[EntryServer] = field(repr=False)


@contextlib.contextmanager
def start_cluster(
    count: int,
    directory: Path,
    root: Path,
    url: str,
    *,
    s3_kwargs: dict[str, Any] | None = None,
    token_file: Path | None = None,
    **block: Any,
) -> Iterator[Cluster]:
    """``count`` nodes with empty caches below ``directory``, for the stores and the map that are at
    ``url`` and in ``root``.
    """
    token = token_file.read_text().strip() if token_file is not None else None
    dirs = [directory / f"node{n}" for n in range(count)]
    servers = [EntryServer(path, token=token) for path in dirs]
    peers = [server.url for server in servers]
    own = {"peers": peers, "peer_token_file": token_file, "min_free": 0, **block}
    nodes = [
        Node(root, url, s3_kwargs, {"dir": path, "advertise": peer, **own})
        for path, peer in zip(dirs, peers, strict=True)
    ]
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(server)
        yield Cluster(nodes, servers)
    assert not any(server._thread.is_alive() for server in servers)
