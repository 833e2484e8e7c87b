"""Two processes over one cache against a model: whatever is read, dropped, rewritten, damaged,
killed or lost, no value is wrong.

The model is a dictionary of versions. It shares no helper with the code; the processes are driven
over pipes (tests/support/cacheprocess.py).
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from numpy.typing import NDArray

from tests.support.cachedirs import on_disk_bytes, payload_files
from tests.support.cacheprocess import CacheProcess, Killed
from tests.support.damage import damage
from tests.support.stores import small_group

KEYS = [(task_id, role) for task_id in ("mp-0", "mp-1") for role in ("data", "label")]
VERSIONS = 5
SHAPE = (14, 10, 8)
#: Room for three of the four densities, both listings and a few chunks.
LIMIT = 3 * 12288 + 2 * 8192 + 4 * 4096

WHICH, KEY, SEED = st.integers(0, 1), st.sampled_from(KEYS), st.integers(0, 2**20)
BLOCK = st.fixed_dictionaries(
    {
        "revalidate": st.sampled_from(["never", "never", "epoch"]),
        "verify": st.sampled_from(["first", "always"]),
        "eviction": st.sampled_from(["none", "least-recently-stored"]),
    }
)
HOW = st.sampled_from([{}, {"target_bytes": 30_000}, {"older_than_s": 86400.0}])

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

_templates: dict[tuple[tuple[str, str], int], tuple[Path, NDArray[Any]]] = {}
_processes: list[CacheProcess] = []
#: Where the node is, each time the same: digests, and with them which file a choice falls on, have
#: the directory's name in them. Else what fails once might not fail when hypothesis repeats it.
_node: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def machinery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every version of every store, written once, and the two processes."""
    root = tmp_path_factory.mktemp("versions")
    for number, key in enumerate(KEYS):
        for version in range(VERSIONS):
            path = root / f"{number}-{version}.zarr"
            values = small_group(path, shape=SHAPE, chunks=(7, 5, 8), seed=10 * number + version)[
                "charge_density_total"
            ]
            _templates[key, version] = path, values
    logging.disable(logging.CRITICAL)  # thousands of lines, one per purge
    _processes.extend(CacheProcess() for _ in range(2))
    _node.append(root / "node")
    yield
    logging.disable(logging.NOTSET)
    for process in _processes:
        process.end()
    _processes.clear()
    _templates.clear()
    _node.clear()


class NodeMachine(RuleBasedStateMachine):
    """State of each density: the origin's version, and the versions that the cache may hold."""

    def __init__(self) -> None:
        super().__init__()
        (self.directory,) = _node
        self.directory.mkdir()
        self.versions = dict.fromkeys(KEYS, 0)
        self.held: dict[tuple[str, str], set[int]] = {key: set() for key in KEYS}
        self.blocks: list[dict[str, Any]] = [{}, {}]
        #: Damage was done: until `verify`, there may be files without a row.
        self.is_damaged = False

    @initialize(blocks=st.tuples(BLOCK, BLOCK))
    def begin(self, blocks: tuple[dict[str, Any], dict[str, Any]]) -> None:
        for key in KEYS:
            self._write(key)
        (self.directory / "map.json").write_text(
            json.dumps({"GGA": sorted({task_id for task_id, _ in KEYS})})
        )
        for which, block in enumerate(blocks):
            self.reopen(which, block)
            self._do(which, "clock", 0.0)

    def teardown(self) -> None:
        # hypothesis reports it only if it is reproduced
        if isinstance(error := sys.exc_info()[1], (Exception, pytest.fail.Exception)):
            traceback.print_exception(error)
        shutil.rmtree(self.directory)

    # -- rules: the origin

    def _write(self, key: tuple[str, str]) -> None:
        """Write a new version with an old time stamp, or it would be listed twice."""
        source, _ = _templates[key, self.versions[key] % VERSIONS]
        target = self.directory / key[1] / f"{key[0]}.zarr"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        for path in target.rglob("*"):
            os.utime(path, (1.6e9 + self.versions[key], 1.6e9 + self.versions[key]))

    def _values(self, key: tuple[str, str], version: int) -> NDArray[Any]:
        return _templates[key, version % VERSIONS][1]

    def _do(self, which: int, name: str, *args: Any) -> Any:
        return _processes[which].do(name, *args)

    def _known(self, which: int) -> None:
        """Entries without a row are not held any more, and no unknown entry may appear."""
        stored = self._do(which, "stored")
        for key in KEYS:
            if key not in stored:
                self.held[key].clear()
            else:
                assert self.held[key], f"{key} is stored, and was never read"

    def _restart(self, which: int) -> None:
        _processes[which].kill()
        self.reopen(which, self.blocks[which])

    # -- rules: operations of the processes

    @rule(which=WHICH, key=KEY)
    def load(self, which: int, key: tuple[str, str]) -> None:
        values = self._do(which, "load", *key)
        allowed = (
            {self.versions[key]}
            if self.blocks[which]["revalidate"] == "epoch"
            else {self.versions[key], *self.held[key]}
        )
        found = [
            version
            for version in allowed
            if np.array_equal(values, self._values(key, version).ravel())
        ]
        assert found, f"{key} is neither of {allowed}"
        self.held[key] = {*found}
        self._known(which)

    @rule(which=WHICH, key=KEY)
    def ensure(self, which: int, key: tuple[str, str]) -> None:
        self._do(which, "ensure", *key)
        self.held[key] = {self.versions[key]}
        self._known(which)

    @rule(which=WHICH, key=KEY)
    def crop(self, which: int, key: tuple[str, str]) -> None:
        """Of one version, or an error that names the change; never of two."""
        values = self._do(which, "crop", *key)
        if values is None:
            assert self.versions[key] > 0
            return
        allowed = range(max(0, self.versions[key] - VERSIONS + 1), self.versions[key] + 1)
        assert any(
            np.array_equal(values, self._values(key, version)[1:5, 1:3, :3]) for version in allowed
        )

    @rule(which=WHICH, key=KEY)
    def drop(self, which: int, key: tuple[str, str]) -> None:
        self._do(which, "drop", *key)
        self.held[key].clear()
        self._known(which)

    @rule(which=WHICH, how=HOW)
    def evict(self, which: int, how: dict[str, Any]) -> None:
        self._do(which, "evict", how)
        self._known(which)

    @rule(which=WHICH, block=BLOCK)
    def reopen(self, which: int, block: dict[str, Any]) -> None:
        self.blocks[which] = block
        self._do(which, "open", self.directory, {**block, "limit": LIMIT})

    @rule(which=WHICH, days=st.sampled_from([-400, -1, 0, 2, 40]))
    def move_clock(self, which: int, days: int) -> None:
        self._do(which, "clock", 86400.0 * days)

    @rule(which=WHICH)
    def verify(self, which: int) -> None:
        self._do(which, "verify")
        self.is_damaged = False
        # the index may have been replaced, which a process notices at its next write
        for process in range(2):
            self.reopen(process, self.blocks[process])
            self._known(process)

    # -- rules: faults

    @rule(key=KEY)
    def overwrite_origin(self, key: tuple[str, str]) -> None:
        self.versions[key] += 1
        self._write(key)

    @rule(
        which=WHICH,
        key=KEY,
        action=st.sampled_from(["load", "ensure", "crop", "drop", "evict"]),
        step=st.integers(1, 60),
    )
    def kill(self, which: int, key: tuple[str, str], action: str, step: int) -> None:
        """During an operation; the next opening cleans up."""
        self._do(which, "die", step)
        try:
            self._do(which, action, *([{}] if action == "evict" else key))
        except Killed:
            self.reopen(which, self.blocks[which])
        else:
            self._restart(which)
        self.held[key].add(self.versions[key])
        self._known(which)

    @rule(choice=SEED, delete=st.booleans())
    def corrupt(self, choice: int, delete: bool) -> None:
        """Damage a file of either tier. A process verifies an entry once per run, so both start a
        new run.
        """
        files = payload_files(self.directory)
        if files:
            self.is_damaged = True
            chance = random.Random(choice)
            path = chance.choice(files)
            if delete:
                path.unlink()
            else:
                damage(path, chance)
            for which in range(2):
                self.reopen(which, self.blocks[which])

    @rule(choice=SEED, how=st.sampled_from(["damage", "delete", "empty"]))
    def lose_the_index(self, choice: int, how: str) -> None:
        index = self.directory / "cache" / "zarrcache-v1" / "cache.db"
        if index.exists():
            self.is_damaged = True
            for process in _processes:
                process.kill()
            if how == "damage" and index.stat().st_size:
                damage(index, random.Random(choice))
            elif how == "empty":
                index.write_bytes(b"")
            else:
                for path in index.parent.glob("cache.db*"):
                    path.unlink()
            for which in range(2):
                self.reopen(which, self.blocks[which])

    # -- invariants

    @invariant()
    def what_lies_there_is_what_the_index_says(self) -> None:
        if self.blocks[0] and not self.is_damaged:
            for which in range(2):
                volume_bytes, names = self._do(which, "index")
                root = self.directory / "cache" / "zarrcache-v1"
                assert {
                    str(path.relative_to(root)) for path in payload_files(self.directory)
                } == names
                assert volume_bytes == on_disk_bytes(self.directory) <= LIMIT

    @invariant()
    def nothing_is_a_fault_unless_something_was_damaged(self) -> None:
        if self.blocks[0] and not self.is_damaged:
            assert [self._do(which, "faults") for which in range(2)] == [(0, 0)] * 2


# Not the 300 s of other tests: that is within reach of a busy machine, and a test that is stopped
# in the middle looks to hypothesis like a failure that does not come again ("The second run drew
# more data"). A hang is told after two minutes, by the process that does not answer.
@pytest.mark.timeout(3600)
class TestNode(NodeMachine.TestCase):  # type: ignore[name-defined, misc]
    settings = hypothesis_settings(max_examples=10, stateful_step_count=30, deadline=None)


@pytest.mark.slow
@pytest.mark.timeout(3600)
class TestNodeLong(NodeMachine.TestCase):  # type: ignore[name-defined, misc]
    settings = hypothesis_settings(max_examples=400, stateful_step_count=50, deadline=None)
