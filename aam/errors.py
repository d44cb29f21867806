"""What a user is told: one line on standard error, or an error that ends the command."""

from __future__ import annotations

import sys


class InputError(ValueError):
    """Input that cannot be used: one line naming the file, column or ids, and the remedy.

    The command line prints the message as ``error: ...`` on standard error and exits with 2.
    """


def log(text: str = "") -> None:
    """One line for the person who waits, on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
