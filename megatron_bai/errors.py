"""The exceptions whose message a user sees as one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake or fault outside the program: what is wrong, where, and what to do, in one line.

    The command line prints the message without a traceback and exits with code 2.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


class PermanentError(UserError):
    """A fault that the same input would have again: a retry cannot help, and the unfinished output is removed."""


def from_os_error(error: OSError, location: object = "") -> UserError:
    """Make a one-line error of what the operating system refused: a full disk, a missing file, missing rights.

    Args:
        error: with its `strerror` and, where the system knew it, its file name.
        location: printed where the error names no file.
    """
    return UserError(f"{error.filename or location or 'the system'}: {error.strerror or error}")


@contextmanager
def os_errors_as_user_errors(location: object) -> Iterator[None]:
    """Make what the operating system refuses in the block a one-line error: a full disk, missing rights.

    Args:
        location: as in `from_os_error`.

    Raises:
        UserError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise from_os_error(error, location) from None


def from_peer_error(error: Exception) -> UserError | None:
    """Make a one-line error of gloo's or the torch store's about a lost process; return None for other errors."""
    text = str(error)
    if "gloo/transport" not in text and type(error).__name__ not in ("DistNetworkError", "DistStoreError"):
        return None
    if silence := re.search(r"Timed out waiting (\d+)ms", text):
        reason = f"it did not answer within {int(silence[1]) / 1000:g} s, backend.timeout_s"
    else:
        reason = re.sub(r"^\[[^\]]*\] |\. This is typically .*", "", text.splitlines()[0])
    return UserError(
        f"another process of the run ended or cannot be reached ({reason}): see its log. The same command goes on from "
        "what is saved"
    )
