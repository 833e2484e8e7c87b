"""Decode arrays with unusual codecs: zarr decodes them in a child process of bounded memory.

Zarr reads more than :mod:`zarrcache.arrays.codecs` does: filters that change numbers, data that is
compressed twice, codecs of other packages, chunk grids that are not regular. The size to which such
a codec decodes a chunk is not known beforehand, and the memory of a process that also trains cannot
be limited. The child gets the memory that the array needs and a few MiB; a chunk that needs more
ends the child, not the training. This takes about a second per array, once: the array tier keeps
the result.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from zarrcache._units import format_bytes
from zarrcache.errors import IncompleteArrayError, SchemaError, ZarrCacheError
from zarrcache.parallel import ChildProcess, receive, receive_bytes

__all__ = ["decode_in_child"]

#: Memory of the child beyond three arrays (the result, a chunk, what its filters make of it) and
#: twice the objects. It has to hold zarr's threads, and its list of chunks.
_ROOM_BYTES = 64 * 1024**2
#: Stack of each thread in the child: the default of 8 MiB would count against its memory.
_STACK_BYTES = 1024**2
#: Seconds within which a child whose connection is closed has ended.
_END_S = 5.0


def decode_in_child(
    objects: Mapping[str, Buffer], zarr_format: Literal[2, 3], nbytes: int, url: str
) -> NDArray[Any]:
    """Read the array of these objects with zarr.

    Parameters
    ----------
    objects : mapping
        Of the array, by key below it.
    zarr_format : 2 or 3
    nbytes : int
        Size of the array.
    url : str

    Raises
    ------
    SchemaError
        Zarr does not know a codec or the chunk grid.
    IncompleteArrayError
        A chunk is damaged, or needs more memory than the array explains.
    ZarrCacheError
        The node ended the child, or has no memory for it.
    """
    held = sum(memoryview(data).nbytes for data in objects.values())
    room = _ROOM_BYTES + 3 * nbytes + 2 * held
    child = ChildProcess(_serve, zarr_format, room)
    has_started = False
    try:
        child.connection.recv()
        has_started = True
        # The child ends at once if it runs out of memory; then its answer is missing.
        with contextlib.suppress(OSError):
            for key, data in objects.items():
                child.connection.send(key)
                child.connection.send_bytes(memoryview(data).cast("B"))
            child.connection.send(None)
        answer = child.connection.recv()
        if answer[0] == "array":
            _, shape, dtype = answer
            values = np.empty(shape, dtype)
            if values.nbytes:
                child.connection.recv_bytes_into(values.reshape(-1).view(np.uint8))
            return values
    except (EOFError, OSError):
        # The system kills processes if memory is full.
        is_killed = child.has_ended(_END_S) and child.wait() == -signal.SIGKILL
        if is_killed or not has_started:
            raise ZarrCacheError(
                f"{url} could not be decoded, because the process for it was ended or could not "
                "start; memory may be full. Use fewer workers, or give the job more memory."
            ) from None
        answer = "damaged", "the process that decoded it was ended"
    finally:
        child.kill()
        child.close()
    kind, words = answer
    if kind == "memory":
        words = f"it takes more than {format_bytes(room)} of memory"
    if kind == "unknown":
        raise SchemaError(
            f"{url} cannot be opened by zarr ({words}). If it has a codec of another package, "
            "install that package: a codec that is only registered while a program runs is not "
            "found."
        )
    raise IncompleteArrayError(
        f"{url} cannot be decoded by zarr ({words}). Convert the store again."
    )


# -- in the child --------------------------------------------------------------------------------


def _serve(connection: Connection, zarr_format: Literal[2, 3], room: int) -> None:
    """Receive the objects, decode the array within ``room`` bytes, and send it."""
    import threading
    import warnings

    warnings.simplefilter("ignore")
    threading.stack_size(_STACK_BYTES)
    import zarr
    from zarr.buffer import default_buffer_prototype

    zarr.config.set({"async.concurrency": 1, "threading.max_workers": 1})
    _limit_memory(room)
    connection.send("started")
    objects: dict[str, Any] = {}
    make = default_buffer_prototype().buffer.from_bytes
    while (key := receive(connection)) is not None:
        objects[f"a/{key}"] = make(receive_bytes(connection))
    try:
        store = zarr.storage.MemoryStore(objects, read_only=True)
        try:
            array = zarr.open_array(store=store, path="a", mode="r", zarr_format=zarr_format)
        except MemoryError:
            raise
        except Exception as exc:  # noqa: BLE001 the parent raises it
            connection.send(("unknown", f"{type(exc).__name__}: {exc}"[:500]))
            return
        values = np.asarray(array[...])
        values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
        connection.send(("array", values.shape, values.dtype))
        if values.nbytes:
            connection.send_bytes(values.reshape(-1).view(np.uint8).data)
    except MemoryError:
        connection.send(("memory", ""))
    except Exception as exc:  # noqa: BLE001 the parent raises it
        # Codecs of numcodecs that need another package are known, and fail when they are used.
        kind = "unknown" if type(exc).__name__ == "UnknownCodecError" else "damaged"
        connection.send((kind, f"{type(exc).__name__}: {exc}"[:500]))


def _limit_memory(nbytes: int) -> None:
    """Allow ``nbytes`` more than the process has now. Only Linux enforces it."""
    with contextlib.suppress(ImportError, OSError, ValueError, StopIteration):
        import resource

        with open("/proc/self/status", encoding="ascii") as status:
            line = next(line for line in status if line.startswith("VmData:"))
        limit = int(line.split()[1]) * 1024 + nbytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
