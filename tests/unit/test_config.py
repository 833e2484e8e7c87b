"""Settings: what is understood, and the words of every refusal."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zarrcache._units import Percent, format_bytes, parse_bytes, parse_seconds
from zarrcache.config import CacheConfig, DataConfig, LoaderConfig, RetryConfig
from zarrcache.errors import ConfigError

KIB, MIB, GIB = 1024, 1024**2, 1024**3


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("200 GiB", 200 * GIB),
        ("4MiB", 4 * MIB),
        ("1.5 GB", 1_500_000_000),
        ("2k", 2 * KIB),
        (" 10 b ", 10),
        ("7", 7),
        (7, 7),
        ("1 TiB", 1024 * GIB),
        (".5 KiB", 512),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes_are_understood(text: object, nbytes: int) -> None:
    """Binary and decimal units, in any case, exactly."""
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "ten", "10 GX", "-1", -1, 1.5, True, None, "1 2", "10 %", "1e9"]
)
def test_an_invalid_size_is_shown_with_an_example(text: object) -> None:
    """The value and the accepted forms."""
    with pytest.raises(ValueError, match=r"is not a size\. Write for example '200 GiB'") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("60 s", 60),
        ("5 min", 300),
        ("12h", 43200),
        ("30 d", 2592000),
        ("250 ms", 0.25),
        (1.5, 1.5),
        (0, 0),
    ],
)
def test_durations_are_understood(text: object, seconds: float) -> None:
    """Seconds without a unit."""
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "3 weeks", -1, True, None, float("nan")])
def test_an_invalid_duration_is_shown_with_an_example(text: object) -> None:
    """The value and the accepted forms."""
    with pytest.raises(ValueError, match=r"is not a duration\. Write for example '60 s'"):
        parse_seconds(text)


@given(st.integers(0, 2**60))
def test_formatted_size_reads_back_to_within_its_digits(nbytes: int) -> None:
    """What a message shows can be written into a config."""
    assert abs(parse_bytes(format_bytes(nbytes)) - nbytes) <= nbytes * 0.06


def test_defaults_are_the_documented_ones(tmp_path: Path) -> None:
    """As the example in the README has them."""
    config = CacheConfig(dir=tmp_path)
    assert config.limit == 200 * GIB
    assert (config.min_free, type(config.min_free)) == (5.0, Percent)
    assert (config.eviction, config.revalidate, config.verify, config.shared) == (
        "none",
        "never",
        "first",
        False,
    )
    assert (config.bytes.enabled, config.bytes.block_size, config.arrays.enabled) == (
        True,
        4 * MIB,
        True,
    )
    assert (config.retry.attempts, config.retry.timeout) == (5, 60.0)
    assert (config.fetch.engine, config.fetch.concurrency) == ("auto", "auto")
    assert (config.lower, config.peers, config.advertise, config.peer_token_file) == (
        None,
        (),
        None,
        None,
    )


@pytest.mark.parametrize(
    ("text", "value", "kind"),
    [
        ("10 %", 10, Percent),
        ("2.5%", 2.5, Percent),
        ("0 %", 0, Percent),
        ("1 GiB", GIB, int),
        (0, 0, int),
    ],
)
def test_min_free_is_a_share_or_bytes(
    tmp_path: Path, text: object, value: float, kind: type
) -> None:
    """Only the per cent sign makes it a share."""
    config = CacheConfig(dir=tmp_path, min_free=text)
    assert (config.min_free, type(config.min_free)) == (value, kind)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"limitt": "1 GiB"}, r"^cache\.limitt is not a setting\. Did you mean 'limit'\?$"),
    (
        {"hue": "blue"},
        r"^cache\.hue is not a setting\. Known keys: dir, limit, min_free, .*allow_network_fs\.$",
    ),
    (
        {"retry": {"atempts": 3}},
        r"^cache\.retry\.atempts is not a setting\. Did you mean 'attempts'\?$",
    ),
    (
        {"bytes": {"blocksize": 1}},
        r"^cache\.bytes\.blocksize is not a setting\. Did you mean 'block_size'\?$",
    ),
    ({"limit": "lots"}, r"^cache\.limit: 'lots' is not a size"),
    ({"limit": 0}, r"^cache\.limit: has to be greater than 0 \(got 0\)\.$"),
    ({"min_free": "100 %"}, r"^cache\.min_free: '100 %' would leave no room for the cache"),
    ({"min_free": "five"}, r"^cache\.min_free: 'five' is not a size"),
    (
        {"eviction": "lru"},
        r"^cache\.eviction: .*'none', 'least-recently-stored' or 'belady' \(got 'lru'\)\.$",
    ),
    (
        {"revalidate": "always"},
        r"^cache\.revalidate: .*'never', 'run' or 'epoch' \(got 'always'\)\.$",
    ),
    ({"verify": True}, r"^cache\.verify: .*'first', 'always' or 'never' \(got True\)\.$"),
    ({"bytes": {"block_size": "1 KiB"}}, r"^cache\.bytes\.block_size: .*65536"),
    ({"bytes": 3}, r"^cache\.bytes: .*\(got 3\)\.$"),
    ({"retry": {"attempts": 0}}, r"^cache\.retry\.attempts: .*\(got 0\)\.$"),
    ({"retry": {"timeout": "soon"}}, r"^cache\.retry\.timeout: 'soon' is not a duration"),
    (
        {"fetch": {"engine": "boto"}},
        r"^cache\.fetch\.engine: .*'auto', 'obstore' or 's3fs' \(got 'boto'\)\.$",
    ),
    *(
        (
            {"fetch": {"concurrency": value}},
            (
                r"^cache\.fetch\.concurrency: .* is not a number of requests\. Write auto, or a "
                r"whole number from 1 to 1024\.$"
            ),
        )
        for value in (5000, 0, -1, 2.5, True, None, "many", "Auto", "", [64])
    ),
    ({"shared": "perhaps"}, r"^cache\.shared: .*\(got 'perhaps'\)\.$"),
    (
        {"peers": ["node1"]},
        (
            r"^cache\.peers: 'node1' is not the address of a peer\. Write http://host:port, for "
            r"example http://node1:7070\.$"
        ),
    ),
    (
        {"peers": ["https://node1:7070"]},
        r"^cache\.peers: 'https://node1:7070' is not the address of a peer",
    ),
    (
        {"peers": "http://node1:7070 http://node2"},
        r"^cache\.peers: 'http://node2' is not the address of a peer",
    ),
    ({"peers": ["http://me:word@node1:7070"]}, r"^cache\.peers: .* is not the address of a peer"),
    ({"peers": ["http://node1:port"]}, r"^cache\.peers: .* is not the address of a peer"),
    ({"peers": 7070}, r"^cache\.peers: .*\(got 7070\)\.$"),
    ({"advertise": "node1:7070"}, r"^cache\.advertise: 'node1:7070' is not the address of a peer"),
    ({"dir": "/scratch", "lower": "/scratch/x/.."}, r"cache\.lower is cache\.dir itself"),
    ({"retry": {"attempts": True}}, r"^cache\.retry\.attempts: True is not a whole number\.$"),
    ({"dir": 3}, r"^cache\.dir: .*\(got 3\)\.$"),
]


@pytest.mark.parametrize(("block", "words"), BAD, ids=[str(block) for block, _ in BAD])
def test_setting_that_cannot_be_used_is_named(
    tmp_path: Path, block: dict[str, Any], words: str
) -> None:
    """The key with its full path, the value, and what to write instead."""
    with pytest.raises(ConfigError, match=words):
        CacheConfig(**{"dir": tmp_path, **block})


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    """One line for each, so that the file is corrected in one go."""
    with pytest.raises(ConfigError) as caught:
        CacheConfig(dir=tmp_path, limit="lots", fetch={"engine": "boto", "concurrency": 0})
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "cache.limit",
        "cache.fetch.engine",
        "cache.fetch.concurrency",
    ]


def test_missing_directory_is_explained() -> None:
    """There is no default directory: it has to be on the node's own disk."""
    with pytest.raises(ConfigError, match=r"cache\.dir is missing.*node's own disk"):
        CacheConfig(limit="1 GiB")


def test_environment_variables_expand(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every string, with defaults, nested, and empty counts as not set."""
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)
    for text, path in [
        ("${SCRATCH}/zc", "/scratch/me/zc"),
        ("${UNSET:-/tmp}/zc", "/tmp/zc"),
        ("${EMPTY:-/tmp}/zc", "/tmp/zc"),
        ("${SCRATCH:-${UNSET}}/zc", "/scratch/me/zc"),
        ("${UNSET:-${EMPTY:-/var}/x}/${SCRATCH}", "/var/x/scratch/me"),
        ("$SCRATCH/zc", "/scratch/me/zc"),
        ("/tmp/zc-$SCRATCH.x", "/tmp/zc-/scratch/me.x"),
        ("${UNSET:-$SCRATCH}/zc", "/scratch/me/zc"),
        ("/a$$b/{c}/$1/$", "/a$b/{c}/$1/$"),
    ]:
        assert CacheConfig(dir=text).dir == Path(path), text
    assert CacheConfig(dir="/x", retry={"timeout": "${UNSET:-3 s}"}).retry.timeout == 3.0


def test_peers_are_a_list_or_what_a_job_script_has_put_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each once, in any case and with or without a slash at the end; a variable that is empty or
    not set is no peer.
    """
    two = ("http://node1:7070", "http://node2:7070")
    for written in (
        ["http://node1:7070", "http://node2:7070/", "http://NODE1:7070"],
        "http://node1:7070,http://node2:7070",
        " ".join(two),
        "${PEERS}",
    ):
        monkeypatch.setenv("PEERS", "http://node1:7070, http://node2:7070\n")
        assert CacheConfig(dir="/x", peers=written).peers == two, written
    for nothing in ([], None, "", "${UNSET:-}"):
        config = CacheConfig(
            dir="/x",
            peers=nothing,
            advertise="${UNSET:-}",
            lower="${UNSET:-}",
            peer_token_file=None,
        )
        assert (config.peers, config.advertise, config.lower, config.peer_token_file) == (
            (),
            None,
            None,
            None,
        )
    config = CacheConfig(
        dir="/x", advertise="http://[::1]:7070/", lower="~/lower", peer_token_file="~/token"
    )
    assert (config.advertise, config.lower, config.peer_token_file) == (
        "http://[::1]:7070",
        Path.home() / "lower",
        Path.home() / "token",
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("${UNSET}/zc", "UNSET, which is not set"),
        ("$UNSET/zc", r"UNSET, which is not set.*For a dollar sign itself write \$\$"),
        ("/scratch/zc-$UNSET", "UNSET, which is not set"),
        ("${UNSET:-/tmp", "not a variable"),
        ("${UNSET-x}", "not a variable"),
    ],
)
def test_variable_that_is_not_set_is_named(
    monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    """An unset variable must not become a directory called '${SCRATCH}'."""
    monkeypatch.delenv("UNSET", raising=False)
    with pytest.raises(ConfigError, match=words):
        CacheConfig(dir=text)


def test_zarrcache_dir_overrides_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file gives none, and where the file's variable is not set."""
    monkeypatch.setenv("ZARRCACHE_DIR", "/elsewhere")
    assert CacheConfig().dir == CacheConfig(dir="${UNSET}/x").dir == Path("/elsewhere")


def test_directory_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker with another working directory has to find the same cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert CacheConfig(dir="zc/../zc").dir == tmp_path / "zc"
    assert CacheConfig(dir="~/zc").dir == Path("/home/me/zc")
    with pytest.raises(ConfigError, match=r"cache\.dir: '~nosuchuser/zc' begins with ~, but this"):
        CacheConfig(dir="~nosuchuser/zc")


def test_settings_are_frozen_and_travel(tmp_path: Path) -> None:
    """Nothing changes under a running reader, and a worker has what its parent has."""
    config = CacheConfig(dir=tmp_path, min_free="3 %", fetch={"engine": "s3fs"})
    with pytest.raises(ValueError, match="frozen"):
        config.limit = 5  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.fetch.engine = "auto"  # type: ignore[misc]
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config
    assert type(copy.min_free) is Percent
    assert hash(RetryConfig()) == hash(RetryConfig())


def test_config_is_taken_as_it_is_or_made_of_a_mapping_or_namespace(tmp_path: Path) -> None:
    """Users' configs come as any of the three."""
    config = CacheConfig(dir=tmp_path)
    assert CacheConfig.of(config) is config
    assert (
        CacheConfig.of({"dir": tmp_path}) == CacheConfig.of(SimpleNamespace(dir=tmp_path)) == config
    )
    with pytest.raises(ConfigError, match="cache is None; it must be a mapping"):
        CacheConfig.of(None)  # type: ignore[arg-type]


def test_yaml_holds_a_cache_block_or_is_one(tmp_path: Path) -> None:
    """A training config and a file of its own read alike."""
    (tmp_path / "train.yaml").write_text(
        "dataset_name: zarr_s3_data\ncache: {dir: /scratch/zc, limit: 1 GiB, min_free: 5 %}\n"
    )
    (tmp_path / "cache.yaml").write_text("dir: /scratch/zc\nlimit: 1 GiB\nmin_free: 5 %\n")
    assert (
        CacheConfig.from_yaml(tmp_path / "train.yaml")
        == CacheConfig.from_yaml(tmp_path / "cache.yaml")
        == CacheConfig(dir="/scratch/zc", limit=GIB)
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read .*No such file"),
        ("a: [", r"is not YAML: (.|\n)* in the file, line 1, column 5"),
        ("caf\udce9: 1\n", "is not UTF-8"),
        ("- 1\n", "holds no keys"),
        ("", "holds no keys"),
        (
            "dir: /a\nlimit: 1 GiB\ndir: /b\n",
            "the key 'dir' is in line 1 and again in line 3. Remove one",
        ),
        (
            "data_dir: a\ncache:\n  dir: /a\n  fetch: {memory: 1 GiB, memory: 2 GiB}\n",
            "the key 'memory' is in line 4 and again in line 4",
        ),
    ],
)
def test_an_invalid_config_file_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    """Path and reason, for whichever of the two kinds of config it should have been."""
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    for cls in (CacheConfig, DataConfig):
        with pytest.raises(ConfigError, match=words) as caught:
            cls.from_yaml(path)
        assert str(path) in str(caught.value)


def test_yaml_merge_keys_may_be_overridden(tmp_path: Path) -> None:
    """``<<`` takes another block's keys, which the block then replaces."""
    path = tmp_path / "c.yaml"
    path.write_text("base: &b {dir: /a, limit: 1 GiB}\ncache:\n  <<: *b\n  limit: 2 GiB\n")
    assert CacheConfig.from_yaml(path) == CacheConfig(dir="/a", limit="2 GiB")


DATA = {
    "data_dir": "s3://b/input",
    "label_dir": Path("/label"),
    "map_dir": "m.json",
    "functional": "GGA",
}


def test_training_keys_are_read_and_the_others_left_alone() -> None:
    """The file belongs to the training; we know our keys of it."""
    config = DataConfig(**DATA, learning_rate=1e-3, model={"depth": 3}, cache={"dir": "/scratch"})
    assert (config.label_dir, config.density_type, config.train_fraction, config.random_state) == (
        "/label",
        "total",
        0.8,
        42,
    )
    assert config.cache == CacheConfig(dir="/scratch")
    assert DataConfig.of(SimpleNamespace(**DATA)) == DataConfig.of(DATA)
    assert DataConfig.of(config) is config


NOT_AN_ARRAY = (
    "is not the name of an array. Write total, diff, or the name of another array of the stores, "
    "without blanks"
)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train_fraction", 1.5, "train_fraction: 1.5 is not a share of the materials. Write a num"),
        ("train_fraction", "most", "train_fraction: 'most' is not a share of the materials."),
        ("train_fraction", 1, "train_fraction: 1 may mean all materials or one. Write 1.0"),
        ("train_fraction", "1", "train_fraction: 1 may mean all materials or one. Write 1.0"),
        ("train_fraction", 0, "train_fraction: 0 is not a share"),
        ("train_fraction", True, "train_fraction: True is not a share"),
        ("train_fraction", float("nan"), "train_fraction: nan is not a share"),
        ("train_fraction", [0.8, 0.2], "train_fraction: [0.8, 0.2] is not a share"),
        (
            "density_type",
            "Total",
            "density_type: 'Total' looks like a misspelt 'total'; correct it.",
        ),
        ("density_type", ["total", "dif"], "density_type: 'dif' looks like a misspelt 'diff';"),
        ("density_type", 1, f"density_type: 1 {NOT_AN_ARRAY}."),
        ("density_type", "../x", f"density_type: '../x' {NOT_AN_ARRAY}."),
        ("density_type", "spin density", f"density_type: 'spin density' {NOT_AN_ARRAY}."),
        ("density_type", "", f"density_type: '' {NOT_AN_ARRAY}."),
        ("density_type", ["total", None], f"density_type: None {NOT_AN_ARRAY}."),
        ("density_type", [], "density_type: an empty list; give at least one name, such as total."),
        (
            "density_type",
            ["diff", "charge_density_diff"],
            "density_type: ['diff', 'charge_density_diff'] names an array twice; name each once.",
        ),
        (
            "density_type",
            {"label": "diff"},
            "density_type: {'label': 'diff'} has to have the keys data and label, and no other.",
        ),
        ("missing", "zeros", "missing: has to be 'error', 'zero' or 'drop' (got 'zeros')."),
        ("random_state", -1, "random_state: has to be at least 0 (got -1)."),
        ("random_state", True, "random_state: True is not a whole number."),
        ("random_state", "x", "random_state: has to be a whole number (got 'x')."),
        ("normalize_data", "perhaps", "normalize_data: 'perhaps' is not one of true,"),
        ("functional", 3, "functional: has to be text (got 3)."),
        ("functional", None, "functional: has to be text (got None)."),
        ("s3_kwargs", "secret", "s3_kwargs: has to be keys and values."),
    ],
)
def test_training_key_that_cannot_be_used_is_named(key: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DataConfig(**{**DATA, key: value})
    assert str(caught.value).startswith(words)
    assert len(str(caught.value).splitlines()) == 1


def test_numbers_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARE", "0.5")
    monkeypatch.setenv("COUNT", "3000")
    assert DataConfig(**DATA, train_fraction="${SHARE}").train_fraction == 0.5
    count = DataConfig(**DATA, train_fraction="$COUNT", random_state="$COUNT")
    assert (count.train_fraction, count.random_state) == (3000, 3000)
    assert type(count.train_fraction) is int


def test_dollar_sign_of_a_secret_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable in s3_kwargs needs braces."""
    monkeypatch.setenv("SECRET", "ab$$c$SECRET")
    kwargs = {"key": "k$SECRET$$", "secret": "${SECRET}"}
    assert DataConfig(**DATA, s3_kwargs=kwargs).s3_kwargs == {
        "key": "k$SECRET$$",
        "secret": "ab$$c$SECRET",
    }


MISSPELT = {
    "cach": "cache",
    "Cache": "cache",
    "cahce": "cache",
    "trian_fraction": "train_fraction",
    "train-fraction": "train_fraction",
    "normalise_data": "normalize_data",
    "densty_type": "density_type",
    "sorce": "source",
    "random_sate": "random_state",
    "splitfile": "split_file",
    "s3_kwarg": "s3_kwargs",
}


@pytest.mark.parametrize(("key", "meant"), MISSPELT.items())
def test_misspelt_key_is_an_error_that_names_both(key: str, meant: str) -> None:
    """It would silently not be used."""
    words = rf"^{key} is not a setting\. Did you mean '{meant}'\? If it is a key of your own, give"
    with pytest.raises(ConfigError, match=words):
        DataConfig(**DATA, **{key: None})
    given = DataConfig(**DATA).model_dump(include={meant})
    DataConfig(**DATA, **{key: None}, **given)


def test_misspelt_required_key_is_named_as_such() -> None:
    keys = {**DATA, "label_dri": DATA["label_dir"], "mapdir": DATA["map_dir"]}
    del keys["label_dir"], keys["map_dir"]
    with pytest.raises(
        ConfigError, match=r"(?s)^label_dri is .*'label_dir'.*\nmapdir is .*'map_dir'"
    ):
        DataConfig(**keys)


OF_THE_TRAINING = (
    "batch_size num_workers model seed random_seed normalize nbatch data_augmentation epochs lr "
    "data_precision resources cache_dir dataset val_frac val_data_dir data_name test_fraction "
    "save_dir log_dir output_dir function loss_function train_dir splits callbacks trainer "
    "datamodule"
).split()


def test_keys_of_the_training_are_accepted() -> None:
    """So are the older names of our keys."""
    DataConfig(**DATA, **dict.fromkeys(OF_THE_TRAINING, 1))
    LoaderConfig(**DATA, **dict.fromkeys(OF_THE_TRAINING))
    older = {"data_path": "a", "label_path": "b", "map_path": "c", "functional": "GGA"}
    assert DataConfig.of(older).map_dir == "c"


def test_key_similar_to_a_setting_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    DataConfig(**DATA, cache_dir="/scratch", normalize=False, hue=1)
    assert [record.message for record in caplog.records] == [
        "the config has the key 'cache_dir'; if it is meant for zarrcache, did you mean 'cache'?",
        (
            "the config has the key 'normalize'; if it is meant for zarrcache, did you mean "
            "'normalize_data'?"
        ),
    ]


@pytest.mark.parametrize("key", ["batchsize", "train_worker", "dropp_last"])
def test_misspelt_key_of_a_loader_is_an_error(key: str) -> None:
    """Of a data module, which would use its default; to other trainings it may be a key."""
    with pytest.raises(ConfigError, match=f"^{key} is not a setting. Did you mean"):
        LoaderConfig(**DATA, **{key: 1})
    DataConfig(**DATA, **{key: 1})


@pytest.mark.parametrize(
    ("name", "meant"),
    [("zarr_s3_dta", "zarr_s3_data"), ("chgcar", "chgcar_data"), ("chgcars", "chgcar_data")],
)
def test_misspelt_loader_is_a_warning(
    caplog: pytest.LogCaptureFixture, name: str, meant: str
) -> None:
    """Not an error: a module that registers the loader may be imported later."""
    DataConfig(**DATA, dataset_name=name)
    assert f"dataset_name is {name!r}; did you mean {meant!r}? get_dataset refuses" in caplog.text


@pytest.mark.parametrize("name", ["my_loader", "my_data", "mine", "mp_data"])
def test_a_loader_of_the_user_is_no_misspelling(
    caplog: pytest.LogCaptureFixture, name: str
) -> None:
    DataConfig(**DATA, dataset_name=name)
    assert not caplog.text


def test_missing_training_key_is_named() -> None:
    """All of them."""
    with pytest.raises(
        ConfigError, match=r"^label_dir is missing\. Give .*\nfunctional is missing\. Give .*GGA\.$"
    ):
        DataConfig(data_dir="x", map_dir="y")


def test_bad_cache_block_of_a_training_config_is_named() -> None:
    """With the same words as on its own."""
    with pytest.raises(ConfigError, match=r"^cache\.limitt is not a setting"):
        DataConfig(**DATA, cache={"dir": "/scratch", "limitt": 1})


@pytest.mark.parametrize(
    "s3_kwargs",
    [{"secret": "hunter2${x y"}, {"secret": "hunter2${NOT_SET_ANYWHERE}"}, "secret=hunter2"],
)
def test_a_secret_is_in_no_message(s3_kwargs: object) -> None:
    """Messages end in logs that others read."""
    with pytest.raises(ConfigError, match="s3_kwargs") as caught:
        DataConfig(data_dir="a", label_dir="b", map_dir="c", functional="GGA", s3_kwargs=s3_kwargs)
    assert "hunter2" not in str(caught.value)


def test_a_secret_is_in_no_repr() -> None:
    """A config is printed in notebooks."""
    config = DataConfig(
        data_dir="a",
        label_dir="b",
        map_dir="c",
        functional="GGA",
        s3_kwargs={"key": "k", "secret": "hunter2"},
    )
    assert config.s3_kwargs is not None
    assert "hunter2" not in repr(config) + str(config)
