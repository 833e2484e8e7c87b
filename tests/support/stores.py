"""Writers of small Zarr stores in every layout that users have. They use only zarr, which makes
them an oracle for the package.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["STRUCTURE", "plain_read", "random_density", "small_group"]

#: One silicon atom, in pymatgen's dictionary form.
STRUCTURE: dict[str, Any] = {
    "@module": "pymatgen.core.structure",
    "@class": "Structure",
    "charge": 0,
    "lattice": {
        "matrix": [[3.8, 0.0, 0.0], [0.0, 3.8, 0.0], [0.0, 0.0, 3.8]],
        "pbc": [True, True, True],
    },
    "properties": {},
    "sites": [
        {
            "species": [{"element": "Si", "occu": 1}],
            "abc": [0.0, 0.0, 0.0],
            "properties": {},
            "label": "Si",
            "xyz": [0.0, 0.0, 0.0],
        }
    ],
}


def random_density(
    shape: tuple[int, ...], dtype: DTypeLike = "float32", seed: int = 0
) -> NDArray[Any]:
    """Positive random numbers; all cells differ, so a swapped chunk or axis is noticed."""
    values = (
        np.random.default_rng(seed).random(shape)
        + np.arange(int(np.prod(shape)), dtype="float64").reshape(shape) * 1e-3
    )
    return values.astype(dtype)


def small_group(
    path: Path,
    arrays: Mapping[str, NDArray[Any]] | None = None,
    *,
    shape: tuple[int, ...] = (12, 10, 8),
    chunks: tuple[int, ...] | None = None,
    dtype: DTypeLike = "float32",
    seed: int = 0,
    zarr_format: Literal[2, 3] = 2,
    shards: tuple[int, ...] | None = None,
    consolidated: bool = False,
    as_zip: bool = False,
    diff: bool = False,
    metadata: Mapping[str, Any] | None = None,
    attrs: Mapping[str, Any] | None = None,
    order: Literal["C", "F"] = "C",
    fill_value: Any = 0,
    **create: Any,
) -> dict[str, NDArray[Any]]:
    """Write one store and return what is in it.

    Parameters
    ----------
    path : Path
        The store, for example ``tmp_path / "mp-1.zarr"``; with ``as_zip`` the file, for example
        ``tmp_path / "mp-1.zarr.zip"``.
    arrays : mapping, optional
        Name to values. The default is a random ``charge_density_total`` of ``shape``, with ``diff``
        also ``charge_density_diff``.
    chunks : tuple, optional
        Default: such that even a tiny array has several chunks, and cut ones at the edge; two along
        each axis that is longer than 4, and with ``shards`` 4 cells along each.
    shards : tuple, optional
        Zarr v3 only; multiples of ``chunks``.
    metadata, attrs : mapping, optional
        ``metadata`` is added to the attributes as the users' converter does it: ``structure`` and
        ``metadata`` as JSON strings. ``attrs`` replaces them all.
    **create
        Goes to ``Group.create_array``, for example ``compressors=``, ``filters=``.
    """
    if arrays is None:
        names = ["charge_density_total", *(["charge_density_diff"] if diff else [])]
        arrays = {name: random_density(shape, dtype, seed + i) for i, name in enumerate(names)}
    if attrs is None:
        attrs = {
            "structure": json.dumps(STRUCTURE),
            "metadata": json.dumps(dict(metadata or {"functional": "GGA", "seed": seed})),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    written = {
        "attrs": attrs,
        "chunks": chunks,
        "zarr_format": zarr_format,
        "shards": shards,
        "consolidated": consolidated,
        "as_zip": as_zip,
        "order": order,
        "fill_value": fill_value,
        **create,
    }
    key = None if path.exists() else _key(arrays, written)
    if key in _FILES:
        for name, content in _FILES[key].items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    else:
        _write(path, arrays, **written)
        if key is not None:
            found = path.rglob("*") if path.is_dir() else [path]
            _FILES[key] = {
                file.relative_to(path).as_posix(): file.read_bytes()
                for file in found
                if file.is_file()
            }
    return dict(arrays)


#: What zarr has written for equal arguments: a copy costs a fifth.
_FILES: dict[str | None, dict[str, bytes]] = {}
_MAX_COPIED_BYTES = 2**18


def _key(arrays: Mapping[str, NDArray[Any]], written: Mapping[str, Any]) -> str | None:
    """None: not to be copied, because it is large or has arguments that JSON cannot describe."""
    if sum(values.nbytes for values in arrays.values()) > _MAX_COPIED_BYTES:
        return None
    contents = [
        (name, values.shape, values.dtype.str, values.tobytes().hex())
        for name, values in arrays.items()
    ]
    try:
        return json.dumps([contents, written])
    except TypeError:
        return None


def _write(
    path: Path,
    arrays: Mapping[str, NDArray[Any]],
    *,
    attrs: Mapping[str, Any],
    chunks: tuple[int, ...] | None,
    zarr_format: Literal[2, 3],
    shards: tuple[int, ...] | None,
    consolidated: bool,
    as_zip: bool,
    order: Literal["C", "F"],
    **create: Any,
) -> None:
    import zarr
    import zarr.storage

    with warnings.catch_warnings():
        # zarr says that consolidated metadata is no part of v3, and that a zip holds two copies of
        # a rewritten file; both are meant here.
        warnings.simplefilter("ignore")
        store: Any = (
            zarr.storage.ZipStore(path, mode="w", compression=zipfile.ZIP_STORED)
            if as_zip
            else zarr.storage.LocalStore(path)
        )
        group = zarr.create_group(
            store=store, zarr_format=zarr_format, overwrite=not as_zip, attributes=dict(attrs)
        )
        for name, values in arrays.items():
            array = group.create_array(
                name,
                shape=values.shape,
                dtype=values.dtype,
                chunks=chunks
                or tuple(min(4 if shards else max(4, n // 2 + 1), max(1, n)) for n in values.shape),
                shards=shards,
                order=order if zarr_format == 2 else None,
                **create,
            )
            array[...] = values
        if consolidated:
            zarr.consolidate_metadata(store)
        if as_zip:
            store.close()


def plain_read(path: Path, name: str = "charge_density_total") -> NDArray[Any]:
    """A local store read by zarr: the oracle of every parity test."""
    import zarr
    import zarr.storage

    if path.is_dir():
        return np.asarray(zarr.open_group(zarr.storage.LocalStore(path), mode="r")[name][...])
    store = zarr.storage.ZipStore(path, mode="r")
    try:
        return np.asarray(zarr.open_group(store, mode="r")[name][...])
    finally:
        store.close()
