"""The floor of what comes over the network: objects whose keys are known, fetched and forgotten.

It imports as little as it can: ``python -m tests.bench.bare_gets REQUEST`` is measured from the
start of its process to its end.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

__all__ = ["IN_FLIGHT", "get_all", "obstore_of"]

IN_FLIGHT = 64


async def get_all(bucket: Any, keys: Sequence[str]) -> None:
    """Get every key, ``IN_FLIGHT`` at a time."""
    todo = iter(keys)

    async def worker() -> None:
        for key in todo:
            await (await bucket.get_async(key)).bytes_async()

    await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))


def obstore_of(s3_kwargs: Mapping[str, Any], bucket: str) -> Any:
    """A bucket, as the peers open it."""
    from obstore.store import S3Store

    return S3Store(
        bucket,
        endpoint=s3_kwargs["endpoint_url"],
        access_key_id=s3_kwargs["key"],
        secret_access_key=s3_kwargs["secret"],
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True, "timeout": timedelta(seconds=60)},
    )


def _main(request: Mapping[str, Any]) -> None:
    """Every key of a file; with several processes, each its part."""
    processes = request["processes"]
    if processes > 1:
        parts = [
            json.dumps({**request, "processes": 1, "part": [first, processes]})
            for first in range(processes)
        ]
        for process in [
            subprocess.Popen([sys.executable, "-m", "tests.bench.bare_gets", part])
            for part in parts
        ]:
            if process.wait():
                sys.exit(process.returncode)
        return
    first, step = request.get("part", (0, 1))
    keys = json.loads(Path(request["keys"]).read_text())[first::step]
    asyncio.run(get_all(obstore_of(request["s3_kwargs"], request["bucket"]), keys))
    # a thread of obstore that still wakes the loop would abort an interpreter that is going
    os._exit(0)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
