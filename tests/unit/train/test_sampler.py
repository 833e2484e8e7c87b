"""``NodeSampler`` in torch's DataLoader, and its state from one job to the next."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, DistributedSampler

from zarrcache.errors import ConfigError
from zarrcache.parallel.topology import World
from zarrcache.train.sampler import NodeSampler

NAMES = [f"mp-{number}" for number in range(24)]


def samplers(worlds: tuple[int, ...], **settings: Any) -> list[NodeSampler]:
    """One for each rank."""
    return [
        NodeSampler(NAMES, world=World(rank, worlds), seed=2, **settings)
        for rank in range(len(worlds))
    ]


def test_more_ranks_than_samples_with_drop_last_are_refused() -> None:
    """Each rank would read nothing, and the training would end at once, with success."""
    world = World(rank=0, node_of_rank=(0,) * 5)
    with pytest.raises(ConfigError, match="nothing to read of 4 samples for 5 ranks"):
        NodeSampler(["a", "b", "c", "d"], drop_last=True, world=world)
    assert len(NodeSampler(["a", "b", "c", "d"], world=world)) == 1


def test_it_feeds_a_dataloader_as_torchs_own_does() -> None:
    """The same number of samples per rank, with workers or without; ``set_epoch`` reorders."""
    sampler, theirs = samplers((0, 0, 1))[1], DistributedSampler(NAMES, num_replicas=3, rank=1)  # type: ignore[arg-type]
    assert len(sampler) == len(theirs) == 8
    loader = DataLoader(range(24), batch_size=3, sampler=sampler)  # type: ignore[arg-type]
    first = [int(index) for batch in loader for index in batch]
    assert first == list(sampler)
    assert len(loader) == 3
    sampler.set_epoch(1)
    assert list(sampler) != first


@pytest.mark.parametrize("assignment", ["global", "node"])
@pytest.mark.parametrize("others", [(0,), (0, 0, 1, 1), (0, 1, 2)])
def test_killed_and_resumed_with_other_ranks_every_sample_is_trained_on_once(
    assignment: Any, others: tuple[int, ...]
) -> None:
    """The state survives JSON; workers had read ahead of the training."""
    before = samplers((0, 1), assignment=assignment)
    trained: list[int] = []
    for sampler in before:
        sampler.set_epoch(3)
        asked = [index for index, _ in zip(sampler, range(9), strict=False)]
        trained += asked[:6]
    state = json.loads(json.dumps(before[0].state_dict(taken=6)))
    after = samplers(others, assignment=assignment)
    for sampler in after:
        sampler.load_state_dict(state)
        sampler.set_epoch(3)  # as Lightning does at the start of an epoch
        assert len(sampler) == 12 // len(others)
        trained += list(sampler)
    assert sorted(trained) == list(range(24))
    for sampler in after:
        sampler.set_epoch(4)
    assert sorted(index for sampler in after for index in sampler) == list(range(24))


def test_resumed_twice_in_one_epoch_nothing_is_lost() -> None:
    """A preemptible job may run for an hour at a time."""
    trained: list[int] = []
    state = None
    for ranks in (1, 2, 3):
        group = samplers((0,) * ranks)
        for sampler in group:
            if state is not None:
                sampler.load_state_dict(state)
            trained += list(sampler)[: 4 if ranks < 3 else None]
        state = group[-1].state_dict(taken=4)
    assert sorted(trained) == list(range(24))


def test_a_state_after_the_last_sample_is_the_start_of_the_next_epoch() -> None:
    (sampler,) = samplers((0,))
    assert len(list(sampler)) == 24
    (resumed,) = samplers((0,))
    resumed.load_state_dict(sampler.state_dict())
    assert (resumed.epoch, len(resumed)) == (1, 24)


@pytest.mark.parametrize("epoch", [0, 3])
def test_a_state_before_the_first_sample_is_the_start_of_that_epoch(epoch: int) -> None:
    """As a checkpoint before training has it; also of a sampler that was resumed or restarted."""
    fresh, begun, resumed = samplers((0,))[0], samplers((0,))[0], samplers((0,))[0]
    fresh.set_epoch(epoch)  # which changes nothing for the first epoch
    next(iter(begun))
    begun.set_epoch(epoch + 1)
    begun.set_epoch(epoch)
    state = json.loads(json.dumps(fresh.state_dict()))
    assert (state["epoch"], state["history"]) == (epoch, [])
    resumed.load_state_dict(state)
    assert begun.state_dict() == resumed.state_dict() == state
    iter_of = iter(begun)
    assert [next(iter_of), next(iter_of)] == list(resumed)[:2]
    assert begun.state_dict()["history"] == [{"node_of_rank": [0], "taken": 2}]
    assert begun.state_dict(taken=0) == state
    assert NodeSampler(NAMES).state_dict()["epoch"] == 0
    assert NodeSampler(NAMES).schedule.seed == 0


@pytest.mark.parametrize(
    "other",
    [
        lambda: NodeSampler(NAMES[1:], seed=2),
        lambda: NodeSampler(NAMES, seed=3),
        lambda: NodeSampler(NAMES, seed=2, assignment="node"),
        lambda: NodeSampler(NAMES, seed=2, drop_last=True),
    ],
)
def test_a_state_of_other_data_is_refused(other: Any) -> None:
    """The rest of that epoch cannot be computed."""
    with pytest.raises(
        ConfigError, match=r"^Cannot load sampler state: .* in the state and .* in this sampler"
    ):
        other().load_state_dict(samplers((0,))[0].state_dict())


def test_a_state_of_other_samples_names_the_settings_that_choose_samples() -> None:
    """The two hashes alone would say nothing."""
    with pytest.raises(
        ConfigError, match=r"data, split \(random_seed or split_file\) and functional"
    ):
        NodeSampler(NAMES[1:], seed=2).load_state_dict(samplers((0,))[0].state_dict())


@pytest.mark.parametrize("value", [-1, "x", 1.5, None, np.float64(1)])
def test_an_epoch_seed_or_count_that_is_not_a_whole_number_is_refused(value: Any) -> None:
    """The sampler is unchanged afterwards. ``taken=None`` is the default."""
    (sampler,) = samplers((0,))
    with pytest.raises(ConfigError, match=r"^epoch is .*; it has to be a whole number from 0"):
        sampler.set_epoch(value)
    with pytest.raises(ConfigError, match=r"^seed is .*; it has to be a whole number from 0"):
        NodeSampler(NAMES, seed=value)
    if value is not None:
        with pytest.raises(ConfigError, match=r"^taken is .*; it has to be a whole number from 0"):
            sampler.state_dict(taken=value)
    assert (sampler.epoch, len(sampler)) == (0, 24)


def test_integers_of_numpy_are_accepted_and_the_state_is_json() -> None:
    sampler = NodeSampler(NAMES, seed=np.int64(2), world=World(0, (0,)))  # type: ignore[arg-type]
    sampler.set_epoch(np.int64(3))  # type: ignore[arg-type]
    state = json.loads(json.dumps(sampler.state_dict(taken=np.int64(6))))  # type: ignore[arg-type]
    (resumed,) = samplers((0,))
    resumed.load_state_dict(state)
    assert (resumed.epoch, len(resumed)) == (3, 18)


def test_more_taken_than_there_is_ends_the_epoch() -> None:
    """The last batch may be short, so batches times their size is more."""
    assert samplers((0,))[0].state_dict(taken=25)["epoch"] == 1


def started(*segments: Any) -> dict[str, Any]:
    """A state with this history."""
    return {**samplers((0,))[0].state_dict(), "history": list(segments)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "it is None"),
        ([1], r"it is \[1\]"),
        ({}, r"it is \{\} \(key 'epoch' is missing"),
        ({"epoch": 0, "history": []}, "it is .*key 'samples' is missing"),
        ({**started(), "epoch": "x"}, "it is .*epoch is 'x'; it has to be a whole number from 0"),
        ({**started(), "epoch": -3}, "it is .*epoch is -3"),
        ({**started(), "history": "x"}, "it is .*"),
        ({**started(), "history": None}, "it is .*"),
        (started(3), "it is .*"),
        (started({"taken": 2}), "it is .*key 'node_of_rank' is missing"),
        (started({"node_of_rank": [0]}), "it is .*key 'taken' is missing"),
        (started({"node_of_rank": [0], "taken": 2}, {"node_of_rank": 0, "taken": 2}), "it is .*"),
        (started({"node_of_rank": "00", "taken": 2}), "it is .*"),
        (started({"node_of_rank": [], "taken": 2}), "it is .*"),
        (started({"node_of_rank": [0, 0.5], "taken": 2}), "it is .*"),
        (started({"node_of_rank": [0, 0, 5], "taken": 2}), "it is .*without a gap"),
        (started({"node_of_rank": [0], "taken": -5}), "it is .*taken is -5"),
        (started({"node_of_rank": [0], "taken": "2"}), "it is .*taken is '2'"),
        (
            started({"node_of_rank": [0, 0], "taken": 12}),
            "taken is 12, but each of 2 ranks had only 12 samples to read",
        ),
        (
            started({"node_of_rank": [0], "taken": 20}, {"node_of_rank": [0], "taken": 5}),
            "taken is 5, .* 4 samples",
        ),
    ],
)
def test_what_is_not_a_state_is_refused_and_the_sampler_is_unchanged(
    state: Any, message: str
) -> None:
    (sampler,) = samplers((0,))
    sampler.set_epoch(2)
    with pytest.raises(
        ConfigError,
        match=f"^Cannot load sampler state: {message}.* Pass the dict returned by NodeSampler",
    ):
        sampler.load_state_dict(state)
    assert (sampler.epoch, sampler.history, len(sampler)) == (2, (), 24)


def test_names_are_those_of_the_dataset() -> None:
    """Task ids if there are any, else positions; a lazy sequence is not read for its names."""

    class Named:
        task_ids = ("mp-1", "mp-2")

        def __len__(self) -> int:
            return 2

    class Lazy:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> str:
            raise AssertionError("it was read")

    assert NodeSampler(Named()).schedule.names == ("mp-1", "mp-2")
    assert NodeSampler(Lazy()).schedule.names == ("0", "1", "2")


@pytest.mark.filterwarnings(
    "ignore:.*fork.*:DeprecationWarning", "ignore:'set_vital' is deprecated:UserWarning"
)
def test_torchdatas_loader_saves_and_resumes_it() -> None:
    """With workers, which read ahead of the training."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs the extra 'test'")

    def loader() -> Any:
        return stateful.StatefulDataLoader(
            range(24), batch_size=2, sampler=samplers((0,))[0], num_workers=2
        )

    first = loader()
    first.sampler.set_epoch(3)
    trained = [int(index) for _, batch in zip(range(5), first, strict=False) for index in batch]
    second = loader()
    second.load_state_dict(first.state_dict())
    rest = [int(index) for batch in second for index in batch]
    assert sorted(trained + rest) == list(range(24))
