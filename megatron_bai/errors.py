"""The one exception a user is meant to see."""


class UserError(Exception):
    """A mistake or fault outside the program: what is wrong, where, and what to do, in one line.

    The command line prints the message without a traceback and exits with code 2.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))
