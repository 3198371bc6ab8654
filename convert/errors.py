"""The one error of the converter."""

from __future__ import annotations

from turbojax.errors import UserError


class CheckpointError(UserError):
    """A file or folder cannot be read, recognised or written; the message names it and the trouble, in one line."""
