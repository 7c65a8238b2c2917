"""The exceptions whose message a user sees as one line."""

import re


class UserError(Exception):
    """A mistake or fault outside the program: what is wrong, where, and what to do, in one line.

    The command line prints the message without a traceback and exits with code 2.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


class Unfit(UserError):
    """A fault that the same input would have again: a retry cannot help, and nothing done for it is kept."""


def of_system(error: OSError, where: object = "") -> UserError:
    """Describe in one line what the operating system refused: a full disk, a missing file, missing rights."""
    return UserError(f"{error.filename or where or 'the system'}: {error.strerror or error}")


def of_peer(error: Exception) -> UserError | None:
    """Describe gloo's or torch's store's error about a process that ended or cannot be reached; None for other errors."""
    words = str(error)
    if "gloo/transport" not in words and type(error).__name__ not in ("DistNetworkError", "DistStoreError"):
        return None
    if silence := re.search(r"Timed out waiting (\d+)ms", words):
        reason = f"it did not answer within {int(silence[1]) / 1000:g} s, backend.timeout_s"
    else:
        reason = re.sub(r"^\[[^\]]*\] |\. This is typically .*", "", words.splitlines()[0])
    return UserError(
        f"another process of the run ended or cannot be reached ({reason}): see its log. The same command goes on from "
        "what is saved"
    )
