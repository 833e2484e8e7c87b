"""The resumable training loader, its sampler, and the ranks and nodes as Lightning numbers them."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from zarrcache.errors import ConfigError
from zarrcache.parallel import World
from zarrcache.train import CombinedDataset, Lookahead, NodeSampler, Sample, ZarrDataset

__all__ = ["Sampler", "TrainLoader", "world_of"]


class Sampler(NodeSampler, DistributedSampler[int]):
    """A `NodeSampler` that Lightning keeps.

    Lightning wraps any sampler that is not a ``DistributedSampler`` to distribute it over the
    ranks, here a second time.
    """

    def __init__(self, source: ZarrDataset | CombinedDataset, **settings: Any) -> None:
        super().__init__(source, **settings)
        # Attributes of a DistributedSampler.
        self.num_replicas, self.rank = self.world.ranks, self.world.rank


class TrainLoader(DataLoader[Sample]):
    """A resumable DataLoader. Its length is that of the whole epoch; it yields the rest of it."""

    #: Fetches ahead of this loader.
    ahead: Lookahead | None = None
    #: The epoch of which it has drawn samples last.
    begun: int | None = None

    @property
    def planned(self) -> NodeSampler:
        """The sampler. It is an error if something has replaced it."""
        if not isinstance(self.sampler, NodeSampler):
            raise ConfigError(
                "The sampler of the training loader was replaced by a "
                f"{type(self.sampler).__name__}, so the ranks would not read in the order computed "
                "for them. Set Trainer(use_distributed_sampler=False), and remove other code that "
                "changes the data module's loaders."
            )
        return self.sampler

    @property
    def batches_before(self) -> int:
        """Number of batches of this epoch that were trained on before the run was resumed."""
        return len(self) - self._batches(len(self.planned))

    def _batches(self, samples: int) -> int:
        assert self.batch_size is not None
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def __len__(self) -> int:
        return (
            self._batches(self.sampler.schedule.samples_of_rank)
            if isinstance(self.sampler, NodeSampler)
            else super().__len__()
        )

    def __iter__(self) -> Any:
        # Trainer(overfit_batches=...) replaces the sampler on purpose, and warns.
        if not isinstance(self.sampler, SequentialSampler):
            self.begun = self.planned.epoch
            if self.ahead is not None:
                self.ahead.set_epoch(self.begun)
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Empty: the data module's state has everything.

        Lightning resumes within an epoch if the loader has this method and ``load_state_dict``.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do."""


def world_of(trainer: Any) -> World | None:
    """Ranks and nodes as Lightning numbers them, which has to be node by node."""
    if trainer is None:
        return None
    shares = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
    rank, ranks = int(shares["rank"]), int(shares["num_replicas"])
    if ranks != trainer.world_size:  # several ranks share a model, and a sample
        return World.even(rank, ranks)
    world = World.even(rank, ranks, trainer.num_nodes)
    if world.node != trainer.node_rank:
        raise ConfigError(
            f"Rank {rank} of {ranks} is on node {trainer.node_rank} of {trainer.num_nodes}, and "
            f"would be on node {world.node} if ranks were numbered node by node. Start the job "
            "with srun --distribution=block, and set Trainer(num_nodes=..., devices=...) to match "
            "the job."
        )
    return world
