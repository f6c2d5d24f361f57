"""What is kept of a failure: enough for a person to see it, and for the command to do it again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .oracle import Violation
from .workload import Operation


class Finding:
    """A promise that was broken.

    part: of the lab; kind: of violation (see `oracle`); image: the kind of image; seed: of the
    workload. script: the operations that show it, as few as were found to be enough. before,
    after: the image at the start, and the state that is wrong. again: the command that repeats it.
    """

    def __init__(
        self,
        part: str,
        image: str,
        seed: int,
        violation: Violation,
        *,
        script: Sequence[Operation] = (),
        before: bytes | bytearray | None = None,
        again: str = "",
    ) -> None:
        self.part = part
        self.kind = violation.kind
        self.image = image
        self.seed = seed
        self.text = str(violation)
        self.script = list(script)
        self.before = before
        self.after = violation.image
        self.again = again or f"enban torture {part} --seed {seed} --only {image} --count 1"
        self.directory = ""

    def as_dict(self) -> dict[str, object]:
        return {
            "part": self.part,
            "kind": self.kind,
            "image": self.image,
            "seed": self.seed,
            "text": self.text,
            "script": [str(operation) for operation in self.script],
            "again": self.again,
            "directory": self.directory,
        }

    def save(self, parent: Path) -> Path:
        """Write report, script and images to a new directory below `parent`. Raises OSError."""
        number = 1
        while (directory := parent / f"{self.part}-{self.image}-{self.seed}-{number}").exists():
            number += 1
        directory.mkdir(parents=True)
        self.directory = str(directory)
        lines = [f"# {self.image}, seed {self.seed}", *map(str, self.script)]
        if self.script:
            (directory / "script.txt").write_text("\n".join(lines) + "\n")
        for name, content in (("before.img", self.before), ("after.img", self.after)):
            if content is not None:
                (directory / name).write_bytes(content)
        report = [f"{self.kind} found by {self.part}: {self.text}", f"again: {self.again}"]
        if self.script:
            report.append(
                f"the script alone: enban torture {self.part} --only {self.image} --seed {self.seed} "
                f"--script {directory / 'script.txt'}"
            )
        (directory / "report.txt").write_text("\n".join(report) + "\n")
        return directory
