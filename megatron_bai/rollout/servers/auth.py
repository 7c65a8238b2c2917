"""Access to servers: from this machine alone, or for clients with the key in a file.

SGLang requires the key on every path but `/health*`, `/ready` and `/metrics`. Clients and servers read it from the
file; it is in no setting, command line, environment or log.
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from megatron_bai.config import Rollout
from megatron_bai.distributed.hosts import is_loopback, is_loopback_url
from megatron_bai.errors import UserError

_keys: dict[str, str] = {}  # by URL: a server's key is sent to that server alone


def require_key_or_loopback(rollout: Rollout) -> None:
    """Refuse servers that other machines reach and that require no key. The key's file need not exist (`read_key`).

    Raises:
        UserError: names the setting.
    """
    open_to_others = [f"rollout.host={rollout.host}"] if not is_loopback(rollout.host) else []
    urls = [*rollout.urls, rollout.router] if rollout.router else rollout.urls
    open_to_others += [f"the server {url}" for url in urls if not is_loopback_url(url)]
    if open_to_others and not rollout.api_key_file:
        raise UserError(
            f"{open_to_others[0]} is reached from other machines: name a file with the key that it asks for in "
            "rollout.api_key_file (made with: umask 077; openssl rand -hex 32 > FILE)"
        )


def read_key(path: str) -> str:
    """Read the key that a file holds.

    Raises:
        UserError: it cannot be read, others than its owner may read it, or it holds no key.
    """
    try:
        mode, key = os.stat(path).st_mode, Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"rollout.api_key_file={path} cannot be read: {reason}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"rollout.api_key_file={path} is open to other users: chmod 600 {path}")
    if not key or not all("!" <= character <= "~" for character in key):  # it becomes a part of a header
        raise UserError(f"rollout.api_key_file={path} holds no key: one line of visible ASCII characters is needed")
    return key


def register_key(urls: Iterable[str], path: str) -> None:
    """Register the key that this process sends to servers from now on.

    Args:
        urls: of the servers.
        path: file of the key; empty: no key is sent.

    Raises:
        UserError: as `read_key`.
    """
    for url in urls:
        _keys.pop(url, None)
        if path:
            _keys[url] = read_key(path)


def request_headers(url: str) -> dict[str, str]:
    """Return the headers of a request to a server: its key, and that the reply must not be compressed.

    The size of a compressed reply would not be known.
    """
    key = _keys.get(url)
    return {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
