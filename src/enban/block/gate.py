"""May an image have another file opened?

An image names its backing file and its data file. Whoever made the image chose these names,
so opening them is a decision of the caller, expressed as a Gate.
"""

from __future__ import annotations

import os

from ..errors import GateError


class Gate:
    """A policy for names found inside images. `kind` is one of the three constants below."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def check(self, reference: str, *, image: str, role: str) -> None:
        """Refuse with GateError, or return. role: "backing file" or "data file"."""
        if self.kind == "trusted":
            return
        if self.kind == "closed":
            raise GateError(
                f"the image names a {role} '{reference}', and opening it is not allowed",
                path=image,
                hint="trust the image explicitly if that is wanted",
            )
        # The place a name leads to counts, with every symbolic link on the way followed.
        home = os.path.realpath(os.path.dirname(image))
        inside = ":" not in reference and "\0" not in reference and not os.path.isabs(reference)
        if not inside or not os.path.realpath(os.path.join(home, reference)).startswith(
            os.path.join(home, "")
        ):
            raise GateError(
                f"the image names a {role} '{reference}' outside its own directory",
                path=image,
                hint="trust the image explicitly if that is wanted",
            )

    def __repr__(self) -> str:
        return f"<Gate {self.kind}>"


TRUSTED = Gate("trusted")  # every name is opened
SIBLINGS = Gate("siblings")  # only plain relative names at or below the image's own directory
CLOSED = Gate("closed")  # none is opened
