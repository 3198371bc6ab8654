"""Mistakes that a user can put right, told in one line."""

from __future__ import annotations


class UserError(ValueError):
    """The request cannot be met as it was asked; the message names the offending thing and the way out.

    Raised before anything is loaded, compiled or written wherever that can be known; the command line prints it
    as one line and leaves with exit code 2.
    """
