"""A machine: QEMU, our disks, the console, and what can be asked of them while it runs.

    async with Machine(Settings(disks=["disk.qcow2"])) as machine:
        await machine.console.wait_for(b"login:")
        await machine.save("clean")
        ...
        await machine.load("clean")
        await machine.shutdown()

Life: `start` opens disks, serves them, starts QEMU; `wait` returns when the guest has ended; `shutdown` asks
the guest, then QEMU, then kills; `close` (the end of `async with`) ends what is left and closes the disks,
which writes out all that is in memory. Whatever ends QEMU, the disks are closed in order.

What pauses the guest or changes tables takes `_changing`, so such work is done one after the other. Calls on
disks run in threads: the console and the guest's own I/O go on.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from time import monotonic_ns
from types import TracebackType
from typing import Any

from ..errors import ClosedError, EnbanError, PeerError, UsageError
from ..jobs.backup import BackupResult
from . import live, states
from .backup import backup
from .command import command_line
from .console import Console
from .disks import Disks, GuestDisk
from .keyboard import Pacer
from .places import Place, name_for
from .process import Process, describe_exit
from .program import find_qemu, kvm_trouble
from .qmp import Monitor
from .settings import LAYOUT, Settings
from .states import State
from .vnc import VncFront

GRACE_S = 30.0
TERM_S = 10.0
FOLLOW_S = 1.0  # so often the host's CD-ROM drive is looked after


class Machine:
    """A guest.

    log: gets one line for each thing a person should know. accel: "kvm" or "tcg", once started.
    """

    def __init__(self, settings: Settings, *, log: Callable[[str], None] = lambda text: None) -> None:
        settings.check()
        self.settings = settings
        self.log = log
        self.accel = ""
        self.place: Place | None = None
        self.exit_code: int | None = None
        self.reset_count = 0
        self._program = ""
        self._console: Console | None = None
        self._disks: Disks | None = None
        self._process: Process | None = None
        self._monitor: Monitor | None = None
        self._vnc: VncFront | None = None
        self._pacer: Pacer | None = None
        self._serial: list[str | list[str]] = []
        self._ports: list[asyncio.Task[None]] = []
        self._watcher: asyncio.Task[None] | None = None
        self._follower: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        self._typing = asyncio.Lock()  # one text after the other
        self._ended = asyncio.Event()
        self._loading = False  # a QEMU that ends now is not the end of the machine
        self._starts = 0
        self._ran_ns = 0
        self._since_ns = 0  # 0: it does not run

    # -- life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the disks and start the guest. Nothing is left behind if that fails.

        Raises UsageError (no QEMU, wrong settings), LockedError, HostError, ImageError, PeerError.
        """
        if self.place is not None:
            raise UsageError("a machine is started once", hint="make another one")
        self._program = await asyncio.to_thread(find_qemu, self.settings.qemu)
        self.place = Place(self.name)
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise

    @property
    def name(self) -> str:
        """What `enban ctl` calls it: as the settings say, else as the first disk's file."""
        if self.settings.name:
            return self.settings.name
        for one in self.settings.disk_list():
            if isinstance(one.reference, str):
                return name_for(one.reference)
        return name_for(self.settings.cdrom)

    async def _start(self) -> None:
        place = self.place
        assert place is not None
        self._loop = asyncio.get_running_loop()
        self._disks = Disks(place.file("nbd"), self.log, self._on_full)
        await asyncio.to_thread(self._disks.start, self.settings)
        if await asyncio.to_thread(states.recover, self.disks):
            self.log("a load was cut short last time: the disks are as they were before it")
        self._console = Console(place.file("console"))
        await self._console.listen()
        for port in self.settings.serial:
            if isinstance(port, str):
                self._serial.append(port)
            else:
                arguments, work = port()
                self._serial.append(arguments)
                self._ports.append(asyncio.create_task(self._carry(work)))
                # Let it begin: a task that is cancelled before that has no chance to clean up.
                await asyncio.sleep(0)
        if self.settings.display == "vnc":
            self._vnc = VncFront(report=lambda text: self.log(f"VNC: {text}"), settle=self._keys_were_read)
            upstream = f"unix:{place.file('vnc')}"
            await self._vnc.start(self.settings.vnc, upstream, self.settings.layout or LAYOUT)
            self.log(f"VNC: {self._vnc.address}")
        if self.settings.load:
            await self._start_from(self.settings.load)
        else:
            await self._begin_somehow(incoming=False)
        if not self.settings.paused:
            await self._resume()
        self._follower = asyncio.create_task(self._follow_drive())

    async def _carry(self, work: Coroutine[Any, Any, None]) -> None:
        """A serial line that is served here; the guest goes on without it if it fails."""
        try:
            await work
        except (EnbanError, OSError) as error:
            self.log(f"serial line: {error}")

    def _on_full(self, reason: str) -> None:
        """A disk's thread has no room for a write: pause, then the write is tried again when it goes on."""
        asyncio.run_coroutine_threadsafe(self._pause_when_full(reason), self._loop)

    async def _pause_when_full(self, reason: str) -> None:
        self.log(f"{reason}; the guest is paused. Make room, then: enban ctl NAME resume")
        try:
            await self.execute("stop")
        except (PeerError, ClosedError):
            pass  # it is ending

    async def _follow_drive(self) -> None:
        """A disc that is changed in the host's drive is changed in the guest's."""
        told = ""
        while self.running:
            await asyncio.sleep(FOLLOW_S)
            try:
                async with self._changing:
                    if self.running:
                        await live.follow_drive(self)
                told = ""
            except EnbanError as error:
                if str(error) != told:  # said once, tried again each time
                    told = str(error)
                    self.log(told)

    async def _begin_somehow(self, *, incoming: bool) -> None:
        """Start QEMU with KVM where it works, else TCG."""
        wanted = self.accel or self.settings.accel
        if wanted != "auto":
            self.accel = wanted
            await self._begin(incoming=incoming)
            return
        trouble = kvm_trouble()
        if not trouble:
            self.accel = "kvm"
            try:
                await self._begin(incoming=incoming)
                return
            except PeerError as error:
                trouble = str(error)
        # QEMU says on its own what is wrong with our arguments; so only a failure that TCG has not is KVM's.
        self.accel = "tcg"
        await self._begin(incoming=incoming)
        self.log(f"no KVM here ({trouble}): the guest runs on TCG, which is slower")

    async def _begin(self, *, incoming: bool) -> None:
        """Start QEMU and connect to its monitor; the guest does not run yet."""
        assert self.place is not None and self._disks is not None and self._console is not None
        self._starts += 1
        path = self.place.file(f"monitor{self._starts}")
        monitor = Monitor(f"guest {self._starts}", self._on_event)
        await monitor.listen(path)
        words = command_line(
            self.settings,
            self._disks,
            name=self.name,
            program=self._program,
            accel=self.accel,
            monitor=path,
            console=self._console.path,
            vnc=self.place.file("vnc"),
            serial=self._serial,
            incoming=incoming,
        )
        accepted = asyncio.create_task(monitor.accept())
        said: list[str] = []
        try:
            process = await Process.start(words, said.append)
            ended = asyncio.create_task(process.wait())
            await asyncio.wait([accepted, ended], return_when=asyncio.FIRST_COMPLETED)
            if not accepted.done() or accepted.exception() is not None:
                code = await process.stop(0)
                reason = process.complaint or describe_exit(code)
                raise PeerError(f"QEMU does not start: {reason}")
        except BaseException:
            accepted.cancel()
            await asyncio.wait([accepted])
            if not accepted.cancelled():
                accepted.exception()  # the error that is under way says more
            await monitor.close()
            raise
        finally:
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
        process.log_to(lambda line: self.log(f"QEMU: {line}"))
        self._process, self._monitor = process, monitor
        self._watcher = asyncio.create_task(self._watch(process, monitor))

    async def _watch(self, process: Process, monitor: Monitor) -> None:
        """A QEMU that ends by itself is the end of the machine."""
        code = await process.wait()
        if self._process is not process or self._loading:
            return  # it was replaced, or could not take a state: `load` sees to it
        await self._over(code, monitor)

    async def _over(self, code: int, monitor: Monitor) -> None:
        """QEMU has ended, and with it the machine."""
        self.exit_code = code
        self._stopped()
        await monitor.close()
        if self._console is not None:
            self._console.ended()
        self._ended.set()

    async def _end_qemu(self) -> None:
        """End this QEMU; another one will take its place."""
        process, monitor, self._process, self._monitor = self._process, self._monitor, None, None
        self._stopped()
        if process is not None:
            await process.stop(TERM_S)
        if monitor is not None:
            await monitor.close()

    async def wait(self) -> int:
        """QEMU's exit code, once the guest has ended. 0: the guest powered off or was shut down."""
        await self._ended.wait()
        return self.exit_code or 0

    @property
    def running(self) -> bool:
        """Whether there is a guest, paused or not."""
        return self.place is not None and not self._ended.is_set()

    async def shutdown(self, grace_s: float = GRACE_S) -> None:
        """End the guest: ask it (ACPI power button), after `grace_s` end QEMU, at last kill it.

        A paused guest is resumed, so that it can write out what it holds.
        """
        if not self.running:
            return
        if grace_s > 0:
            try:
                async with asyncio.timeout(grace_s):
                    async with self._changing:
                        await self._resume()
                        await self.execute("system_powerdown")
                    await self._ended.wait()
            except TimeoutError:
                self.log(f"the guest has not shut down within {grace_s:g} s: ending QEMU")
            except (PeerError, ClosedError):
                pass  # it is ending already
        await self.kill()

    async def kill(self) -> None:
        """End QEMU without asking the guest; what the guest has not flushed is as after a power cut."""
        if self._process is not None and self._process.running:
            await self._process.stop(TERM_S)
        if self._process is not None:
            await self._ended.wait()

    def kill_now(self) -> None:
        """Kill QEMU at once."""
        if self._process is not None:
            self._process.signal(signal.SIGKILL)

    async def close(self) -> None:
        """End QEMU if it runs, close the disks. Raises what closing them raises, after everything is done."""
        if self.place is None:
            return
        try:
            await self.kill()
            self._ended.set()
            for task in (*self._ports, self._watcher, self._follower):
                if task is not None:
                    task.cancel()
                    await asyncio.wait([task])
            if self._vnc is not None:
                await self._vnc.close()
            if self._console is not None:
                await self._console.close()
        finally:
            place, self.place = self.place, None
            try:
                if self._disks is not None:
                    await asyncio.to_thread(self._disks.close)
            finally:
                place.release()

    async def __aenter__(self) -> Machine:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- QEMU ---------------------------------------------------------------------------------

    @property
    def console(self) -> Console:
        """The first serial line."""
        if self._console is None:
            raise ClosedError("the machine has not been started")
        return self._console

    @property
    def pid(self) -> int:
        """Process id of QEMU."""
        if self._process is None:
            raise ClosedError("the machine does not run")
        return self._process.pid

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Run a QMP command. Raises PeerError with QEMU's reason."""
        if self._monitor is None:
            raise ClosedError("the machine does not run")
        return await self._monitor.execute(command, arguments)

    def _on_event(self, name: str, data: Mapping[str, Any]) -> None:
        if name == "RESUME":
            self._since_ns = self._since_ns or monotonic_ns()
        elif name == "STOP":
            self._stopped()
        elif name == "RESET" and data.get("guest"):
            self.reset_count += 1
        elif name == "BLOCK_IO_ERROR" and data.get("action") == "stop":
            self.log(
                f"{data.get('device') or data.get('node-name')}: {data.get('reason', 'I/O error')}; "
                "the guest is paused. Make room, then: enban ctl NAME resume"
            )

    def _stopped(self) -> None:
        if self._since_ns:
            self._ran_ns += monotonic_ns() - self._since_ns
            self._since_ns = 0

    @property
    def vm_clock_ns(self) -> int:
        """How long the guest has run, pauses left out, states loaded taken into account."""
        return self._ran_ns + (monotonic_ns() - self._since_ns if self._since_ns else 0)

    async def status(self) -> str:
        """ "running", "paused", or another run state of QEMU; "ended"."""
        if not self.running:
            return "ended"
        return str((await self.execute("query-status"))["status"])

    async def pause(self) -> None:
        await self.execute("stop")

    async def resume(self) -> None:
        async with self._changing:
            await self._resume()

    async def _resume(self) -> None:
        await self.execute("cont")

    async def reset(self) -> None:
        """As the reset button: the guest starts anew, what it has not written is lost."""
        await self.execute("system_reset")

    # -- whole-machine states -----------------------------------------------------------------

    @property
    def disks(self) -> list[GuestDisk]:
        return self._disks.disks if self._disks is not None else []

    async def states(self) -> list[State]:
        """What was saved, oldest first."""
        return await asyncio.to_thread(states.list_states, list(self.disks))

    async def save(self, tag: str) -> State:
        """Keep memory, devices and all disks under a tag. The guest is paused meanwhile.

        Raises UsageError if the tag is taken or a disk cannot keep snapshots; the guest goes on in any case.
        """
        async with self._changing:
            members = states.check_free(self.disks, tag)
            was_running = await self._save(members, tag)
            # QEMU lets go of its disks when it has written its memory; only running takes them again.
            await self._resume()
            if not was_running:
                await self.pause()
            return next(state for state in await self.states() if state.tag == tag)

    async def _save(self, members: list[GuestDisk], tag: str) -> bool:
        """Save and leave the guest paused; whether it ran before. It goes on if it cannot be saved."""
        assert self._monitor is not None and self.place is not None
        was_running = bool((await self.execute("query-status"))["running"])
        await self.execute("stop")
        try:
            await states.save_memory(self._monitor, members[0].disk, self.place.file("state"))
            await asyncio.to_thread(states.keep, members, tag, self.vm_clock_ns)
        except BaseException:
            await self._resume()
            if not was_running:
                await self.pause()
            raise
        return was_running

    async def load(self, tag: str) -> None:
        """Bring back a state: memory, devices, all disks. What is now is given up.

        Raises UsageError if there is no whole state of that name, PeerError if QEMU does not take it; the
        machine then goes on as it was.
        """
        async with self._changing:
            members = states.check_whole(self.disks, tag)
            await asyncio.to_thread(states.forget, members, states.UNDO)
            was_running = await self._save(members, states.UNDO)
            present_ns = self.vm_clock_ns
            self._loading = True
            try:
                await self._end_qemu()
                await self._take_or_return(members, tag, present_ns)
            finally:
                self._loading = False
                process, monitor = self._process, self._monitor
                if process is None or monitor is None:
                    self._ended.set()  # neither the state nor the present could be started
                elif not process.running:
                    await self._over(await process.wait(), monitor)
                elif was_running:
                    await self._resume()
            await asyncio.to_thread(states.forget, members, states.UNDO)

    async def _take_or_return(self, members: list[GuestDisk], tag: str, present_ns: int) -> None:
        """Take a state, or if it is not taken go back to the present, which is the state UNDO."""
        try:
            await self._take(members, tag)
        except BaseException as error:
            await self._end_qemu()
            await self._take(members, states.UNDO)
            self._ran_ns = present_ns
            await asyncio.to_thread(states.forget, members, states.UNDO)
            if isinstance(error, PeerError):
                raise PeerError(f"{error.what}; the machine goes on as it was") from error
            raise

    async def _take(self, members: list[GuestDisk], tag: str) -> None:
        """Set the disks to a state and start a QEMU with its memory, paused. The one before has ended."""
        assert self.place is not None
        await asyncio.to_thread(states.go_to, members, tag)
        await self._begin_somehow(incoming=True)
        assert self._monitor is not None and self._process is not None
        process = self._process
        try:
            await states.load_memory(self._monitor, members[0].disk, self.place.file("state"), process.wait)
        except PeerError as error:
            reason = process.complaint
            raise PeerError(f"state '{tag}' is not loaded: {reason or error.what}") from error
        entry = states.snapshot_of(members[0].disk, tag)
        self._ran_ns = entry.vm_clock_ns if entry is not None else 0

    async def _start_from(self, tag: str) -> None:
        """The first start, from a state. The disks are as they were if it is not taken."""
        members = states.check_whole(self.disks, tag)
        await asyncio.to_thread(states.keep, members, states.UNDO, 0)
        try:
            await self._take(members, tag)
        except BaseException:
            await self._end_qemu()
            await asyncio.to_thread(states.recover, members)
            raise
        await asyncio.to_thread(states.forget, members, states.UNDO)

    async def delete_state(self, tag: str) -> None:
        """Delete a state, or what is left of one. Raises UsageError if there is nothing of that name."""
        async with self._changing:
            members = [one for one in self.disks if one.writable and one.keeps_snapshots]
            if not await asyncio.to_thread(states.forget, members, tag):
                raise UsageError(f"there is no state '{tag}'", hint="see: snapshot list")

    async def commit(self) -> int:
        """Keep what was written since the start of a machine with `snapshot`; the number of bytes written.

        The guest is paused meanwhile. What it holds in its own memory is not in it: sync there first.
        """
        async with self._changing:
            temporary = [one for one in self.disks if one.snapshot]
            if not temporary:
                raise UsageError("the machine runs on its disks themselves", hint="run it with --snapshot")
            async with self.standing_still():
                return sum([await asyncio.to_thread(one.disk.commit) for one in temporary])

    # -- disks, CD-ROM, keyboard, screen: see `live` ---------------------------------------------

    async def resize_disk(self, disk: str, size: int) -> None:
        """Set the size of a disk (id, number or file name), in bytes; the guest is told at once on virtio."""
        async with self._changing:
            await live.resize(self, self.disk_set.find(disk), size)

    async def snapshot_disk(self, disk: str, tag: str) -> None:
        """An internal snapshot of one disk alone, while the guest goes on."""
        async with self._changing:
            await asyncio.to_thread(self.disk_set.find(disk).disk.create_snapshot, tag)

    async def backup_disk(self, disk: str, target: str, *, bitmap: str = "", base: str = "") -> BackupResult:
        """Copy a disk into a new qcow2 image as it is at this moment, while the guest goes on.

        bitmap, base: as for `enban.backup`; without a bitmap it is a full copy that nothing follows.
        """
        async with self._changing:
            return await backup(self, self.disk_set.find(disk), target, bitmap, base)

    @asynccontextmanager
    async def standing_still(self) -> AsyncIterator[None]:
        """The guest is paused in the block, and goes on afterwards if it did before."""
        was_running = bool((await self.execute("query-status"))["running"])
        await self.execute("stop")
        try:
            yield
        finally:
            if was_running:
                await self._resume()

    async def pull_disk(self, disk: str) -> int:
        """Copy into a disk what it shows of its backing files and let go of them, while the guest goes on.
        Returns the number of bytes copied."""
        async with self._changing:
            return await asyncio.to_thread(self.disk_set.find(disk).disk.pull)

    async def insert_cdrom(self, path: str) -> None:
        """Put a disc into the CD-ROM drive, in place of what lies in it."""
        async with self._changing:
            await live.insert_cdrom(self, path)

    async def eject_cdrom(self) -> None:
        """Take the disc out of the drive, also if the guest has locked it."""
        async with self._changing:
            self.disk_set.followed = ""
            await live.eject_cdrom(self)

    async def type_text(self, text: str, layout: str = "") -> None:
        """Type a text on the guest's keyboard. layout: that the guest is set to; "" is the machine's.
        Raises UsageError, with nothing typed, if the layout lacks a character."""
        async with self._typing:
            await live.type_text(self, text, layout)

    async def _keys_were_read(self) -> None:
        """Between two key events of a VNC client: wait shortly for a busy guest."""
        if self._pacer is None:
            self._pacer = await Pacer.find(self, timeout_s=0.2)
        await self._pacer.settle()

    async def press(self, chord: str) -> None:
        """Press keys together: "ctrl-alt-delete"; several chords, with blanks between, one after the other.
        Raises UsageError, with nothing pressed, for a key that there is not."""
        async with self._typing:
            await live.press(self, chord)

    async def screenshot(self, path: str) -> None:
        """Write what the screen shows to a PNG file, which appears whole."""
        await live.screenshot(self, path)

    @property
    def disk_set(self) -> Disks:
        if self._disks is None:
            raise ClosedError("the machine does not run")
        return self._disks
