"""What a check found, and the result it ends with.

Every kind of finding has one name and one severity. The numbers are exact; of the findings
themselves the first hundred are kept, so a ruined image costs no memory.
"""

from __future__ import annotations

from ...errors import InternalError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

CORRUPTION, LEAK, ERROR, NOTE = "corruption", "leak", "error", "note"
MOST_KEPT = 100

# Kinds that QEMU's check does not look for (or, as the last one, does not count).
BEYOND_QEMU = (
    "cut-short",
    "overlap",
    "zero-flag",
    "copied-no-cluster",
    "l1-no-table",
    "bitmap-entry",
    "leak-past-end",
)

SEVERITY = {
    # places
    "past-end": CORRUPTION,  # a table or other structure lies behind the end of the file
    "cut-short": CORRUPTION,  # it begins inside the file and ends behind it
    "overlap": CORRUPTION,  # a table's cluster is in use for something else too
    # L1 and L2 tables
    "l1-reserved": CORRUPTION,
    "l1-unaligned": CORRUPTION,
    "l1-no-table": CORRUPTION,
    "l1-past-end": CORRUPTION,
    "l2-reserved": CORRUPTION,
    "l2-unaligned": CORRUPTION,
    "l2-past-end": CORRUPTION,
    "zero-flag": CORRUPTION,  # where the format has none
    "copied-no-cluster": CORRUPTION,
    "packed-copied": CORRUPTION,
    "packed-external": CORRUPTION,
    "packed-subclusters": CORRUPTION,
    "packed-past-end": CORRUPTION,
    "packed-unreadable": CORRUPTION,  # qcow only: it does not unpack
    "subclusters-both": CORRUPTION,
    "subclusters-no-cluster": CORRUPTION,
    "copied-l1": CORRUPTION,
    "copied-l2": CORRUPTION,
    # refcounts
    "refcount-low": CORRUPTION,
    "refcount-overflow": CORRUPTION,
    "refcount-leak": LEAK,
    "leak-past-end": LEAK,
    "unused": LEAK,  # qcow only: space that no table names
    "refcount-unreadable": ERROR,
    "block-reserved": CORRUPTION,
    "block-unaligned": CORRUPTION,
    "block-past-end": CORRUPTION,
    "block-shared": CORRUPTION,
    # snapshots, bitmaps, encryption
    "snapshot-external": CORRUPTION,
    "snapshot-table": CORRUPTION,
    "snapshot-l1": CORRUPTION,
    "snapshot-incomplete": CORRUPTION,
    "bitmap-directory": CORRUPTION,
    "bitmap-entry": CORRUPTION,
    "bitmap-table": CORRUPTION,
    "crypto-header": CORRUPTION,
    # the state of the image, and of a repair
    "dirty": NOTE,
    "corrupt": NOTE,
    "unknown-autoclear": NOTE,
    "leaks-kept": NOTE,
    "repair-impossible": ERROR,
    # what a repair did
    "dropped": NOTE,
    "flag-cleared": NOTE,
    "refcounts-raised": NOTE,
    "refcounts-lowered": NOTE,
    "refcounts-rebuilt": NOTE,
    "copied-set": NOTE,
    "snapshot-table-written": NOTE,
    "bitmaps-dropped": NOTE,
    "bits-cleared": NOTE,
}


class Finding:
    """One thing found. kind: a key of SEVERITY. offset: byte offset in the image file, -1 if
    there is none. text: one line. count: how often it counts (references to a shared table)."""

    __slots__ = ("count", "kind", "offset", "text")

    def __init__(self, kind: str, offset: int, text: str, count: int = 1) -> None:
        self.kind = kind
        self.offset = offset
        self.text = text
        self.count = count

    @property
    def severity(self) -> str:
        """ "corruption", "leak", "error" (could not be checked) or "note"."""
        return SEVERITY[self.kind]

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"<Finding {self.kind} {self.offset:#x} x{self.count}: {self.text}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Finding) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[str, int, str, int]:
        return self.kind, self.offset, self.text, self.count


class Findings:
    """Counts by kind, and the first findings."""

    __slots__ = ("kept", "kinds")

    def __init__(self) -> None:
        self.kept: list[Finding] = []
        self.kinds: dict[str, int] = {}

    def add(self, kind: str, offset: int, text: str, count: int = 1) -> None:
        if kind not in SEVERITY:
            raise InternalError(f"finding kind {kind} has no severity", hint="please report this")
        if count:
            self.kinds[kind] = self.kinds.get(kind, 0) + count
            if len(self.kept) < MOST_KEPT:
                self.kept.append(Finding(kind, offset, text, count))

    def many(self, kind: str, count: int, examples: Iterable[tuple[int, str]], each: int = 1) -> None:
        """`count` in all; the examples, in order, are kept while there is room and count `each`."""
        if count:
            self.kinds[kind] = self.kinds.get(kind, 0) + count
            room = MOST_KEPT - len(self.kept)
            for offset, text in examples:
                if room <= 0:
                    break
                self.kept.append(Finding(kind, offset, text, each))
                room -= 1

    @property
    def room(self) -> int:
        return MOST_KEPT - len(self.kept)

    def total(self, severity: str, *, but: tuple[str, ...] = ()) -> int:
        """How many of a severity, kinds in `but` left out."""
        return sum(
            count for kind, count in self.kinds.items() if SEVERITY[kind] == severity and kind not in but
        )


class CheckResult:
    """What `check` says of an image; numbers as in `qemu-img check --output=json`.

    image_end_offset: bytes, the end of the last host cluster in use.
    total_clusters: guest clusters of the disk; allocated_clusters, fragmented_clusters,
        compressed_clusters: of those, how many have a place, do not follow their neighbour in
        the file, are compressed.
    check_errors: what could not be checked. corruptions, leaks: what is wrong; after a repair,
        what still is. corruptions_fixed, leaks_fixed: what the repair set right.
    dirty, corrupt: the header's bits, as they are now.
    findings, kinds: what is wrong, the first hundred, and exact numbers by kind.
    repaired, repaired_kinds: the same for what a repair found and did.
    """

    def __init__(self, filename: str, format: str) -> None:
        self.filename = filename
        self.format = format
        self.image_end_offset = 0
        self.total_clusters = 0
        self.allocated_clusters = 0
        self.fragmented_clusters = 0
        self.compressed_clusters = 0
        self.check_errors = 0
        self.corruptions = 0
        self.leaks = 0
        self.corruptions_fixed = 0
        self.leaks_fixed = 0
        self.dirty = False
        self.corrupt = False
        self.findings: list[Finding] = []
        self.kinds: dict[str, int] = {}
        self.repaired: list[Finding] = []
        self.repaired_kinds: dict[str, int] = {}

    @property
    def clean(self) -> bool:
        return not (self.corruptions or self.leaks or self.check_errors)

    @property
    def exit_code(self) -> int:
        """As of `qemu-img check`: 0 clean, 1 not checked completely, 2 corrupt, 3 leaks only."""
        if self.check_errors:
            return 1
        if self.corruptions:
            return 2
        return 3 if self.leaks else 0

    def as_dict(self) -> dict[str, Any]:
        """The keys of qemu-img's JSON; like there, most are left out where the number is 0."""
        facts: dict[str, Any] = {
            "filename": self.filename,
            "format": self.format,
            "check-errors": self.check_errors,
        }
        for key, value in (
            ("image-end-offset", self.image_end_offset),
            ("corruptions", self.corruptions),
            ("leaks", self.leaks),
            ("corruptions-fixed", self.corruptions_fixed),
            ("leaks-fixed", self.leaks_fixed),
            ("total-clusters", self.total_clusters),
            ("allocated-clusters", self.allocated_clusters),
            ("fragmented-clusters", self.fragmented_clusters),
            ("compressed-clusters", self.compressed_clusters),
        ):
            if value:
                facts[key] = value
        return facts
