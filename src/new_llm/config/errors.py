"""Errors that are not bugs: bad input, the hub out of reach, or a failure of another process."""


class UserError(ValueError):
    """Bad input: one line that says what was wrong, where, and what is allowed.

    The command prints the line and exits with code 2. It is a `ValueError`, so library users may catch it as one.
    """


class OtherProcessError(RuntimeError):
    """Another process of the same training has failed and reports why; this one ends silently.

    `is_user_error`: the other process failed by a `UserError` or an `OSError`, not by a bug.
    """

    def __init__(self, message: str, *, is_user_error: bool) -> None:
        super().__init__(message)
        self.is_user_error = is_user_error


class HubError(UserError):
    """The hub is out of reach. The message says what was requested; the command adds what to do instead."""
