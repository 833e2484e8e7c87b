"""Work on a Dask cluster: items, or a command on every node.

The only importer of Dask (``pip install 'zarrcache[dask]'``), which is imported when it is used.
"""

from __future__ import annotations

from zarrcache.parallel.dask.cluster import Cluster, open_cluster
from zarrcache.parallel.dask.each_node import NodeOutcome, run_on_each_node

__all__ = ["Cluster", "NodeOutcome", "open_cluster", "run_on_each_node"]
