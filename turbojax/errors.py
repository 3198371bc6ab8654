"""Mistakes that a user can put right, told in one line."""

from __future__ import annotations


class UserError(ValueError):
    """The request cannot be met as it was asked; the message names the offending thing and the way out.

    Raised before anything is loaded, compiled or written wherever that can be known; the command line prints it
    as one line and leaves with exit code 2.
    """

    def __init__(self, message: str):
        # Names out of a file may hold line breaks, or what a terminal takes for a command.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))
