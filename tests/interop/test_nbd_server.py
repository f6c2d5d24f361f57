"""`enban serve` against clients nobody here wrote: libnbd's tools, QEMU's, fio; and as a process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.command import command, environment
from tests.exports.nbd_peer import KIB, MIB, Peer
from tests.support import check_file, make_qcow2, needs, pattern, qemu_check, qemu_img, qemu_io

needs_nbdinfo = needs("nbdinfo", "libnbd-bin")
needs_nbdcopy = needs("nbdcopy", "libnbd-bin")
needs_qemu_img = needs("qemu-img", "qemu-utils")
needs_qemu_io = needs("qemu-io", "qemu-utils")
needs_fio = needs("fio", "fio")
needs_openssl = needs("openssl", "openssl")

RAW = ("-f", "raw")


class Service:
    """A running `enban serve`. uris: what it announced. log: what it says on standard error."""

    def __init__(
        self, folder: Path, *words: str | Path, uris: int = 1, env: dict[str, str] | None = None
    ) -> None:
        self.log_path = folder / "serve.log"
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                command("serve", *words),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**environment(), **(env or {})},
            )
        assert self.process.stdout is not None
        self.uris = [self.process.stdout.readline().strip() for _ in range(uris)]
        assert all(self.uris), self.log

    @property
    def uri(self) -> str:
        return self.uris[0]

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def stop(self, *, code: int = 0) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == code, self.log


@contextlib.contextmanager
def serve(folder: Path, *words: str | Path, uris: int = 1) -> Iterator[Service]:
    service = Service(folder, *words, uris=uris)
    try:
        yield service
        assert service.process.poll() is None, service.log
        service.stop()
    finally:
        if service.process.poll() is None:
            service.process.kill()
            service.process.wait(10)


def run(*words: str | Path, ok: bool = True) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode == 0) == ok, (
        f"{words}: {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    )
    return done.stdout if ok else done.stdout + done.stderr


def socket_of(uri: str) -> str:
    return uri.split("socket=")[1]


# -- libnbd ------------------------------------------------------------------------------------


@needs_nbdinfo
def test_nbdinfo_lists_and_describes(tmp_path: Path) -> None:
    one, two = make_qcow2(tmp_path / "one.qcow2", 8 * MIB), tmp_path / "two.raw"
    two.write_bytes(pattern(MIB))
    with serve(tmp_path, "-x", "first", "-D", "a disk", one, two, uris=2) as service:
        assert service.uris[0].endswith(f"/first?socket={socket_of(service.uris[0])}")
        assert "/two.raw?" in service.uris[1]
        listed = json.loads(run("nbdinfo", "--list", "--json", service.uris[0].replace("/first?", "/?")))
        exports = {export["export-name"]: export for export in listed["exports"]}
        assert exports["first"]["export-size"] == 8 * MIB
        assert exports["first"]["description"] == "a disk"
        assert exports["two.raw"]["export-size"] == MIB
        for capability in (
            "can_multi_conn",
            "can_flush",
            "can_fua",
            "can_trim",
            "can_zero",
            "can_df",
            "can_cache",
        ):
            assert exports["first"][capability] is True, capability
        assert run("nbdinfo", "--size", service.uris[1]).strip() == str(MIB)
        assert run("nbdinfo", "--map", "--totals", service.uris[1]).split()[:2] == [str(MIB), "100.0%"]
        assert "No such file" in run("nbdinfo", service.uris[0].replace("/first?", "/none?"), ok=False)


@needs_nbdcopy
def test_nbdcopy_there_and_back(tmp_path: Path) -> None:
    source, back = tmp_path / "source.raw", tmp_path / "back.raw"
    with source.open("wb") as file:
        file.write(os.urandom(5 * MIB))
        file.seek(24 * MIB)
        file.write(os.urandom(3 * MIB))
        file.truncate(32 * MIB)
    disk = make_qcow2(tmp_path / "disk.qcow2", 32 * MIB)
    with serve(tmp_path, disk) as service:
        run("nbdcopy", "--flush", source, service.uri)
        run("nbdcopy", service.uri, back)
        assert back.read_bytes() == source.read_bytes()
        depth = run("nbdinfo", "--map=qemu:allocation-depth", service.uri).split()
        assert depth[:3] == ["0", str(5 * MIB), "1"]
    qemu_check(disk)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", disk, source)
    assert disk.stat().st_size < 9 * MIB


@needs_nbdcopy
@needs_qemu_img
def test_nbdcopy_of_a_compressed_overlay(tmp_path: Path) -> None:
    content = (pattern(MIB) + bytes(MIB)) * 4
    (tmp_path / "base.raw").write_bytes(content)
    qemu_img("convert", "-c", *RAW, "-O", "qcow2", tmp_path / "base.raw", tmp_path / "base.qcow2")
    qemu_img(
        "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", tmp_path / "top.qcow2", cwd=tmp_path
    )
    qemu_io(tmp_path / "top.qcow2", f"write -P 7 {MIB // 2} 64k")
    with serve(tmp_path, "-r", tmp_path / "top.qcow2") as service:
        run("nbdcopy", service.uri, tmp_path / "out.raw")
    expected = bytearray(content)
    expected[MIB // 2 : MIB // 2 + 64 * KIB] = b"\7" * 64 * KIB
    assert (tmp_path / "out.raw").read_bytes() == expected


def test_libnbd_from_its_own_python(tmp_path: Path) -> None:
    python = "/usr/bin/python3"
    if (
        not Path(python).exists()
        or subprocess.run([python, "-c", "import nbd"], capture_output=True).returncode
    ):
        pytest.skip("libnbd's Python module is missing (Debian package python3-libnbd)")
    script = """
import nbd, os, sys
h = nbd.NBD()
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(sys.argv[1])
data = os.urandom(1 << 20)
h.pwrite(data, 12345, nbd.CMD_FLAG_FUA)
assert h.pread(1 << 20, 12345) == data
h.zero(4096, 65536, nbd.CMD_FLAG_NO_HOLE); h.trim(65536, 1 << 21); h.cache(65536, 0); h.flush()
extents = []
h.block_status(4 << 20, 0, lambda context, offset, found, error: extents.extend(found))
assert sum(extents[::2]) == 4 << 20, extents
for bad in (lambda: h.pread(1, h.get_size()), lambda: h.pwrite(b"x", h.get_size())):
    h.set_strict_mode(0)
    try: bad()
    except nbd.Error: pass
    else: raise SystemExit("a request past the end was answered")
buffers = [nbd.Buffer(4096) for _ in range(64)]
cookies = [h.aio_pread(buffer, place * 8192) for place, buffer in enumerate(buffers)]
for cookie in cookies:
    while not h.aio_command_completed(cookie): h.poll(-1)
h.shutdown()
"""
    with serve(tmp_path, make_qcow2(tmp_path / "d.qcow2", 4 * MIB)) as service:
        run(python, "-c", script, service.uri)


# -- QEMU's programs ---------------------------------------------------------------------------


@needs_qemu_img
@needs_qemu_io
def test_qemu_programs_over_nbd(tmp_path: Path) -> None:
    disk = make_qcow2(tmp_path / "d.qcow2", 64 * MIB)
    source = tmp_path / "source.raw"
    source.write_bytes(os.urandom(20 * MIB) + bytes(44 * MIB))
    with serve(tmp_path, "-p", "0", disk, uris=2) as service:
        uri = next(uri for uri in service.uris if "127.0.0.1" in uri)
        qemu_img("convert", "-n", *RAW, "-O", "raw", source, uri)
        qemu_img("compare", *RAW, "-F", "raw", source, uri)
        qemu_io(
            uri, "write -P 3 1M 64k", "read -P 3 1M 64k", "write -z 2M 1M", "read -P 0 2M 1M", options=RAW
        )
        qemu_io(uri, "write -z -u 3M 1M", "discard 5M 1M", "flush", "write -f -P 9 30M 1M", options=RAW)
        qemu_io(uri, "read -P 9 30M 1M", "read -P 0 40M 4M", options=RAW)
        mapped = json.loads(qemu_img("map", "--output=json", *RAW, uri))
        assert sum(run["length"] for run in mapped) == 64 * MIB
        assert any(run["zero"] and not run["data"] for run in mapped)
        qemu_img("convert", *RAW, "-O", "qcow2", uri, tmp_path / "copy.qcow2")
        qemu_img("compare", *RAW, "-F", "qcow2", uri, tmp_path / "copy.qcow2")
    qemu_check(disk)
    check_file(disk)


@needs_qemu_io
def test_slice_and_read_only(tmp_path: Path) -> None:
    disk = tmp_path / "d.raw"
    disk.write_bytes(bytes(MIB) + b"\5" * MIB + bytes(MIB))
    with serve(tmp_path, *RAW, "-r", "--offset", "1M", "--size", "1M", disk) as service:
        qemu_io(service.uri, "read -P 5 0 1M", options=("-r", *RAW))
        assert "Permission denied" in run("qemu-io", *RAW, "-c", "write 0 512", service.uri, ok=False)
    for words in (("--offset", "4M"), ("--size", "4M"), ("-e", "x"), ("-p", "70000"), ("-x", "a", "-x", "b")):
        done = subprocess.run(
            command("serve", *words, disk), capture_output=True, text=True, env=environment(), timeout=30
        )
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr


@needs_nbdinfo
@needs_nbdcopy
@needs_qemu_img
@needs_qemu_io
def test_simple_replies_alone(tmp_path: Path) -> None:
    content = os.urandom(8 * MIB) + bytes(8 * MIB)
    source, out, copy = tmp_path / "source.raw", tmp_path / "out.raw", tmp_path / "copy.qcow2"
    source.write_bytes(content)
    disk = make_qcow2(tmp_path / "d.qcow2", 16 * MIB)
    with serve(tmp_path, "--no-sr", disk) as service:
        run("nbdcopy", "--flush", source, service.uri)
        described = json.loads(run("nbdinfo", "--json", service.uri))
        (export,) = described["exports"]
        assert described["structured"] is False and export["can_df"] is False
        assert "contexts" not in export
        assert "metadata context" in run("nbdinfo", "--map", service.uri, ok=False)
        qemu_io(service.uri, "write -P 9 1M 4k", "read -P 9 1M 4k", options=RAW)
        assert json.loads(run(*command("map", "--output=json", service.uri)))[0]["length"] == 16 * MIB
    content = content[:MIB] + b"\t" * 4 * KIB + content[MIB + 4 * KIB :]
    with serve(tmp_path, "-r", "--no-structured-replies", disk) as service:
        # Small pieces, one after another: these are sent from mapped memory after a while.
        run("nbdcopy", "--request-size=4096", "--requests=4", "--no-extents", service.uri, out)
        assert out.read_bytes() == content
        qemu_img("compare", *RAW, "-F", "qcow2", service.uri, disk)
        run(*command("convert", "-O", "qcow2", service.uri, copy))
    qemu_img("compare", "-f", "raw", "-F", "qcow2", out, copy)
    qemu_check(disk)
    done = subprocess.run(
        command("serve", "--no-sr", "-B", "b", disk), capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "enban: --bitmap needs structured replies; leave out --no-structured-replies or --bitmap"
    ]


# -- fio ---------------------------------------------------------------------------------------


def fio(uri: str, *words: str) -> dict[str, object]:
    common = ("--ioengine=nbd", f"--uri={uri}", "--output-format=json", "--verify_state_save=0")
    out = run("fio", *common, "--name=job", *words)
    result: dict[str, object] = json.loads(out[out.index("{") :])
    return result


@needs_fio
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_fio_verifies_what_it_wrote(tmp_path: Path, format: str) -> None:
    disk = tmp_path / f"d.{format}"
    if format == "raw":
        with disk.open("wb") as file:
            file.truncate(64 * MIB)
    else:
        make_qcow2(disk, 64 * MIB)
    with serve(tmp_path, "-f", format, disk) as service:
        common = ("--verify=crc32c", "--verify_fatal=1", "--iodepth=32", "--size=64m")
        fio(service.uri, "--rw=randwrite", "--bsrange=512-128k", "--bs_unaligned=0", *common)
        fio(service.uri, "--rw=randtrim", "--bs=64k", "--iodepth=16", "--size=64m", "--io_size=16m")
        fio(
            service.uri,
            "--rw=randwrite",
            "--bs=4k",
            "--numjobs=4",
            "--thread",
            "--size=16m",
            "--offset_increment=16m",
            "--fsync=64",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--iodepth=32",
        )
    if format == "qcow2":
        qemu_check(disk)


def load(tmp_path: Path, seconds: int) -> None:
    """16 connections, 64 deep, of everything, with verification; memory stays flat."""
    disk = make_qcow2(tmp_path / "d.qcow2", 256 * MIB)
    with serve(tmp_path, disk) as service:
        peak = []
        started = time.monotonic()
        rounds = 0
        while time.monotonic() - started < seconds or rounds < 2:
            rounds += 1
            fio(
                service.uri,
                "--rw=randwrite",
                "--bssplit=4k/60:512/10:64k/20:256k/10",
                "--size=16m",
                "--offset_increment=16m",
                "--numjobs=16",
                "--thread",
                "--iodepth=64",
                "--fsync=100",
                "--verify=crc32c",
                "--verify_fatal=1",
                f"--randseed={rounds}",
            )
            fio(service.uri, "--rw=trimwrite", "--bs=64k", "--size=256m", "--io_size=64m", "--iodepth=32")
            fio(
                service.uri,
                "--rw=randrw",
                "--bs=4k",
                "--size=256m",
                "--io_size=16m",
                "--numjobs=16",
                "--thread",
                "--iodepth=64",
            )
            peak.append(resident_kib(service.process.pid))
        assert peak[-1] < peak[0] * 1.2 + 5_000, peak
        assert peak[-1] < 100_000, peak
        service.process.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        counts = next(line for line in service.log.splitlines() if "requests begun" in line)
        words = counts.replace(",", "").split()
        begun, done, failed, cancelled = (int(word) for word in words if word.isdigit())
        assert begun == done and not failed and not cancelled, counts
        assert begun > 50_000
    qemu_check(disk)
    check_file(disk)


def resident_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


@needs_fio
@needs_qemu_img
def test_load(tmp_path: Path) -> None:
    load(tmp_path, 10)


@needs_fio
@needs_qemu_img
@pytest.mark.long
def test_load_for_two_minutes(tmp_path: Path) -> None:
    load(tmp_path, 120)


# -- the process -------------------------------------------------------------------------------


@needs_fio
def test_a_killed_client_is_noticed_by_nobody_else(tmp_path: Path) -> None:
    disk = make_qcow2(tmp_path / "d.qcow2", 64 * MIB)
    with serve(tmp_path, disk) as service:
        with Peer(socket_of(service.uri)) as peer:
            peer.write(0, pattern(64 * KIB))
            for _ in range(3):
                words = [
                    "fio",
                    "--name=x",
                    "--ioengine=nbd",
                    f"--uri={service.uri}",
                    "--rw=randrw",
                    "--bs=64k",
                ]
                words += [
                    "--iodepth=32",
                    "--offset=32m",
                    "--size=32m",
                    "--time_based",
                    "--runtime=60",
                    "--thread",
                ]
                victim = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                # Two connections at least, and the victim has requests at work, before it dies.
                wait_for_status(service, r"[2-9] client\(s\) now(?s:.*?)[1-9]\d* in flight")
                victim.kill()
                victim.wait(10)
                assert peer.read(0, 64 * KIB) == pattern(64 * KIB)
            peer.close()
        wait_for_status(service, r" 0 client\(s\) now")
    check_file(disk)


def wait_for_status(service: Service, words: str) -> None:
    """Ask the server again and again what it is doing until the answer has the words."""
    deadline = time.monotonic() + 60
    while True:
        before = len(service.log)
        service.process.send_signal(signal.SIGUSR1)
        time.sleep(0.2)
        if re.search(words, service.log[before:]):
            return
        assert time.monotonic() < deadline, service.log


def test_sigterm_flushes_and_cleans_up(tmp_path: Path) -> None:
    disk = make_qcow2(tmp_path / "d.qcow2", 4 * MIB)
    pid_file = tmp_path / "pid"
    service = Service(tmp_path, "--pid-file", pid_file, disk)
    path = Path(socket_of(service.uri))
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert int(pid_file.read_text()) == service.process.pid
    with Peer(str(path)) as peer:
        peer.write(0, pattern(MIB))  # not flushed by the client
        service.stop()
        assert peer.socket.recv(1) == b""
    assert not pid_file.exists() and not path.exists() and not path.parent.exists()
    report = check_file(disk)
    assert report.leaks == []
    with serve(tmp_path, "-r", disk) as again, Peer(socket_of(again.uri)) as peer:
        assert peer.read(0, MIB) == pattern(MIB)


def test_idle_exit(tmp_path: Path) -> None:
    service = Service(tmp_path, "--idle-exit", "1", make_qcow2(tmp_path / "d.qcow2", MIB))
    assert service.process.wait(20) == 0
    assert "no client for 1 s" in service.log


def test_an_image_in_use_is_not_served(tmp_path: Path) -> None:
    disk = make_qcow2(tmp_path / "d.qcow2", MIB)
    with serve(tmp_path, disk):
        done = subprocess.run(
            command("serve", disk), capture_output=True, text=True, env=environment(), timeout=30, check=False
        )
    assert done.returncode == 1 and "another process is using the image" in done.stderr


def test_sockets_passed_by_systemd(tmp_path: Path) -> None:
    """The protocol of sd_listen_fds(3): descriptor 3, two variables."""
    disk = make_qcow2(tmp_path / "d.qcow2", MIB)
    path = tmp_path / "activated"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        # As systemd does it: fork, set LISTEN_PID to the child's own id, exec.
        starter = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3, inheritable=True); "
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); "
            "os.execv(sys.argv[2], sys.argv[2:])"
        )
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                starter,
                str(listener.fileno()),
                *command("serve", "--idle-exit", "1", disk),
            ],
            pass_fds=[listener.fileno(), 3],
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == f"nbd+unix:///?socket={path}"
    with Peer(str(path)) as peer:
        peer.write(0, b"activated")
        assert peer.read(0, 9) == b"activated"
        peer.close()
    assert process.wait(20) == 0


def test_trace_tells_each_request_s_life(tmp_path: Path) -> None:
    disk = make_qcow2(tmp_path / "d.qcow2", 4 * MIB)
    trace = tmp_path / "trace.json"
    with serve(tmp_path, "--trace", trace, disk) as service, Peer(socket_of(service.uri)) as peer:
        peer.write(100, b"x" * 5000)
        peer.read(0, 8192)
        peer.ask(3)
        peer.close()
    events = json.loads(trace.read_text())
    names = [event["name"] for event in events]
    begun = [event for event in events if event["ph"] == "b"]
    assert [event["name"] for event in begun] == ["WRITE", "READ", "FLUSH"]
    ended = {event["id"]: event["ts"] for event in events if event["ph"] == "e"}
    for event in begun:
        assert ended[event["id"]] > event["ts"] >= 0
    for words in (
        "map",
        "reserve",
        "publish",
        "wait for range lock",
        "write",
        "read",
        "flush tables",
        "sync",
    ):
        assert f"{words} (d.qcow2)" in names, words
    write = next(event for event in events if event["name"] == "WRITE" and event["ph"] == "X")
    inside = [
        event
        for event in events
        if event["ph"] == "X"
        and event["tid"] == write["tid"]
        and write["ts"] <= event["ts"]
        and event["ts"] + event["dur"] <= write["ts"] + write["dur"] + 0.01
    ]
    stored = next(
        event for event in inside if event["name"] == "write (d.qcow2)" and event["args"]["length"] == 5000
    )
    assert stored["args"]["offset"] % 65536 == 100


# -- TLS ---------------------------------------------------------------------------------------


def make_certificates(folder: Path) -> Path:
    """A CA, a server's and a client's certificate, named as QEMU and libnbd want them."""
    folder.mkdir()

    def openssl(*words: str) -> None:
        run("openssl", *words)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    ca, ca_key = str(folder / "ca-cert.pem"), str(folder / "ca-key.pem")
    openssl("req", "-x509", *new_key, "-keyout", ca_key, "-out", ca, "-subj", "/CN=test CA", "-days", "2")
    for role in ("server", "client"):
        key, request = str(folder / f"{role}-key.pem"), str(folder / f"{role}.csr")
        openssl("req", *new_key, "-keyout", key, "-out", request, "-subj", f"/CN={role}")
        names = folder / "names"
        names.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        certificate = str(folder / f"{role}-cert.pem")
        signing = ("-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-days", "2", "-extfile", str(names))
        openssl("x509", "-req", "-in", request, "-out", certificate, *signing)
    return folder


@needs_openssl
@needs_nbdinfo
@needs_nbdcopy
def test_tls_with_certificates(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path / "certs")
    stranger = tmp_path / "stranger"
    shutil.copytree(certificates, stranger)
    for name in ("client-cert.pem", "client-key.pem"):
        (stranger / name).unlink()
    disk = tmp_path / "d.raw"
    disk.write_bytes(os.urandom(3 * MIB))
    with serve(tmp_path, *RAW, "-p", "0", "--tls-dir", certificates, disk, uris=2) as service:
        uri = next(uri for uri in service.uris if "127.0.0.1" in uri)
        assert uri.startswith("nbds://")
        host = uri.replace("127.0.0.1", "localhost")
        with_certificates = f"{host}?tls-certificates={certificates}"
        # libnbd 1.14 cannot say more about a connection that TLS closed than that it ended.
        assert "with TLS" in run("nbdinfo", with_certificates)
        run("nbdcopy", with_certificates, tmp_path / "copy.raw")
        assert (tmp_path / "copy.raw").read_bytes() == disk.read_bytes()
        run("nbdinfo", f"{host}?tls-certificates={stranger}", ok=False)
        run("nbdinfo", uri.replace("nbds:", "nbd:"), ok=False)
    with serve(
        tmp_path, *RAW, "-p", "0", "--tls-dir", certificates, "--tls-any-client", disk, uris=2
    ) as service:
        uri = next(uri for uri in service.uris if "127.0.0.1" in uri)
        host = uri.replace("127.0.0.1", "localhost")
        assert "with TLS" in run("nbdinfo", f"{host}?tls-certificates={stranger}")
    done = subprocess.run(
        command("serve", "--tls-dir", tmp_path, disk),
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 1 and "server-cert.pem" in done.stderr


# -- a guest -----------------------------------------------------------------------------------
