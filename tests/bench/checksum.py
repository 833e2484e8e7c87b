"""W4: what the checksum of an entry costs at a hit."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tests.bench import peers_warm as peers
from tests.bench.harness import Bar, Context, Measured, Round, Table, interleave
from zarrcache import ZarrS3Reader

__all__ = ["run"]

Values: TypeAlias = NDArray[np.float32]

NEVER, FIRST, AGAIN, ALWAYS = (
    "verify: never",
    "verify: first, first use",
    "verify: first, used before",
    "verify: always",
)
READ = "verify: never, and every value read once"


def run(context: Context) -> list[Table]:
    """A hit whose consumer looks at one value of each page, and one whose consumer copies every
    value: into a batch, or to a GPU.
    """
    shape = (48, 48, 48) if context.quick else (108, 108, 108)
    samples = peers.prepare(context.workdir, shape, 2 if context.quick else 12, context.seed)
    peers.warm_reader(samples, context.workdir)
    readers = {verify: _reader(samples, context, verify) for verify in ("never", "first", "always")}
    _loads(samples, readers["first"], _touch)
    return [
        _table(
            context,
            samples,
            readers,
            "W4",
            "a hit with and without its checksum, one value of each page read",
            _touch,
        ),
        _table(
            context,
            samples,
            readers,
            "W4-copied",
            "a hit with and without its checksum, every value copied",
            _Copy(samples),
        ),
    ]


def _table(
    context: Context,
    samples: peers.Samples,
    readers: dict[str, ZarrS3Reader],
    name: str,
    title: str,
    consumer: Callable[[Values], object],
) -> Table:
    competitors: dict[str, Round] = {
        NEVER: functools.partial(_round, samples, lambda: readers["never"], consumer),
        # A reader is one process's view: a new one has checked nothing. It has opened the index, as
        # every process does once.
        FIRST: functools.partial(
            _round, samples, lambda: _reader(samples, context, "first"), consumer
        ),
        AGAIN: functools.partial(_round, samples, lambda: readers["first"], consumer),
        ALWAYS: functools.partial(_round, samples, lambda: readers["always"], consumer),
        # No checksum can be had for less than this.
        READ: functools.partial(
            _round,
            samples,
            lambda: readers["never"],
            lambda values: (_xor(values), consumer(values)),
        ),
    }
    return Table(
        name,
        title,
        "ms",
        NEVER,
        interleave(competitors, context.rounds, warmup=2),
        {
            **samples.pairs.facts(),
            "page cache": "warm",
            "measured": "ZarrS3Reader.load and the consumer, a density",
        },
        [
            Bar(FIRST, NEVER, at_most=1.5),
            Bar(ALWAYS, NEVER, at_most=1.5),
            Bar(AGAIN, NEVER, at_most=1.1),
        ],
    )


def _touch(values: Values) -> None:
    values[:: peers.PAGE_FLOATS].sum()


def _xor(values: Values) -> None:
    np.bitwise_xor.reduce(values[: values.size // 2 * 2].view(np.uint64))


class _Copy:
    """A batch that is used again, as a pinned one is."""

    def __init__(self, samples: peers.Samples) -> None:
        self._batch = np.zeros(math.prod(samples.shape), np.float32)

    def __call__(self, values: Values) -> None:
        np.copyto(self._batch, values)


def _reader(samples: peers.Samples, context: Context, verify: str) -> ZarrS3Reader:
    """A reader of the filled cache that has checked no entry, with its index and the listing of the
    origin read.
    """
    reader = peers.reader(samples, context.workdir, verify=verify)
    reader.task_ids  # noqa: B018 - the listing is an entry, and always checked
    return reader


def _round(
    samples: peers.Samples, reader: Callable[[], ZarrS3Reader], consumer: Callable[[Values], object]
) -> Measured:
    ready = reader()
    start_s = time.perf_counter()
    items = _loads(samples, ready, consumer)
    return Measured(time.perf_counter() - start_s, items)


def _loads(
    samples: peers.Samples, reader: ZarrS3Reader, consumer: Callable[[Values], object]
) -> int:
    items = 0
    for task_id in samples.pairs.task_ids:
        for role in ("data", "label"):
            values, _ = reader.load(task_id, role)
            consumer(values)
            items += 1
    if reader.stats.misses:
        raise ValueError(f"{reader.stats.misses} of {items} loads were misses; this measures hits")
    return items
