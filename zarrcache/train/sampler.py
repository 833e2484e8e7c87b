"""``NodeSampler``: a distributed sampler for nodes that each have a cache."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

from torch.utils.data import Sampler

from zarrcache._units import counted, whole_number
from zarrcache.errors import ConfigError
from zarrcache.parallel import World
from zarrcache.train.schedule import Assignment, Schedule, Segment

__all__ = ["NodeSampler"]


class NodeSampler(Sampler[int]):
    """Yields the indices that this rank reads.

    Call ``set_epoch`` before each epoch, as with torch's ``DistributedSampler``; Lightning does.

    >>> sampler = NodeSampler(dataset, assignment="node", seed=42)
    >>> loader = DataLoader(dataset, batch_size=1, sampler=sampler, num_workers=8)

    Parameters
    ----------
    source : Dataset or sequence of str
        An object with ``task_ids`` (``ZarrDataset``, ``RhoData``) or a list of names. For any other
        object with a length, the positions serve as names.
    assignment : {"global", "node"}
        ``global`` shuffles all samples in each epoch. With ``node`` a sample belongs to one node
        and is shuffled within it, so each node's cache needs to hold only its share;
        :mod:`zarrcache.train.schedule` describes the effect on shuffling. With one node both are
        the same.
    seed : int
        Has to be the same on all ranks.
    shuffle : bool
    drop_last : bool
        If the samples do not divide evenly, leave out up to one per rank instead of reading up to
        one per rank twice.
    world : World, optional
        Ranks and their nodes. Default: from torch.distributed, torchrun or Slurm.

    Attributes
    ----------
    schedule : Schedule
        The orders of all ranks, of any epoch.
    world : World
    epoch : int

    Raises
    ------
    ConfigError
        Unknown assignment, a seed that is not a whole number from 0, or job variables that
        contradict each other.

    Notes
    -----
    *Resume.* ``state_dict()`` records how many samples the ranks have taken; after
    ``load_state_dict()`` the rest of the epoch is distributed over the current ranks, more or fewer
    than before. A DataLoader gives its workers indices ahead of the training, so pass the number of
    samples that were trained on: ``sampler.state_dict(taken=batches * batch_size)``.
    ``zarrcache.lightning.ZarrDataModule`` does that. torchdata's ``StatefulDataLoader`` does it
    too, but only for the same number of workers, because it keeps a state per worker.
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
    ) -> None:
        self.world = World.here() if world is None else world
        self.schedule = Schedule(
            _names(source),
            assignment=assignment,
            node_of_rank=self.world.node_of_rank,
            seed=whole_number("seed", seed),
            shuffle=shuffle,
            drop_last=drop_last,
        )
        if self.schedule.names and not self.schedule.samples_of_rank:
            raise ConfigError(
                f"drop_last leaves nothing to read of {counted(len(self.schedule.names), 'sample')}"
                f" for {counted(len(self.world.node_of_rank), 'rank')}. Set drop_last=False, or "
                "use fewer ranks."
            )
        self.epoch = 0
        self._history: tuple[Segment, ...] = ()
        self._yielded = 0

    def set_epoch(self, epoch: int) -> None:
        """Switch to the order of an epoch; does nothing if it is the current one.

        Raises
        ------
        ConfigError
            The epoch is not a whole number from 0.
        """
        epoch = whole_number("epoch", epoch)
        if epoch != self.epoch:
            self.epoch, self._history, self._yielded = epoch, (), 0

    @property
    def history(self) -> tuple[Segment, ...]:
        """The part of this epoch that earlier runs of the job have read."""
        return self._history

    def __len__(self) -> int:
        return int(self.schedule.orders(self.epoch, self._history).shape[1])

    def __iter__(self) -> Iterator[int]:
        self._yielded = 0
        for index in self.schedule.orders(self.epoch, self._history)[self.world.rank]:
            self._yielded += 1
            yield int(index)

    def state_dict(self, taken: int | None = None) -> dict[str, Any]:
        """The position in the epoch, as plain numbers, identical on ranks that advance together.

        Parameters
        ----------
        taken : int, optional
            Number of samples that this rank has trained on since the epoch was begun or resumed.
            Default: the number of indices drawn, which is larger where a DataLoader's workers read
            ahead. The length of the sampler, or more, means that the epoch has ended.

        Raises
        ------
        ConfigError
            ``taken`` is not a whole number from 0.
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
        """Resume where ``state_dict()`` was called, with the current ranks and nodes.

        Raises
        ------
        ConfigError
            The state is of other samples, another seed or another assignment, so the rest of its
            epoch cannot be computed; or it is not a state of a ``NodeSampler``.
        """
        try:
            epoch = whole_number("epoch", state["epoch"])
            segments = state["history"]
            if not isinstance(segments, (list, tuple)):
                raise TypeError("history is not a list")
            history = tuple(
                Segment(
                    World(
                        0,
                        tuple(whole_number("node_of_rank", one) for one in segment["node_of_rank"]),
                    ).node_of_rank,
                    whole_number("taken", segment["taken"]),
                )
                for segment in segments
            )
            _ = state["samples"]
        except (KeyError, TypeError, ConfigError) as exc:
            why = f"key {exc} is missing" if isinstance(exc, KeyError) else str(exc)
            raise _bad_state(f"it is {reprlib.repr(state)} ({why.removesuffix('.')})") from None
        for name, here in self._identity().items():
            if state.get(name) != here:
                hint = (
                    " (hashes of the names): data, split (random_seed or split_file) and "
                    "functional have to be those of the run that saved it"
                )
                raise ConfigError(
                    f"Cannot load sampler state: {name} is {state.get(name)!r} in the state and "
                    f"{here!r} in this sampler{hint if name == 'samples' else ''}. "
                    "Resume with the data, seed and assignment of the run that saved it, or start "
                    "the epoch from its beginning without load_state_dict()."
                )
        self._check_possible(history)
        self.epoch, self._history, self._yielded = epoch, history, 0

    def _check_possible(self, history: Sequence[Segment]) -> None:
        """Refuse a history that no job can have."""
        left = len(self.schedule.names)
        for segment in history:
            ranks, taken = len(segment.node_of_rank), segment.taken
            each = left // ranks if self.schedule.drop_last else -(-left // ranks)
            # A state saved at the end of an epoch is that of the next epoch, without a history.
            if taken and taken >= each:
                raise _bad_state(
                    f"taken is {taken}, but each of {ranks} ranks had only {each} samples to read"
                )
            # No sample counts twice: only the last one of a rank can be a repetition.
            left -= ranks * taken

    def _identity(self) -> dict[str, Any]:
        schedule = self.schedule
        return {
            "samples": hashlib.blake2b(
                "\n".join(schedule.names).encode(), digest_size=8
            ).hexdigest(),
            "assignment": schedule.assignment,
            "seed": schedule.seed,
            "shuffle": schedule.shuffle,
            "drop_last": schedule.drop_last,
        }


def _names(source: Sized) -> tuple[str, ...]:
    names = getattr(source, "task_ids", source)
    # Lists and tuples only: iterating over a lazy sequence would load it.
    if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return tuple(map(str, range(len(source))))


def _bad_state(wrong: str) -> ConfigError:
    return ConfigError(
        f"Cannot load sampler state: {wrong}. Pass the dict returned by NodeSampler.state_dict(), "
        "or start the epoch from its beginning without load_state_dict()."
    )
