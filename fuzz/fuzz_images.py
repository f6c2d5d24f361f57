"""Coverage-guided fuzzing of images with atheris (pip install 'enban[fuzz]'):

    python fuzz/fuzz_images.py -max_total_time=60 fuzz/corpus

An input is an image, or one packed by zlib as those of the corpus are. `enban torture fuzz` does
without atheris: it breaks images with knowledge of their structure.
"""

from __future__ import annotations

import sys
import zlib

import atheris

with atheris.instrument_imports(include=["enban.formats", "enban.wire", "enban.block"]):
    from enban.lab.fuzz import one

LARGEST = 1 << 20


def image_of(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, LARGEST)
    except zlib.error:
        return data


def test_one_input(data: bytes) -> None:
    one(image_of(data), note="input")


def custom_mutator(data: bytes, most: int, seed: int) -> bytes:
    """Mutate the image, not its packed bytes."""
    changed = atheris.Mutate(image_of(data), LARGEST)
    packed = zlib.compress(changed, 1)
    return packed if len(packed) <= most else data


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input, custom_mutator=custom_mutator)
    atheris.Fuzz()
