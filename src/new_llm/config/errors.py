"""The one error that means: the user's input is at fault."""


class UserError(ValueError):
    """Bad input: one line that says what was wrong, where, and what is allowed.

    The command prints the line and exits with code 2. It is a `ValueError`, so library users may catch it as one.
    """
