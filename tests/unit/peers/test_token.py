"""The token file: who may read it, what it may hold, and that no message shows the token."""

from __future__ import annotations

from pathlib import Path

import pytest

from zarrcache.errors import ConfigError
from zarrcache.peers import read_token

TOKEN = "0123456789abcdef"


def written(path: Path, content: str | bytes, mode: int = 0o600) -> Path:
    """Write a file with that mode, whatever the umask is."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("content", [TOKEN, f"{TOKEN}\n", f"  {TOKEN}  \r\n"])
@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_token_of_a_private_file_is_read(tmp_path: Path, content: str, mode: int) -> None:
    """The line end that an editor adds does not count."""
    assert read_token(written(tmp_path / "token", content, mode)) == TOKEN


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o602])
def test_file_that_other_users_can_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    """The message gives the command that repairs it."""
    path = written(tmp_path / "token", TOKEN, mode)
    with pytest.raises(ConfigError, match=rf"mode {mode:04o}\. Run: chmod 600 {path}") as caught:
        read_token(path)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "short",
        "two words of a length that would do",
        "x" * 600,
        "wörter-mit-umlauten-und-länge",
        b"\0" * 32,
    ],
)
def test_file_without_a_usable_token_is_refused(tmp_path: Path, content: str | bytes) -> None:
    """The message gives the command that makes one."""
    with pytest.raises(
        ConfigError,
        match=r"does not hold one word of 16 to 512 printable characters\. Make one with: "
        r".*openssl rand",
    ) as caught:
        read_token(written(tmp_path / "token", content))
    assert not content or str(content) not in str(caught.value)


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir])
def test_file_that_cannot_be_read_is_named(tmp_path: Path, make: object) -> None:
    """A missing file, and a directory."""
    make(tmp_path / "token")  # type: ignore[operator]
    with pytest.raises(ConfigError, match=rf"token file {tmp_path / 'token'} cannot be read"):
        read_token(tmp_path / "token")
