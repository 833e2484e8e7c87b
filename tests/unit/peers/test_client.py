"""The client: the order in which nodes are asked, and what it imports."""

from __future__ import annotations

import subprocess
import sys

from zarrcache.peers.client import nodes_by_duty


def test_every_node_finds_the_same_home_and_each_is_home_of_its_share() -> None:
    """Whatever the order of its list. With 1,000 entries and four nodes a share is 250 ± 60 (four
    standard deviations).
    """
    nodes = [f"http://node{n}:7070" for n in range(4)]
    homes = [nodes_by_duty(f"{n:032x}", nodes)[0] for n in range(1000)]
    assert homes == [
        nodes_by_duty(f"{n:032x}", [*reversed(nodes), nodes[0]])[0] for n in range(1000)
    ]
    assert all(abs(homes.count(node) - 250) < 60 for node in nodes)


def test_node_that_leaves_changes_the_home_of_its_own_share_only() -> None:
    """Its share goes to the next node in the order, which is asked when a home is dead."""
    nodes = [f"http://node{n}:7070" for n in range(4)]
    for n in range(200):
        order = nodes_by_duty(f"{n:032x}", nodes)
        assert nodes_by_duty(f"{n:032x}", set(nodes) - {order[0]}) == order[1:]


def test_processes_that_only_ask_do_not_import_the_server() -> None:
    """Importing aiohttp takes 0.1 s and 12 MiB."""
    code = "import sys; from zarrcache.peers import Peers; sys.exit('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
