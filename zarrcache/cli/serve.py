"""``zarrcache serve``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from zarrcache.cli.app import command, say, show, show_json
from zarrcache.cli.options import Config, Json, data_config, number, string

__all__ = ["serve"]


@command(resumable=True)
def serve(
    config: Config,
    host: Annotated[
        str,
        string("HOST", "name or address of this node to listen on; only loopback needs no token"),
    ] = "127.0.0.1",
    port: Annotated[int, number(0, "TCP port; 0 chooses a free one", most=65535)] = 7070,
    token_file: Annotated[
        Path | None,
        string(
            "FILE",
            "file (mode 0600) with the token that clients present [default: CONFIG's "
            "cache.peer_token_file]",
        ),
    ] = None,
    metrics: Annotated[
        bool,
        typer.Option(
            "--metrics",
            help="answer /metrics for Prometheus, without the token; needs the extra metrics",
        ),
    ] = False,
    as_json: Json = False,
) -> int:
    """Let other nodes read this node's cache.

    Serves entries of the array tier over HTTP to clients with the token; writes nothing. Ends on
    SIGTERM or Ctrl-C.
    """
    from zarrcache.config import cache_of
    from zarrcache.parallel import end_signalled
    from zarrcache.peers import EntryServer, read_token

    source = data_config(config)
    cache = cache_of(source)
    measured = None
    if metrics:
        from zarrcache.ops import Monitor, exposition

        measured = functools.partial(exposition, Monitor(source))
        measured()  # what is missing is an error now
    path = token_file or cache.peer_token_file
    token = read_token(path) if path is not None else None
    with (
        end_signalled() as wait,
        EntryServer(cache.dir, host=host, port=port, token=token, metrics=measured) as server,
    ):
        if as_json:
            show_json({"url": server.url, "directory": cache.dir, "has_token": token is not None})
        else:
            show(f"Serving the array tier of {cache.dir} at {server.url}. Ctrl-C ends it.")
            if metrics:
                show(f"Metrics: {server.url}/metrics")
            if token is None:
                say("There is no token: every user of this machine can read the cache.")
        wait()
    return 0
