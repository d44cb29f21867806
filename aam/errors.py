"""The one exception that a user's input can cause."""


class InputError(ValueError):
    """Input that cannot be used: one line naming the file, column or ids, and the remedy.

    The command line prints the message as ``error: ...`` on standard error and exits with 2.
    """
