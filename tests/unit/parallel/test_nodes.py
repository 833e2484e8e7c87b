"""What machines are called, and in which order they count."""

from __future__ import annotations

import socket

import pytest

from zarrcache.parallel._nodes import in_order, node_name


def test_nodes_count_as_slurm_counts_them() -> None:
    """Numbers as numbers; of several racks, rack by rack."""
    assert in_order(["node10", "node2", "node1"]) == ["node1", "node2", "node10"]
    assert in_order(["r2n1", "r1n10", "r1n9", "login"]) == ["login", "r1n9", "r1n10", "r2n1"]


def test_a_node_is_called_as_slurm_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else by its host name."""
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    assert node_name() == "node7"
    monkeypatch.delenv("SLURMD_NODENAME")
    assert node_name() == socket.gethostname()
