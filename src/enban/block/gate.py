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
        normal = os.path.normpath(reference)
        if (
            os.path.isabs(normal)
            or normal.split(os.sep)[0] == os.pardir
            or ":" in reference
            or "\0" in reference
            or os.path.islink(os.path.join(os.path.dirname(image), normal))
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
