"""Jobs awaited from asyncio: same results, the loop stays free, cancelling cleans up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import enban
import enban.aio


def test_jobs_give_what_the_blocking_ones_give(tmp_path: Path) -> None:
    source, image = tmp_path / "a.raw", tmp_path / "a.qcow2"
    source.write_bytes(b"abc" * 100_000 + bytes(212))

    async def scenario() -> None:
        await enban.aio.convert([str(source)], str(image), target_format="qcow2")
        assert (await enban.aio.check(str(image))).clean
        facts = await enban.aio.image_info(str(image))
        assert facts == enban.image_info(str(image))
        overlay = str(tmp_path / "b.qcow2")
        await enban.aio.create(overlay, "qcow2", {"backing_file": "a.qcow2", "backing_fmt": "qcow2"})
        async with await enban.aio.open(overlay, writable=True) as disk:
            await disk.pwrite(b"xyz", 7)
        await enban.aio.commit(overlay)
        async with await enban.aio.open(image) as disk:
            assert await disk.pread(12, 0) == b"abcabcaxyzbc"
        await enban.aio.rebase(overlay, "")
        assert "backing-filename" not in (await enban.aio.image_info(overlay))[0]
        await enban.aio.amend(overlay, {"compat": "0.10"})
        with pytest.raises(enban.EnbanError, match="cluster_size"):
            await enban.aio.amend(overlay, {"cluster_size": "4k"})
        amended = (await enban.aio.image_info(overlay))[0]
        assert amended["format-specific"]["data"]["compat"] == "0.10"

    asyncio.run(scenario())


def test_the_loop_stays_free_and_cancelling_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    from enban.jobs.sources import Sources

    source = tmp_path / "a.raw"
    source.write_bytes(b"abc" * (4 << 20))
    honest = Sources.read

    def slow(self: Sources, buffer: memoryview, offset: int) -> None:
        time.sleep(0.2)
        honest(self, buffer, offset)

    monkeypatch.setattr(Sources, "read", slow)

    async def scenario() -> int:
        ticks = 0
        job = asyncio.create_task(
            enban.aio.convert([str(source)], str(tmp_path / "b.qcow2"), target_format="qcow2", workers=1)
        )
        while ticks < 20:
            await asyncio.sleep(0.02)
            ticks += 1
        assert not job.done()
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        return ticks

    assert asyncio.run(scenario()) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["a.raw"]
