"""Entries from other nodes: the client, the server, and which node fetches for the cluster."""

from __future__ import annotations

from zarrcache.peers._token import read_token
from zarrcache.peers.client import Peers, Reply
from zarrcache.peers.server import EntryServer

__all__ = ["EntryServer", "Peers", "Reply", "read_token"]
