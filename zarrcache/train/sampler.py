"""``NodeSampler``: torch's distributed sampler, for nodes that have a cache each."""

from __future__ import annotations

import hashlib
import operator
import reprlib
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

from torch.utils.data import Sampler

from zarrcache._units import whole_number
from zarrcache.errors import ConfigError
from zarrcache.parallel import World
from zarrcache.train.schedule import Assignment, Schedule, Segment

__all__ = ["NodeSampler"]


class NodeSampler(Sampler[int]):
    """Indices of this rank. Call ``set_epoch`` before each epoch, as with torch's
    ``DistributedSampler``; Lightning does it by itself.

    >>> sampler = NodeSampler(dataset, assignment="node", seed=42)
    >>> loader = DataLoader(dataset, batch_size=1, sampler=sampler, num_workers=8)

    Parameters
    ----------
    source : Dataset or sequence of str
        With ``task_ids`` (``ZarrDataset``, ``RhoData``), or a list of names; of anything else with
        a length the positions are the names.
    assignment : {"global", "node"}
        ``global``: a fresh shuffle over all samples in each epoch. ``node``: a sample belongs to
        one node and is shuffled within it, so each node's cache needs room for its share only;
        :mod:`zarrcache.train.schedule` tells what that does to the shuffling. With one node both
        are the same.
    seed : int
        The same on all ranks.
    shuffle : bool
    drop_last : bool
        Leave up to one sample a rank out, instead of reading up to one a rank twice, where the
        samples cannot be shared out evenly.
    world : World, optional
        Ranks and their nodes. Default: what torch.distributed, torchrun or Slurm say.
    nbytes : sequence of int, optional
        Sizes of the samples, to balance the nodes' shares by bytes.

    Attributes
    ----------
    schedule : Schedule
        The orders of all ranks, of any epoch.
    world : World
    epoch : int

    Raises
    ------
    ConfigError
        An unknown assignment, a seed that is no whole number from 0, or variables of the job that
        contradict each other.

    Notes
    -----
    *Resume.* ``state_dict()`` says which samples the ranks have taken; after ``load_state_dict()``
    the rest of the epoch is shared out among the ranks that there are now, be they more or fewer
    than before. DataLoader workers are given indices ahead of the training, so tell how far the
    training got: ``sampler.state_dict(taken=batches * batch_size)``.
    ``zarrcache.lightning.ZarrDataModule`` does that by itself, and so does torchdata's
    ``StatefulDataLoader`` as long as the number of workers stays: its own state is that of each
    worker.
    """

    def __init__(
        self,
        source: Sized,
        *,
        assignment: Assignment = "global",
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        world: World | None = None,
        nbytes: Sequence[int] | None = None,
    ) -> None:
        self.world = World.here() if world is None else world
        self.schedule = Schedule(
            _names(source),
            assignment=assignment,
            node_of_rank=self.world.node_of_rank,
            seed=whole_number("seed", seed),
            shuffle=shuffle,
            drop_last=drop_last,
            nbytes=None if nbytes is None else tuple(map(int, nbytes)),
        )
        self.epoch = 0
        self._history: tuple[Segment, ...] = ()
        self._yielded = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of another epoch. What ``load_state_dict`` left of an epoch stays if it is
        this one.

        Raises
        ------
        ConfigError
            The epoch is no whole number from 0.
        """
        epoch = whole_number("epoch", epoch)
        if epoch != self.epoch:
            self.epoch, self._history, self._yielded = epoch, (), 0

    @property
    def history(self) -> tuple[Segment, ...]:
        """What earlier starts of the job have read of this epoch."""
        return self._history

    def __len__(self) -> int:
        return int(self.schedule.orders(self.epoch, self._history).shape[1])

    def __iter__(self) -> Iterator[int]:
        self._yielded = 0
        for index in self.schedule.orders(self.epoch, self._history)[self.world.rank]:
            self._yielded += 1
            yield int(index)

    def state_dict(self, taken: int | None = None) -> dict[str, Any]:
        """Where the epoch stands; plain numbers, the same on every rank if the ranks keep step.

        Parameters
        ----------
        taken : int, optional
            Samples that this rank has trained on since the epoch was begun or resumed. Default:
            those that were asked for, which is more if a DataLoader with workers asks ahead. As
            many as there are, or more, end the epoch.

        Raises
        ------
        ConfigError
            It is no whole number from 0.
        """
        taken = self._yielded if taken is None else whole_number("taken", taken)
        history = [
            {"node_of_rank": list(segment.node_of_rank), "taken": segment.taken}
            for segment in self._history
        ]
        if taken >= len(self):
            epoch, history = self.epoch + 1, []
        else:
            epoch = self.epoch
            history += (
                [{"node_of_rank": list(self.world.node_of_rank), "taken": taken}] if taken else []
            )
        return {"epoch": epoch, "history": history, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict()`` was called, with the ranks and nodes that there are now.

        Raises
        ------
        ConfigError
            The state is of other samples, another seed or another assignment: the rest of that
            epoch is not known here. Or it is no state.
        """
        if not isinstance(state, Mapping):
            raise _no_state(f"it is {reprlib.repr(state)}")
        for name in ("epoch", "history", "samples"):
            if name not in state:
                raise _no_state(f"it has no {name!r}")
        for name, here in self._identity().items():
            if state.get(name) != here:
                hint = " (hashes of the names): data, split (random_seed or split_file) and functional have to be those of the run that saved it"
                raise ConfigError(
                    f"the sampler's state has {name} {state.get(name)!r}, and this sampler has "
                    f"{here!r}{hint if name == 'samples' else ''}. "
                    "Resume with the data, seed and assignment that the job was begun with, or "
                    "begin the epoch anew without load_state_dict()."
                )
        if not _is_whole(state["epoch"]):
            raise _no_state(f"its epoch is {state['epoch']!r}; it has to be a whole number from 0")
        history = _history(state["history"], self.schedule)
        self.epoch, self._history, self._yielded = operator.index(state["epoch"]), history, 0

    def _identity(self) -> dict[str, Any]:
        schedule = self.schedule
        digest = hashlib.blake2b("\n".join(schedule.names).encode(), digest_size=8).hexdigest()
        sizes = (
            None
            if schedule.nbytes is None
            else hashlib.blake2b(
                ",".join(map(str, schedule.nbytes)).encode(), digest_size=8
            ).hexdigest()
        )
        return {
            "samples": digest,
            "assignment": schedule.assignment,
            "seed": schedule.seed,
            "shuffle": schedule.shuffle,
            "drop_last": schedule.drop_last,
            "nbytes": sizes,  # with assignment="node" they decide which node reads what
        }


def _names(source: Sized) -> tuple[str, ...]:
    names = getattr(source, "task_ids", source)
    # no lazy sequence: to look at it would load it
    if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return tuple(map(str, range(len(source))))


def _is_whole(value: Any) -> bool:
    try:
        return operator.index(value) >= 0
    except TypeError:
        return False


def _no_state(wrong: str) -> ConfigError:
    return ConfigError(
        f"the sampler's state is none of a NodeSampler: {wrong}. Give what state_dict() returned, "
        "or begin the epoch anew without load_state_dict()."
    )


def _history(segments: Any, schedule: Schedule) -> tuple[Segment, ...]:
    """Of a state; refused if no job can have read it."""
    if not isinstance(segments, (list, tuple)):
        raise _no_state(f"its history is {reprlib.repr(segments)}; it has to be a list")
    history: list[Segment] = []
    left = len(schedule.names)
    for number, one in enumerate(segments):
        where = f"its history[{number}]"
        if not isinstance(one, Mapping) or not {"node_of_rank", "taken"} <= set(one):
            raise _no_state(
                f"{where} is {reprlib.repr(one)}; it has to have 'node_of_rank' and 'taken'"
            )
        nodes, taken = one["node_of_rank"], one["taken"]
        if (
            not isinstance(nodes, (list, tuple))
            or not nodes
            or not all(map(_is_whole, nodes))
            or set(nodes) != set(range(len(set(nodes))))
        ):
            raise _no_state(
                f"node_of_rank of {where} is {reprlib.repr(nodes)}; it has to be the node of each "
                "rank, numbered from 0 without a gap"
            )
        if not _is_whole(taken):
            raise _no_state(f"taken of {where} is {taken!r}; it has to be a whole number from 0")
        each = left // len(nodes) if schedule.drop_last else -(-left // len(nodes))
        # the state of an epoch that has ended is the next one's, without a history
        if taken and taken >= each:
            raise _no_state(
                f"taken of {where} is {taken}, and each of its {len(nodes)} ranks had {each} "
                "samples to read, the last of which ends it"
            )
        history.append(Segment(tuple(map(operator.index, nodes)), operator.index(taken)))
        # none twice: only the last sample of a rank may be one that another has
        left -= len(nodes) * operator.index(taken)
    return tuple(history)
