"""Forecast a training run: requests, bytes, cost, hit ratio, seconds (``zarrcache plan``)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import FLOAT32, Eviction, Role
from zarrcache._units import counted, whole_number
from zarrcache.arrays import is_fetched_whole
from zarrcache.config import CacheConfig, DataConfig, PriceConfig
from zarrcache.data import ZarrS3Reader, open_reader
from zarrcache.errors import ConfigError
from zarrcache.ops.simulate import POLICIES, Epoch, Policy, simulate
from zarrcache.ops.sizes import (
    DensitySize,
    Speed,
    measure_compression,
    measure_sizes,
    measure_speed,
)
from zarrcache.origin import PAGE_OBJECTS
from zarrcache.train import Assignment, Schedule, node_budget_bytes

__all__ = [
    "EpochForecast",
    "Forecast",
    "MeasuredSplit",
    "Variant",
    "WhatIf",
    "measure_split",
    "what_if",
]

#: Densities whose size is measured at the origin. The mean over 122,689 densities then has a
#: standard error of 3 %.
SAMPLED = 1000
#: Of those whose size is known only after fetching and decoding: a standard error of 11 %.
SAMPLED_WHOLE = 64
#: Samples times epochs to simulate. With more samples, a subset stands for all: the hit ratio does
#: not depend on the number.
SIMULATED = 240_000
#: Minimum of epochs to simulate, in total and per node, if the run has as many. After eight epochs
#: of a global shuffle a node of eight has not yet read a third of the samples; after 64 epochs, one
#: in 3,000. Later epochs are taken to be like the last half of these.
EPOCHS, EPOCHS_PER_NODE = 12, 8
_PROBED = 9
_SIZES = [(field.name, np.int64) for field in fields(DensitySize)]
#: Sizes of a cache to compare, as shares of the data on disk.
_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Variant:
    """A combination of assignment and eviction policy."""

    assignment: Assignment
    eviction: Policy


@dataclass(frozen=True, slots=True)
class EpochForecast:
    """One epoch, all nodes together."""

    #: Reads served by a cache, 0 to 1.
    hit_ratio: float
    #: To the origin, and bytes from it.
    requests: int
    nbytes: int
    #: In ``prices.currency``.
    dollars: float
    #: Reading alone, on the slowest node; None without ``probe``.
    seconds: float | None


@dataclass(frozen=True)
class Forecast:
    """The forecast of a run."""

    samples: int
    #: Two per sample, or one if input and label are the same directory; with several channels as
    #: many as there are.
    densities: int
    #: Those whose size was measured; the others are drawn from their distribution.
    measured: int
    #: Mean number of objects per density, and of LIST requests to read it.
    gets: float
    lists: float
    #: Total size of all densities, at the origin and in a cache that holds them all.
    stored_bytes: int
    disk_bytes: int
    nodes: int
    ranks: int
    #: Size of the cache of one node, and the part of it that the look-ahead takes once it is full.
    capacity_bytes: int
    lookahead_bytes: int
    #: ``cache.arrays.encoding``, on which ``disk_bytes`` depends.
    encoding: str
    variant: Variant
    #: Of the whole run. Those after the simulated ``epochs`` are taken to be like their last half.
    run_epochs: int
    epochs: tuple[EpochForecast, ...]
    total: EpochForecast
    #: Hit ratio of every variant in the last half of the simulated epochs.
    others: dict[Variant, float]
    prices: PriceConfig
    #: None without ``probe``.
    speed: Speed | None

    @property
    def steady_ratio(self) -> float:
        """Hit ratio in the last half of the simulated epochs, 0 to 1."""
        tail = self.epochs[len(self.epochs) // 2 :]
        return sum(epoch.hit_ratio for epoch in tail) / len(tail)

    def cold_dollars(self, densities: int) -> float:
        """Cost of reading densities of the mean size at the origin, in the currency."""
        nbytes = self.stored_bytes / self.densities
        return densities * _dollars(self.prices, self.lists, self.gets, nbytes)

    def paid_dollars(self, densities: int, requests: int, nbytes: int) -> float:
        """Cost of counted requests and bytes, with the measured number of LISTs per density."""
        lists = min(float(requests), densities * self.lists)
        return _dollars(self.prices, lists, requests - lists, nbytes)


@dataclass(frozen=True)
class WhatIf:
    """Forecasts of one run: as configured (``present``), and with other caches."""

    present: Forecast
    #: With caches of other sizes, from small to large. ``others`` has the policies of
    #: ``cache.eviction``, with the assignment of ``present``.
    sizes: tuple[Forecast, ...]
    #: With other numbers of nodes and both assignments. One node has only ``global``, which is the
    #: same there.
    nodes: tuple[Forecast, ...]


def measure_split(
    config: DataConfig,
    *,
    seed: int = 0,
    probe: bool = False,
    ranks: int = 1,
    capacity_bytes: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> MeasuredSplit:
    """Measure the training split of a config, to forecast runs of it.

    Lists the directories and measures up to 1,000 densities at the origin. Caches nothing. With
    ``cache.arrays.encoding: bits:N`` it reads nine of them, to learn how well they compress.

    Parameters
    ----------
    config : DataConfig
    seed : int
        Of the order of samples.
    probe : bool
        Read a few densities past the cache to measure latency and bandwidth.
    ranks : int
        Those of the largest run: that each has a sample is checked before anything is measured.
    capacity_bytes : int, optional
        Size of the cache of each node. Default: ``cache.limit``.
    progress : callable, optional
        Called with the number of densities measured so far and to measure.
    """
    cache = config.cache
    if capacity_bytes is None:
        if cache is None:
            raise ConfigError(
                "The config has no cache block, so the capacity is unknown. Pass one: --capacity "
                "'200 GiB'."
            )
        capacity_bytes = cache.limit
    # Without a cache: a forecast is made on a laptop or login node and must leave no files there.
    reader = open_reader(config.model_copy(update={"cache": None}))
    # Of all materials: to find out which lack a channel may take a request each.
    names, _ = reader.split_task_ids(decided=False)
    _check_ranks(ranks, len(names))
    encoding = cache.arrays.encoding if cache is not None else FLOAT32
    channels = reader.channels
    densities: list[tuple[str, Role, str]] = [(name, *one) for name in names for one in channels]
    generator = np.random.default_rng(seed)
    places = np.sort(
        generator.choice(len(densities), min(_sampled(reader), len(densities)), replace=False)
    )
    chosen = [densities[place] for place in places]
    probed = [
        chosen[at] for at in np.linspace(0, len(chosen) - 1, min(_PROBED, len(chosen)), dtype=int)
    ]
    measured = measure_sizes(
        reader,
        chosen,
        progress,
        encoding=encoding,
        compression=measure_compression(reader, probed, encoding),
    )
    # Each density that was not measured gets the size of one that was: the distribution matters,
    # not only the mean.
    taken = generator.integers(len(measured), size=len(densities))
    taken[places] = np.arange(len(measured))
    return MeasuredSplit(
        tuple(names),
        np.array([astuple(size) for size in measured], _SIZES)[taken],
        len(measured),
        len(reader.roles),
        seed,
        cache,
        capacity_bytes,
        measure_speed(reader, chosen[:_PROBED]) if probe else None,
    )


@dataclass(frozen=True)
class MeasuredSplit:
    """A training split, and the requests and bytes of its densities, from `measure_split`."""

    names: tuple[str, ...]
    #: A row of `DensitySize` per density: those of a sample are neighbours.
    sizes: NDArray[np.void]
    measured: int
    #: Directories to list.
    roles: int
    seed: int
    cache: CacheConfig | None
    capacity_bytes: int
    speed: Speed | None

    def forecast(
        self,
        *,
        nodes: int = 1,
        capacity_bytes: int | None = None,
        lookahead_bytes: int | None = None,
        assignment: Assignment = "global",
        eviction: Policy | None = None,
        ranks_per_node: int = 1,
        epochs: int = 50,
        workers: int = 1,
        compare: Sequence[Variant] | None = None,
    ) -> Forecast:
        """Forecast a run.

        Parameters
        ----------
        nodes, ranks_per_node : int
        capacity_bytes : int, optional
            Size of the cache of each node. Default: that of `measure_split`.
        lookahead_bytes : int, optional
            Bytes that `Lookahead` fetches ahead, at most a quarter of the cache; what is fetched
            ahead takes room from entries that stay. 0: training without it. Default:
            ``cache.lookahead``.
        assignment : {"global", "node"}
            As in ``NodeSampler``.
        eviction : {"none", "least-recently-stored", "belady"}, optional
            Default: ``cache.eviction``.
        epochs : int
            Number of epochs of the whole run.
        workers : int
            Concurrent readers per node (DataLoader workers of all ranks); used only for
            ``seconds``.
        compare : sequence of Variant, optional
            Those in ``others``. Default: every combination of assignment and policy.
        """
        for name, number in (
            ("nodes", nodes),
            ("ranks_per_node", ranks_per_node),
            ("epochs", epochs),
            ("workers", workers),
        ):
            whole_number(name, number, least=1)
        _check_ranks(nodes * ranks_per_node, len(self.names))
        cache, names, sizes = self.cache, self.names, self.sizes
        if capacity_bytes is None:
            capacity_bytes = self.capacity_bytes
        if lookahead_bytes is None:
            lookahead_bytes = cache.lookahead if cache is not None else 0
        variant = Variant(assignment, eviction or (cache.eviction if cache is not None else "none"))
        prices = cache.prices if cache is not None else PriceConfig()
        world = tuple(node for node in range(nodes) for _ in range(ranks_per_node))
        # With few samples more epochs are simulated: one epoch of few samples is noisy.
        simulated = min(epochs, max(EPOCHS, EPOCHS_PER_NODE * nodes, SIMULATED // len(names)))
        # Room is taken when the first entry is refused. The entries that are dropped for it would
        # be hits in later epochs only, so the simulation has a smaller cache from the start.
        is_full = int(sizes["disk_bytes"].sum()) > capacity_bytes
        ahead_bytes = node_budget_bytes(lookahead_bytes, capacity_bytes) if is_full else 0
        run = _Run(self, world, capacity_bytes - ahead_bytes, simulated)
        found = run.of(variant)
        listing = -(-len(names) // PAGE_OBJECTS) * self.roles * nodes
        forecasts = tuple(
            _forecast(run, found, epoch, prices, self.speed, workers, listing if not epoch else 0)
            for epoch in range(simulated)
        )
        if compare is None:
            compare = [
                Variant(one, two)
                for one in ("global", "node")
                for two in POLICIES
                if nodes > 1 or one == "global"
            ]
        return Forecast(
            samples=len(names),
            densities=len(sizes),
            measured=self.measured,
            gets=float(sizes["gets"].mean()),
            lists=float(sizes["lists"].mean()),
            stored_bytes=int(sizes["stored_bytes"].sum()),
            disk_bytes=int(sizes["disk_bytes"].sum()),
            nodes=nodes,
            ranks=len(world),
            capacity_bytes=capacity_bytes,
            lookahead_bytes=ahead_bytes,
            encoding=cache.arrays.encoding if cache is not None else FLOAT32,
            variant=variant,
            run_epochs=epochs,
            epochs=forecasts,
            total=_total(forecasts, epochs),
            others={other: _steady(run.of(other)) for other in compare},
            prices=prices,
            speed=self.speed,
        )


def what_if(
    split: MeasuredSplit,
    *,
    nodes: int = 1,
    epochs: int = 50,
    progress: Callable[[int, int], object] | None = None,
) -> WhatIf:
    """Forecast a run with caches of other sizes and policies, and on other numbers of nodes.

    ``progress`` gets the number of runs forecast so far, and to forecast.
    """
    policies: tuple[Policy, ...] = get_args(Eviction)
    present = split.forecast(nodes=nodes, epochs=epochs)
    sizes = sorted(
        {
            *(max(1, int(share * present.disk_bytes)) for share in _SHARES),
            # Beyond the data, more room changes nothing.
            *([present.capacity_bytes] if present.capacity_bytes < present.disk_bytes else []),
        }
    )
    ways = [Variant(present.variant.assignment, policy) for policy in policies]
    runs: list[dict[str, Any]] = [{"capacity_bytes": size, "compare": ways} for size in sizes]
    runs += [
        {"nodes": count, "assignment": way, "compare": ()}
        for count in sorted({1, 2, 4, 8, nodes})
        if count <= len(split.names)
        for way in ("global", "node")
        if count > 1 or way == "global"
    ]
    found: list[Forecast] = []
    for run in runs:
        if progress is not None:
            progress(1 + len(found), 1 + len(runs))
        found.append(split.forecast(**{"nodes": nodes, "epochs": epochs, **run}))
    return WhatIf(present, tuple(found[: len(sizes)]), tuple(found[len(sizes) :]))


def _check_ranks(ranks: int, samples: int) -> None:
    if ranks > samples:
        raise ConfigError(
            f"{ranks} ranks are more than the {counted(samples, 'sample')} of the "
            "training split, so some ranks would have none. Use fewer nodes or ranks."
        )


class _Run:
    """Simulations of one run, over a subset of its samples if there are many."""

    def __init__(
        self, split: MeasuredSplit, world: tuple[int, ...], capacity: int, epochs: int
    ) -> None:
        names, disk_bytes = split.names, split.sizes["disk_bytes"]
        self._names = names[: max(2 * len(world), SIMULATED // epochs)]
        self._world, self._seed, self._epochs = world, split.seed, epochs
        #: Samples per simulated sample.
        self.scale = len(names) / len(self._names)
        self._channels = len(split.sizes) // len(names)
        self.sizes = split.sizes[: len(self._names) * self._channels]
        # In whole numbers of Python: 200 GiB times 50 MiB is more than 64 bits hold.
        simulated_bytes = int(self.sizes["disk_bytes"].sum())
        self._capacity = capacity * simulated_bytes // int(disk_bytes.sum())
        self.of = functools.cache(self._simulated)
        self._orders = functools.cache(self._orders_of)

    def _simulated(self, variant: Variant) -> list[list[Epoch]]:
        """Simulated epochs of each node."""
        orders, sizes = self._orders(variant.assignment), self.sizes["disk_bytes"].tolist()
        return [
            simulate(of_node, sizes, self._capacity, variant.eviction)
            for of_node in zip(*orders, strict=True)
        ]

    def _orders_of(self, assignment: Assignment) -> list[list[NDArray[np.int64]]]:
        """Rows of the densities that each node reads, by epoch and node."""
        schedule = Schedule(
            self._names, assignment=assignment, node_of_rank=self._world, seed=self._seed
        )
        return [
            [
                (order[:, None] * self._channels + np.arange(self._channels)).ravel()
                for order in schedule.node_orders(epoch)
            ]
            for epoch in range(self._epochs)
        ]


def _forecast(
    run: _Run,
    found: list[list[Epoch]],
    epoch: int,
    prices: PriceConfig,
    speed: Speed | None,
    workers: int,
    listing: int,
) -> EpochForecast:
    nodes = [node[epoch] for node in found]
    missed = run.sizes[np.concatenate([node.missed for node in nodes])]
    lists, gets, nbytes = (
        int(run.scale * missed[name].sum()) for name in ("lists", "gets", "stored_bytes")
    )
    lists += listing
    dollars = _dollars(prices, lists, gets, nbytes)
    seconds = None
    if speed is not None:
        # Linear in workers: each process fetches, decodes and stores by itself. Too optimistic
        # once they saturate the network together.
        slowest = max(len(node.missed) for node in nodes) * run.scale
        seconds = slowest * speed.density_s / workers
    return EpochForecast(_ratio(nodes), lists + gets, nbytes, dollars, seconds)


def _dollars(prices: PriceConfig, lists: float, gets: float, nbytes: float) -> float:
    return (
        lists / 1000 * prices.list_per_1000
        + gets / 1000 * prices.get_per_1000
        + nbytes / _GIB * prices.transfer_per_gib
    )


def _total(forecasts: Sequence[EpochForecast], epochs: int) -> EpochForecast:
    """The whole run; an epoch that was not simulated counts as the mean of the last half."""
    tail = forecasts[len(forecasts) // 2 :]
    more = epochs - len(forecasts)

    def add(of: Callable[[EpochForecast], float]) -> float:
        return sum(map(of, forecasts)) + more * sum(map(of, tail)) / len(tail)

    timed = all(epoch.seconds is not None for epoch in forecasts)
    return EpochForecast(
        add(lambda epoch: epoch.hit_ratio) / epochs,
        round(add(lambda epoch: epoch.requests)),
        round(add(lambda epoch: epoch.nbytes)),
        add(lambda epoch: epoch.dollars),
        add(lambda epoch: epoch.seconds or 0.0) if timed else None,
    )


def _ratio(nodes: Sequence[Epoch]) -> float:
    reads = sum(node.reads for node in nodes)
    return sum(node.hits for node in nodes) / reads if reads else 0.0


def _steady(found: list[list[Epoch]]) -> float:
    """Hit ratio in the last half of the simulated epochs."""
    epochs = len(found[0])
    return float(
        np.mean([_ratio([node[epoch] for node in found]) for epoch in range(epochs // 2, epochs)])
    )


def _sampled(reader: ZarrS3Reader) -> int:
    """Number of densities to measure: about 64 of those that have to be fetched whole."""
    names = [name for role in reader.roles for name in reader.store_names(role).values()]
    share = sum(map(is_fetched_whole, names)) / max(1, len(names))
    return min(SAMPLED, int(SAMPLED_WHOLE / share)) if share else SAMPLED
