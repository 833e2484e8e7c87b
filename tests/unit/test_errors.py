"""The tree of errors: its shape, and that each survives the ways errors travel."""

from __future__ import annotations

import inspect
import pickle
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from zarrcache import errors
from zarrcache.errors import ZarrCacheError

TREE = {
    "ZarrCacheError": ("Exception",),
    "ConfigError": ("ZarrCacheError", "ValueError"),
    "SchemaError": ("ZarrCacheError", "ValueError"),
    "ArrayNotFoundError": ("SchemaError",),
    "OriginError": ("ZarrCacheError", "OSError"),
    "OriginNotFoundError": ("OriginError", "FileNotFoundError"),
    "OriginAccessError": ("OriginError", "PermissionError"),
    "OriginUnavailableError": ("OriginError", "ConnectionError"),
    "IncompleteArrayError": ("ZarrCacheError",),
    "CorruptEntryError": ("ZarrCacheError",),
    "LockTimeoutError": ("ZarrCacheError", "TimeoutError"),
}
CLASSES = [getattr(errors, name) for name in TREE]


def test_tree_has_the_promised_shape() -> None:
    """Users catch these and their builtin bases; a base that is taken away breaks them."""
    found = {
        name: tuple(base.__name__ for base in cls.__bases__)
        for name, cls in inspect.getmembers(errors, inspect.isclass)
    }
    assert found == TREE
    assert sorted(errors.__all__) == sorted(TREE)


def test_docstring_draws_every_class() -> None:
    """The drawing in the module's docstring names each class once."""
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    assert sorted([*drawn, "ZarrCacheError"]) == sorted(TREE)


@pytest.mark.parametrize("cls", CLASSES)
def test_error_takes_one_string_and_shows_it(cls: type[ZarrCacheError]) -> None:
    """``str`` gives the message back, also where OSError would show an errno."""
    assert (
        str(cls("s3://b/mp-1.zarr is gone. Convert it again."))
        == "s3://b/mp-1.zarr is gone. Convert it again."
    )
    with pytest.raises(TypeError):
        cls("two", "strings")  # type: ignore[call-arg]


@pytest.mark.parametrize("cls", CLASSES)
def test_error_survives_pickling_and_rebuilding_from_its_string(cls: type[ZarrCacheError]) -> None:
    """Multiprocessing pickles; torch's DataLoader makes ``type(exc)(str)`` in the parent."""
    exc = cls("what, where, what to do")
    for copy in (pickle.loads(pickle.dumps(exc)), type(exc)(str(exc))):
        assert type(copy) is cls
        assert (str(copy), copy.args) == (str(exc), exc.args)


def test_error_keeps_its_class_through_a_process_pool() -> None:
    """What a worker raises is what the parent catches."""
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        pytest.raises(errors.OriginAccessError, match="not yours"),
    ):
        pool.submit(_fail).result()


def _fail() -> None:
    raise errors.OriginAccessError("not yours")


def test_incomplete_array_is_not_what_zarr_takes_for_a_missing_chunk() -> None:
    """Zarr fills what raises FileNotFoundError, IsADirectoryError or NotADirectoryError with the
    fill value.
    """
    assert not issubclass(errors.IncompleteArrayError, OSError)
