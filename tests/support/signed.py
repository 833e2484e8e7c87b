"""Requests as another node of the cluster signs them, as raw text."""

from __future__ import annotations

from urllib.parse import urlsplit

from zarrcache.peers import _seal as seal

__all__ = ["authorization", "fields_of"]


def authorization(line: str, url: str, *, key: bytes) -> str:
    """The headers of a request, ``GET /path``, to the server at ``url``."""
    method, _, target = line.partition(" ")
    host = urlsplit(url).netloc
    signed, _ = seal.Sender().authorization(key, method, host, target)
    return f"Host: {host}\r\nAuthorization: {signed}"


def fields_of(headers: dict[str, str]) -> dict[str, str]:
    """What an answer says, from its headers with names in lower case."""
    return seal.unpack(headers.get(seal.ANSWER_HEADER.lower(), ""))
