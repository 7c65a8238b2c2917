"""The one exception a user is meant to see."""


class UserError(Exception):
    """A mistake or fault outside the program: what is wrong, where, and what to do, in one line.

    The command line prints the message without a traceback and exits with code 2.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


class Unfit(UserError):
    """A fault that the same input would have again, so that nothing already done for it is of use."""


def of_system(error: OSError, where: object = "") -> UserError:
    """What the operating system refused, in one line: a full disk, a vanished file, missing rights."""
    return UserError(f"{error.filename or where or 'the system'}: {error.strerror or error}")
