"""Training from the files of VASP and the Materials Project as they lie, without converting them.

The files are synthetic ones; ``tests/real`` reads real ones.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.chgcars import SMALL
from tests.support.faultproxy import FaultProxy, Rule
from tests.support.mpjson import write_json_pairs
from tests.support.readers import make_reader
from tests.support.requestlog import RequestLog
from tests.support.s3server import S3Server
from zarrcache import ZarrS3Reader, plan_warm
from zarrcache.config import DataConfig
from zarrcache.convert.plan import convert_directory
from zarrcache.demo.synthetic import write_pairs
from zarrcache.errors import OriginAccessError, OriginNotFoundError, SchemaError
from zarrcache.ops import measure_split, read_status, verify

pytest.importorskip("pymatgen", reason="needs the extra 'convert'")

_PACK: dict[str, Callable[[bytes], bytes]] = {
    ".CHGCAR": bytes,
    ".CHGCAR.gz": gzip.compress,
    ".CHGCAR.bz2": bz2.compress,
    ".CHGCAR.xz": lzma.compress,
}


class Files:
    """Materials of every kind of source, and the stores that conversion makes of them.

    Attributes
    ----------
    root : Path
        ``data`` and ``label`` with the files, one kind per material; ``converted/data`` and
        ``converted/label`` with all of them as stores; ``map.json``.
    ids : list of str
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        write_pairs(root / "text", 6, seed=SMALL)
        self.ids = write_json_pairs(root / "json", 6, seed=SMALL)
        for role, folder in (("data", "input"), ("label", "label")):
            (root / role).mkdir()
            for id_, suffix in zip(self.ids, (*_PACK, ".json.gz", ".zarr.zip"), strict=True):
                text = root / "text" / folder / f"{id_}.CHGCAR"
                if suffix in _PACK:
                    packed = _PACK[suffix](text.read_bytes())
                    (root / role / f"{id_}{suffix}").write_bytes(packed)
                elif suffix == ".json.gz":
                    shutil.copy(root / "json" / folder / f"{id_}.json.gz", root / role)
                else:
                    convert_directory(text, root / role, zip=True, workers=1)
            convert_directory(root / "text" / folder, root / "converted" / role, workers=1)
            # JSON has more digits than text.
            convert_directory(
                root / role / f"{self.ids[4]}.json.gz",
                root / "converted" / role,
                workers=1,
                overwrite=True,
            )
        (root / "map.json").write_text(json.dumps({"GGA": self.ids}))

    def reader(self, directory: Path, url: object, **options: Any) -> ZarrS3Reader:
        return make_reader(directory, url, map_dir=self.root / "map.json", **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def uploaded(files: Files, s3_server: S3Server) -> str:
    """The URL of the files on S3; read only."""
    bucket = s3_server.new_bucket()
    for role in ("data", "label"):
        s3_server.put_tree(files.root / role, f"s3://{bucket}/{role}")
    return f"s3://{bucket}"


@pytest.mark.parametrize(
    ("on_s3", "is_cached", "normalize"),
    [(True, True, False), (True, False, True), (False, True, True), (False, False, False)],
)
def test_files_give_the_bits_of_the_stores_made_from_them(
    files: Files,
    uploaded: str,
    s3_server: S3Server,
    tmp_path: Path,
    on_s3: bool,
    is_cached: bool,
    normalize: bool,
) -> None:
    """Every kind, mixed in one directory: plain, gzip, bzip2, xz, JSON, and a zipped store."""
    converted = files.reader(tmp_path, files.root / "converted", normalize=normalize)
    reader = files.reader(
        tmp_path,
        uploaded if on_s3 else files.root,
        normalize=normalize,
        s3_kwargs=s3_server.s3_kwargs if on_s3 else None,
        cache={} if is_cached else None,
    )
    assert reader.task_ids == files.ids
    assert reader.split_task_ids() == converted.split_task_ids()
    for id_ in files.ids:
        for role in ("data", "label"):
            for _ in range(2):
                values, gridsize = reader.load(id_, role)
                expected, shape = converted.load(id_, role)
                assert gridsize == shape
                assert values.dtype == np.float32
                assert np.array_equal(values, expected)
                assert values.flags.writeable


def test_a_warm_node_reads_files_without_a_request(
    files: Files, uploaded: str, s3_server: S3Server, tmp_path: Path
) -> None:
    """Each is fetched once, in several processes; a second warm lists and fetches nothing."""
    log = RequestLog(s3_server, uploaded.removeprefix("s3://"))
    options: dict[str, Any] = {"s3_kwargs": s3_server.s3_kwargs, "cache": {}}
    report = plan_warm(files.reader(tmp_path, uploaded, **options), workers=2).execute()
    assert (report.warm, report.failed) == (6, ())
    gets = log.paths("GET")
    assert sum(gets.values()) == len(gets) == 12

    log = RequestLog(s3_server, uploaded.removeprefix("s3://"))
    report = plan_warm(files.reader(tmp_path, uploaded, **options)).execute()
    assert report.fresh == 6
    again = files.reader(tmp_path, uploaded, **options)
    (data, label, *_), _ = again.data_split()
    assert all(len(one) and len(other) for one, other in zip(data, label, strict=True))
    assert log.seen() == []
    assert again.stats.hits == 6


def _config(files: Files, tmp_path: Path, **changes: Any) -> DataConfig:
    for role in ("data", "label"):
        if not (tmp_path / role).exists():
            shutil.copytree(files.root / role, tmp_path / role)
    document: dict[str, Any] = {
        "data_dir": str(tmp_path / "data"),
        "label_dir": str(tmp_path / "label"),
        "map_dir": str(files.root / "map.json"),
        "functional": "GGA",
        "cache": {"dir": tmp_path / "cache", "min_free": 0},
    }
    return DataConfig.of(document | changes)


def test_every_command_works_on_files(files: Files, tmp_path: Path) -> None:
    """A file that was changed is stale, and warm fetches it again."""
    both = _config(files, tmp_path, density_type=["total", "diff"], missing="zero")
    dry = plan_warm(both).estimate()
    assert (dry.unread, dry.lacking, dry.to_fetch) == (12, (), 24)
    config = _config(files, tmp_path)
    assert plan_warm(config).execute().warm == 6
    coverage = read_status(config).coverage
    assert coverage is not None
    assert (coverage.ids, coverage.warm, coverage.missing) == (6, 6, 0)
    checked = verify(config, against_origin=True)
    assert (checked.entries, checked.corrupt, checked.stale) == (12 + 2, (), ())
    forecast = measure_split(config, capacity_bytes=2**60).forecast()
    assert [epoch.hit_ratio for epoch in forecast.epochs[:2]] == [0, 1]
    assert forecast.epochs[0].nbytes == forecast.stored_bytes

    shutil.copy(tmp_path / "data" / f"{files.ids[1]}.CHGCAR.gz", tmp_path / "other.gz")
    text = gzip.decompress((tmp_path / "other.gz").read_bytes())
    packed = gzip.compress(text.replace(b"\n", b" \n", 1))
    (tmp_path / "data" / f"{files.ids[1]}.CHGCAR.gz").write_bytes(packed)
    assert len(verify(config, against_origin=True).stale) == 1
    report = plan_warm(config, revalidate=True).execute()
    assert (report.warm, report.fresh) == (6, 5)


def test_source_chooses_the_kind_for_materials_that_have_several(
    files: Files, tmp_path: Path
) -> None:
    """Also from a listing that a run with another choice has stored."""
    id_ = files.ids[0]
    config = _config(files, tmp_path)
    for role in ("data", "label"):
        convert_directory(tmp_path / role / f"{id_}.CHGCAR", tmp_path / role, workers=1)
    plan_warm(config).execute()
    for source, name, ids in (
        ("auto", f"{id_}.zarr", 6),
        ("CHGCAR", f"{id_}.CHGCAR", 4),
        (["json.gz", "CHGCAR", "zarr"], f"{id_}.CHGCAR", 5),
    ):
        reader = ZarrS3Reader.from_config(_config(files, tmp_path, source=source))
        assert reader.store_name(id_, "data") == name
        assert len(reader.task_ids) == ids


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz"])
def test_a_directory_per_material_holds_a_chgcar(files: Files, tmp_path: Path, suffix: str) -> None:
    """As VASP leaves it, with other files beside it."""
    expected, _ = files.reader(tmp_path, files.root).load(files.ids[0], "data")
    text = (files.root / "text/input" / f"{files.ids[0]}.CHGCAR").read_bytes()
    for role in ("data", "label"):
        path = tmp_path / role / files.ids[0] / f"CHGCAR{suffix}"
        path.parent.mkdir(parents=True)
        path.write_bytes(_PACK[f".CHGCAR{suffix}"](text))
        (path.parent / "POTCAR").write_text("secret")
    reader = files.reader(tmp_path, tmp_path, source="directory", cache={})
    assert reader.task_ids == files.ids[:1]
    assert np.array_equal(reader.load(files.ids[0], "data")[0], expected)
    path.unlink()
    with pytest.raises(SchemaError, match=r"label/.*holds neither a CHGCAR nor rho_\*\.npy"):
        reader.load(files.ids[0], "label")


def test_an_id_without_a_source_names_what_it_could_be(files: Files, tmp_path: Path) -> None:
    reader = files.reader(tmp_path, files.root)
    with pytest.raises(
        OriginNotFoundError,
        match=r"mp-404\.zarr does not exist, and there is no other source \(\.zarr\.zip, \.json",
    ):
        reader.load("mp-404", "data")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"task_id": "mp-1"}, r"JSON without a charge density \(keys: task_id\)"),
        ({"data": None}, "JSON without a charge density"),
        ([], "JSON but not an object"),
    ],
)
def test_json_without_a_density_fails_before_training(
    files: Files, tmp_path: Path, document: object, words: str
) -> None:
    """``warm`` names the file and fetches the others."""
    config = _config(files, tmp_path)
    path = tmp_path / "data" / f"{files.ids[4]}.json.gz"
    path.write_bytes(gzip.compress(json.dumps(document).encode()))
    with pytest.raises(SchemaError, match=f"{path.name} .*{words}"):
        ZarrS3Reader.from_config(config).load(files.ids[4], "data")
    report = plan_warm(config).execute()
    assert (report.warm, report.failed_ids, report.is_good) == (5, (files.ids[4],), False)
    assert str(path) in report.failed[0].error


def test_a_potential_under_the_name_of_a_density_is_refused(files: Files, tmp_path: Path) -> None:
    """As by ``convert``."""
    config = _config(files, tmp_path)
    path = tmp_path / "data" / f"{files.ids[0]}.CHGCAR"
    head, blank, grid = path.read_text().partition("\n\n")
    shape, end, numbers = grid.partition("\n")
    path.write_text(head + blank + shape + end + re.sub(r"(?<![-+E\d.])(?=\d+\.)", "-", numbers))
    with pytest.raises(
        SchemaError, match=r"CHGCAR.* this looks like a potential.*CHGCAR there, or leave"
    ):
        ZarrS3Reader.from_config(config).load(files.ids[0], "data")


def test_a_grid_that_the_file_does_not_have_is_named(files: Files, tmp_path: Path) -> None:
    reader = files.reader(tmp_path, files.root, density_type="diff")
    with pytest.raises(SchemaError, match=r"CHGCAR has no diff density. It has: total"):
        reader.load(files.ids[0], "data")


def test_a_file_is_no_zarr_group(files: Files, tmp_path: Path) -> None:
    reader = files.reader(tmp_path, files.root)
    with pytest.raises(SchemaError, match=r"CHGCAR is not a Zarr store.*reader\.load"):
        reader.read_zarr_store(files.root / "data" / f"{files.ids[0]}.CHGCAR")


def test_a_bucket_that_lists_but_does_not_serve_is_named(
    files: Files, uploaded: str, s3_server: S3Server, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    """Public buckets may allow listing and deny reading, or the other way round."""
    fault_proxy.rules(Rule(then="403", op="GET"))
    reader = files.reader(
        tmp_path, uploaded, s3_kwargs=s3_server.kwargs_at(fault_proxy.endpoint_url), cache={}
    )
    assert reader.task_ids == files.ids
    with pytest.raises(OriginAccessError, match=rf"{files.ids[0]}\.CHGCAR.*403"):
        reader.load(files.ids[0], "data")


@pytest.mark.parametrize("cut", [0, 30, 200])
def test_a_compressed_file_that_is_cut_short_is_named(
    files: Files, tmp_path: Path, cut: int
) -> None:
    config = _config(files, tmp_path)
    for id_, suffix in zip(files.ids, (*_PACK, ".json.gz"), strict=False):
        path = tmp_path / "data" / f"{id_}{suffix}"
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(SchemaError, match=rf"{path.name}\b"):
            ZarrS3Reader.from_config(config).load(id_, "data")


def test_files_per_volume_are_divided_by_the_volume_of_their_lattice(
    files: Files, tmp_path: Path
) -> None:
    """As pymatgen has it; the same from files and from their stores of float64. ``warm``,
    ``verify`` and ``status`` know the entries.
    """
    from pymatgen.io.vasp import Chgcar

    exact = tmp_path / "exact"
    for role, folder in (("data", "input"), ("label", "label")):
        convert_directory(
            files.root / "text" / folder, exact / role, workers=1, dtype="float64", chunks=64
        )
    config = DataConfig(
        data_dir=str(files.root / "data"),
        label_dir=str(files.root / "label"),
        map_dir=str(files.root / "map.json"),
        functional="GGA",
        normalize_data="volume",
        source=["json.gz", "CHGCAR", "zarr.zip"],
        cache={"dir": tmp_path / "cache", "min_free": 0},
    )
    report = plan_warm(config, workers=1).execute()
    assert report.failed == ()
    reader = ZarrS3Reader.from_config(config)
    others = [
        files.reader(tmp_path, exact, normalize="volume"),
        files.reader(tmp_path, files.root, normalize="volume"),
    ]
    for id_ in files.ids[:5]:
        chgcar = Chgcar.from_file(str(files.root / "text" / "label" / f"{id_}.CHGCAR"))
        expected = (chgcar.data["total"] / chgcar.structure.lattice.volume).astype(np.float32)
        for one in (reader, *others):
            values, shape = one.load(id_, "label")
            assert np.array_equal(values.reshape(shape), expected)
    assert reader.stats.misses == 0
    checked = verify(config, against_origin=True)
    assert checked.is_good
    assert checked.stale == ()
    covered = read_status(config).coverage
    assert covered is not None
    assert covered.warm == len(files.ids)
    covered = read_status(config.model_copy(update={"normalize_data": False})).coverage
    assert covered is not None
    assert covered.warm == 0
    assert [(one.units, one.densities) for one in covered.unused] == [("volume", 12)]
