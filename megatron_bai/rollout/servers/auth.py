"""Who may talk to a server: nobody else's machine, or whoever has the key in a file.

SGLang asks for the key on every path but `/health*`, `/ready` and `/metrics`. It is read from a file by whoever needs
it, the server included, and is in no setting, command line, environment or log.
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from megatron_bai.config import Rollout
from megatron_bai.distributed.hosts import is_loopback
from megatron_bai.errors import UserError

_keys: dict[str, str] = {}  # by URL: no request carries a server's key anywhere else


def require_key_or_loopback(rollout: Rollout) -> None:
    """Refuse servers that other machines reach and that ask nobody for a key. The file need not be there (`read_key`).

    Raises:
        UserError: names the setting.
    """
    open_to_others = [f"rollout.host={rollout.host}"] if not is_loopback(rollout.host) else []
    urls = [*rollout.urls, rollout.router] if rollout.router else rollout.urls
    open_to_others += [f"the server {url}" for url in urls if not is_loopback(urlsplit(url).hostname or "")]
    if open_to_others and not rollout.api_key_file:
        raise UserError(
            f"{open_to_others[0]} is reached from other machines: name a file with the key that it asks for in "
            "rollout.api_key_file (made with: umask 077; openssl rand -hex 32 > FILE)"
        )


def read_key(path: str) -> str:
    """The key that a file holds.

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
    """From now on this process shows these servers the key in a file; none where `path` is empty.

    Raises:
        UserError: as `read_key`.
    """
    for url in urls:
        _keys.pop(url, None)
        if path:
            _keys[url] = read_key(path)


def request_headers(url: str) -> dict[str, str]:
    """What a request to a server carries besides its body. Replies are asked for uncompressed: a compressed one says
    nothing of its size."""
    key = _keys.get(url)
    return {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
