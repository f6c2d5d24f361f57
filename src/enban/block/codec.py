"""Compression of single clusters, the one place that talks to compression libraries.

zlib clusters are raw deflate streams with a 4 KiB window (qcow2 specification, "Compressed
Clusters Descriptor"); zstd clusters are one or more zstd frames. isal is several times as
fast as zlib and keeps inside the window; without it the standard library does the work.
"""

from __future__ import annotations

from ..errors import CorruptDataError, UnsupportedFeatureError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Inflate = Callable[[bytes | bytearray | memoryview, int], bytes]
    Deflate = Callable[[bytes | bytearray | memoryview], bytes]

_PROBE = 2048  # bytes at the start of a cluster that tell whether it can be packed

_inflaters: dict[str, Inflate] = {}


def inflate(
    codec: str, packed: bytes | bytearray | memoryview, size: int, *, path: str, offset: int
) -> bytes:
    """Unpack one cluster to exactly `size` bytes; trailing bytes after the stream are ignored.

    Never makes more than `size` bytes, whatever the stream says. Raises CorruptDataError.
    """
    function = _inflaters.get(codec)
    if function is None:
        function = _inflaters[codec] = _load_inflater(codec)
    try:
        data = function(packed, size)
    except Exception as error:  # the libraries' own classes differ; all mean the same here
        raise CorruptDataError(
            f"compressed cluster cannot be unpacked: {error}",
            path=path,
            offset=offset,
            hint="the data is lost",
        ) from None
    if len(data) != size:
        raise CorruptDataError(
            f"compressed cluster holds {len(data)} bytes instead of {size}",
            path=path,
            offset=offset,
            hint="the data is lost",
        )
    return data


def _load_inflater(codec: str) -> Inflate:
    if codec == "zlib":
        try:
            from isal import isal_zlib as zlib
        except ImportError:
            import zlib  # type: ignore[no-redef]

        def inflate_zlib(packed: bytes | bytearray | memoryview, size: int) -> bytes:
            # Old writers used larger windows than the specification's -12; reading takes them all.
            return bytes(zlib.decompressobj(-15).decompress(packed, size))

        return inflate_zlib
    if codec == "zstd":
        return _load_zstd_inflater()
    raise UnsupportedFeatureError(f"compression type '{codec}' is not known")


def _load_zstd_inflater() -> Inflate:
    zstandard = _zstandard()
    import threading
    from io import BytesIO

    local = threading.local()  # a decompressor serves one thread at a time and is dear to make

    def inflate_zstd(packed: bytes | bytearray | memoryview, size: int) -> bytes:
        decompressor = getattr(local, "decompressor", None)
        if decompressor is None:
            decompressor = local.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        # The library makes room for what the frame says it holds, whatever max_output_size is.
        if (stated := zstandard.frame_content_size(packed)) > size:
            raise ValueError(f"it says it holds {stated} bytes")
        data: bytes = decompressor.decompress(packed, max_output_size=size)
        if len(data) < size:  # more than one frame
            with decompressor.stream_reader(BytesIO(packed), read_across_frames=True) as reader:
                data = b""
                while len(data) < size and (piece := reader.read(size - len(data))):
                    data += piece
        return data

    return inflate_zstd


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise UnsupportedFeatureError(
            "zstd compression needs the package zstandard", hint="run: pip install zstandard"
        ) from None
    return zstandard


def deflater(codec: str, level: int | None = None) -> Deflate:
    """A function that packs one cluster. It may be called from several threads at once."""
    if codec == "zlib":
        try:
            from isal import igzip_lib

            def deflate_isal(data: bytes | bytearray | memoryview) -> bytes:
                chosen = level
                if chosen is None:
                    # Level 3 packs a little better than zlib's 6, but is slow at what cannot be packed.
                    head = igzip_lib.compress(data[:_PROBE], 1, flag=igzip_lib.COMP_DEFLATE, hist_bits=12)
                    chosen = 3 if len(head) < _PROBE else 1
                return bytes(
                    igzip_lib.compress(data, min(chosen, 3), flag=igzip_lib.COMP_DEFLATE, hist_bits=12)
                )

            return deflate_isal
        except ImportError:
            import zlib

            zlib_level = 6 if level is None else level

            def deflate_zlib(data: bytes | bytearray | memoryview) -> bytes:
                stream = zlib.compressobj(zlib_level, zlib.DEFLATED, -12)
                return stream.compress(data) + stream.flush()

            return deflate_zlib
    if codec == "zstd":
        zstandard = _zstandard()
        import threading

        local = threading.local()
        zstd_level = 3 if level is None else level

        def deflate_zstd(data: bytes | bytearray | memoryview) -> bytes:
            size = len(data)
            if getattr(local, "size", -1) != size:
                # Told the size, it takes smaller tables for the same result: an eighth faster at 64 KiB.
                chosen = zstandard.ZstdCompressionParameters.from_level(zstd_level, source_size=size)
                local.compressor = zstandard.ZstdCompressor(compression_params=chosen)
                local.size = size
            return bytes(local.compressor.compress(data))

        return deflate_zstd
    raise UnsupportedFeatureError(f"compression type '{codec}' is not known")
