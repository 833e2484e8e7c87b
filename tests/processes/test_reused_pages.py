"""Samples in memory that workers use again: always the right values, and nothing left behind.

The danger is memory that is used again too early, so most tests keep samples, here or in another
process, while workers go on, and compare them afterwards.
"""

from __future__ import annotations

import copy
import gc
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from tests.processes.test_worker_transfer import DEADLINE_S, assert_same, loader_of, pairs_of
from zarrcache import ZarrDataset, ZarrS3Reader, collate

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.skipif(sys.platform != "linux", reason="memfd and /proc are Linux's"),
]

ROOT = Path(__file__).resolve().parents[2]
IDS = [f"mp-{i}" for i in range(8)]
SHAPE = (12, 10, 16)


@pytest.fixture
def reader(
    tmp_path: Path, small_group: Callable[..., Any], make_reader: Callable[..., ZarrS3Reader]
) -> ZarrS3Reader:
    """Eight materials of one shape, warm."""
    for role, i in itertools.product(("data", "label"), range(len(IDS))):
        small_group(f"{role}/{IDS[i]}.zarr", shape=SHAPE, seed=i + 20 * (role == "label"))
    (tmp_path / "map.json").write_text(json.dumps({"GGA": IDS}))
    made = make_reader(cache={}, train_fraction=4)
    for task_id, role in itertools.product(IDS, ("data", "label")):
        made.ensure(task_id, role)  # type: ignore[arg-type]
    return made


def is_in_used_pages(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory in this process maps the file of a worker, by /proc/self/maps."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            fields = line.split()
            start, stop = (int(part, 16) for part in fields[0].split("-"))
            if start <= tensor.data_ptr() < stop:
                return "memfd:zarrcache" in line
    return False


def half(reader: ZarrS3Reader, **options: Any) -> ZarrDataset:
    """Every second point: samples with values of their own that do not depend on chance."""
    return ZarrDataset(reader, "all", downsample_data=2, downsample_label=2, **options)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_the_second_epoch_of_a_worker_arrives_in_its_pages(
    reader: ZarrS3Reader, method: str
) -> None:
    dataset = half(reader)
    wanted = pairs_of(dataset)
    loader = loader_of(
        dataset, num_workers=1, multiprocessing_context=method, persistent_workers=True
    )
    assert_same(list(loader), wanted)
    second = list(loader)
    assert_same(second, wanted)
    assert all(is_in_used_pages(sample[side]) for sample in second for side in ("data", "label"))


def test_rotated_samples_arrive_in_the_pages_of_workers(reader: ZarrS3Reader) -> None:
    """90 % of them; the others are maps of their entries."""
    loader = loader_of(
        ZarrDataset(reader, "all", augmentation=True), num_workers=1, persistent_workers=True
    )
    plain = pairs_of(ZarrDataset(reader, "all"))
    list(loader)
    in_pages = []
    for got, wanted in zip(loader, plain, strict=True):
        in_pages.append(is_in_used_pages(got["data"]))
        turned = [
            np.rot90(wanted["data"][0].numpy(), k, axes)
            for k, axes in itertools.product(range(4), ((0, 1), (0, 2), (1, 2)))
        ]
        assert any(np.array_equal(got["data"][0].numpy(), grid) for grid in turned)
    assert any(in_pages)


@pytest.mark.parametrize("settings", [{}, {"precision": "f16"}, {"precision": "bf16"}], ids=str)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_batches_arrive_right(
    reader: ZarrS3Reader, batch_size: int, settings: dict[str, Any]
) -> None:
    """The next batch is asked for before the last one is compared."""
    dataset = half(reader, **settings)
    loader = DataLoader(
        dataset, batch_size, num_workers=2, persistent_workers=True, timeout=DEADLINE_S
    )
    wanted = list(DataLoader(dataset, batch_size))
    for _ in range(3):
        last = None
        for number, batch in enumerate(loader):
            if last is not None:
                assert_same(last, wanted[number - 1])
            last = batch
        assert_same(last, wanted[-1])


def test_a_consumer_keeps_a_thousand_samples(reader: ZarrS3Reader) -> None:
    """With few file descriptors, of which torch needs one for each tensor."""
    dataset = half(reader)
    wanted = pairs_of(dataset)
    loader = loader_of(dataset, persistent_workers=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 64, hard))
    try:
        kept = list(itertools.chain.from_iterable(loader for _ in range(126)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(kept) > 1000
    for number, sample in enumerate(kept):
        assert_same(sample, wanted[number % len(wanted)])


def test_kept_samples_keep_their_values_while_workers_go_on(reader: ZarrS3Reader) -> None:
    """Every third one is kept, the others are let go at once."""
    dataset = half(reader)
    wanted = pairs_of(dataset)
    loader = loader_of(dataset, persistent_workers=True, prefetch_factor=4)
    kept = []
    for _ in range(20):
        for number, sample in enumerate(loader):
            if number % 3 == 0:
                kept.append((number, sample))
            del sample
    for number, sample in kept:
        assert_same(sample, wanted[number])


def test_a_view_keeps_the_memory(reader: ZarrS3Reader) -> None:
    """Of torch or numpy, of a part of a sample."""
    dataset = half(reader)
    wanted = copy.deepcopy(pairs_of(dataset))
    loader = loader_of(dataset, num_workers=1, persistent_workers=True)
    list(loader)
    views = [(s["data"][0, 1:], s["label"].numpy()[0, :, 2]) for s in loader]
    for _ in range(4):
        list(loader)
    for (data, label), sample in zip(views, wanted, strict=True):
        assert torch.equal(data, sample["data"][0, 1:])
        assert np.array_equal(label, sample["label"].numpy()[0, :, 2])


class Remembering(Dataset[Any]):
    """Keeps samples in the worker, as many wrappers do."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.known = dataset, {}  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        if i not in self.known:
            self.known[i] = self.dataset[i]
        return self.known[i]


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_work_in_place_stays_in_the_training_process(
    reader: ZarrS3Reader, batch_size: int | None
) -> None:
    """A worker that keeps its samples sends the same values again."""
    dataset = half(reader)
    wanted = copy.deepcopy(list(DataLoader(dataset, batch_size)))
    loader = loader_of(
        Remembering(dataset), batch_size=batch_size, num_workers=1, persistent_workers=True
    )
    for _ in range(4):
        for batch, right in zip(loader, wanted, strict=True):
            assert_same(batch, right)
            batch["data"].zero_()
            batch["label"].add_(1)


def test_a_process_forked_from_the_training_keeps_its_values(reader: ZarrS3Reader) -> None:
    """It holds a batch that the training process lets go of; workers do not use that memory."""
    dataset = half(reader)
    wanted = copy.deepcopy(pairs_of(dataset))
    loader = loader_of(dataset, num_workers=1, persistent_workers=True)
    list(loader)
    sample = next(iter(loader))
    assert is_in_used_pages(sample["data"])
    go_on, compare = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(go_on, 1)
        is_same = all(torch.equal(sample[side], wanted[0][side]) for side in ("data", "label"))
        os._exit(0 if is_same else 1)
    del sample
    for _ in range(3):
        assert_same(list(loader), wanted)
    os.write(compare, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    # and workers are as fast as before: the next samples are in pages again
    assert is_in_used_pages(list(loader)[-1]["data"])


class Forking(Dataset[Any]):
    """Starts a process in the worker that looks at a sample later."""

    def __init__(self, dataset: Any, directory: Path) -> None:
        self.dataset, self.directory = dataset, directory

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        sample = self.dataset[i]
        if i == 2 and not (self.directory / "pid").exists():
            before = sample["data"].clone()
            pid = os.fork()
            if pid == 0:
                while not (self.directory / "go").exists():
                    time.sleep(0.01)
                is_same = torch.equal(before, sample["data"])
                (self.directory / "said").write_text("same" if is_same else "changed")
                os._exit(0)
            (self.directory / "pid").write_text(str(pid))
        return sample


def test_a_process_forked_from_a_worker_keeps_its_values(
    reader: ZarrS3Reader, tmp_path: Path
) -> None:
    dataset = half(reader)
    wanted = pairs_of(dataset)
    loader = loader_of(Forking(dataset, tmp_path), num_workers=1, persistent_workers=True)
    for _ in range(4):
        assert_same(list(loader), wanted)
    (tmp_path / "go").touch()
    deadline = time.monotonic() + DEADLINE_S
    while not (said := tmp_path / "said").exists() or not said.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert said.read_text() == "same"


def test_several_loaders_at_once(reader: ZarrS3Reader) -> None:
    """Of one dataset and of two, in turns, with more workers than one each."""
    datasets = [half(reader), half(reader, precision="bf16")]
    wanted = [pairs_of(dataset) for dataset in datasets]
    loaders = [(loader_of(datasets[k], persistent_workers=True), wanted[k]) for k in (0, 1, 0)]
    for _ in range(3):
        for samples in zip(*(loader for loader, _ in loaders), range(8), strict=True):
            for (_, right), sample in zip(loaders, samples, strict=False):
                assert_same(sample, right[samples[-1]])


def test_an_epoch_that_is_broken_off_leaves_the_next_one_right(reader: ZarrS3Reader) -> None:
    """Samples on their way are dropped; their memory comes back."""
    dataset = half(reader)
    wanted = pairs_of(dataset)
    loader = loader_of(dataset, persistent_workers=True, prefetch_factor=3)
    for n in (1, 3, 2, 5, 8):
        for number, sample in zip(range(n), loader, strict=False):
            assert_same(sample, wanted[number])


def nested(batch: list[Any]) -> Any:
    """A user's collate function with structure of its own."""
    collated = default_collate(batch)
    return {"pair": [(collated["data"], collated["label"])], "raw": batch, "one": collate(batch)}


def test_nested_collate_functions(reader: ZarrS3Reader) -> None:
    """The same sample in three places of a batch."""
    dataset = half(reader)
    for batch_size in (1, 2):
        loader = DataLoader(
            dataset, batch_size, num_workers=1, collate_fn=nested, persistent_workers=True
        )
        wanted = list(DataLoader(dataset, batch_size, collate_fn=nested))
        for _ in range(3):
            assert_same(list(loader), wanted)


def logarithm(sample: dict[str, Any]) -> dict[str, Any]:
    """New tensors, a numpy array, a view, a scalar and a tensor without values."""
    data = sample["data"]
    return {
        **sample,
        "data": torch.log1p(data.abs()),
        "array": data.numpy() * 2,
        "part": data[..., 1:3],
        "turned": data.transpose(1, 3),
        "count": torch.tensor(data.numel()),
        "nothing": data[:, :0],
        # Its points share memory, and it extends over as many as it has.
        "repeated": data.reshape(-1)[:6:3].expand(2, 2),
        "mask": data > 0.5,
        "complex": torch.complex(data, data).conj(),
    }


def test_what_a_transform_makes_arrives_in_pages(reader: ZarrS3Reader) -> None:
    dataset = ZarrDataset(reader, "all", transform=logarithm)
    loader = loader_of(dataset, num_workers=1, persistent_workers=True)
    wanted = pairs_of(dataset)
    for _ in range(2):
        got = list(loader)
        for sample, right in zip(got, wanted, strict=True):
            right["array"] = torch.from_numpy(np.asarray(right["array"]))
            assert_same(sample, right)
    assert all(is_in_used_pages(got[-1][name]) for name in ("data", "part", "mask", "turned"))


def test_a_killed_worker_leaves_the_samples_that_arrived(reader: ZarrS3Reader) -> None:
    """And the loader says so."""
    dataset = half(reader)
    wanted = pairs_of(dataset)
    loader = DataLoader(dataset, None, num_workers=1, persistent_workers=True)
    list(loader)
    kept = list(loader)
    arriving = iter(loader)
    (worker,) = arriving._workers  # the children of other tests of this process are not it
    worker.kill()
    worker.join()
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(arriving)
    assert_same(kept, wanted)


def maps_of_workers() -> int:
    with open("/proc/self/maps") as maps:
        return sum("memfd:zarrcache" in line for line in maps)


def test_memory_of_ended_workers_is_given_back(reader: ZarrS3Reader) -> None:
    """But for the samples that are kept."""
    gc.collect()
    of_earlier_tests = maps_of_workers()
    dataset = half(reader)
    for _ in range(2):
        loader = loader_of(dataset)
        kept = list(loader)
        assert maps_of_workers() > of_earlier_tests
        del loader
    assert_same(kept, pairs_of(dataset))
    del kept
    gc.collect()
    assert maps_of_workers() <= of_earlier_tests


SCRIPT = """
import sys
from torch.utils.data import DataLoader
from zarrcache import ZarrDataset, ZarrS3Reader
import numpy as np

class Reader:
    def split_task_ids(self):
        return [f"{i}" for i in range(8)], []
    def load(self, task_id, role):
        return np.full(64**3, float(task_id), np.float32), (64, 64, 64)

if __name__ == "__main__":
    dataset = ZarrDataset(Reader(), "train", augmentation=True)
    loader = DataLoader(dataset, None, num_workers=2, persistent_workers=True)
    kept = []
    for epoch in range(int(sys.argv[1])):
        for number, sample in enumerate(loader):
            assert (sample["data"] == number).all() and (sample["label"] == number).all()
            kept = [*kept[-3:], sample]
            print(epoch, number, flush=True)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


@pytest.mark.parametrize("lines", [3, 40])
def test_nothing_is_left_when_the_training_is_killed(script: Path, lines: int) -> None:
    """SIGKILL, early and later: its workers end, and their memory with them."""
    training = subprocess.Popen(
        [sys.executable, script, "1000"], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert training.stdout is not None
    for _ in range(lines):
        assert training.stdout.readline()
    with open(f"/proc/{training.pid}/task/{training.pid}/children") as children:
        workers = [int(pid) for pid in children.read().split()]
    assert len(workers) == 2
    training.kill()
    training.communicate()
    deadline = time.monotonic() + DEADLINE_S
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    names = [f"torch_{pid}_" for pid in (training.pid, *workers)]
    assert [file for file in os.listdir("/dev/shm") if file.startswith(tuple(names))] == []


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_samples_arrive_where_dev_shm_is_tiny() -> None:
    """As in a container, where torch's own transfer ends in a bus error."""
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    options = [] if os.geteuid() == 0 else ["--map-root-user"]
    if subprocess.run(["unshare", "--mount", *options, "sh", "-c", mount], check=False).returncode:
        pytest.skip("this system does not let this user mount a file system in a namespace")
    done = subprocess.run(
        [
            *("unshare", "--mount", *options, "sh", "-c", f'{mount} && exec "$@"', "sh"),
            *(sys.executable, "-c", SCRIPT, "4"),  # a file may lie below /dev/shm
        ],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "3 7"


def test_where_the_training_may_not_open_the_pages_torch_sends(
    reader: ZarrS3Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system may not let a process look into /proc of another one."""
    monkeypatch.setattr("zarrcache._pages._can_share", lambda: False)
    dataset = half(reader)
    wanted = pairs_of(dataset)
    loader = loader_of(dataset, num_workers=1, persistent_workers=True)
    for _ in range(3):
        got = list(loader)
        assert_same(got, wanted)
    assert got[-1]["data"].is_shared()
