"""Joins a guest's serial line with those who debug it.

    guest  <->  bridge  <->  debugger: the active one, both ways
                         ->  others: they watch; what they send is thrown away

Rules it keeps:

- **Transparent.** Every byte goes through as it came, first; only then it is looked at. Nobody is ever
  answered in somebody's place. The one thing added: who comes late gets the target's newest packet that
  nobody has acknowledged. (Injections are off unless asked for, and logged.)
- **The guest is drained.** With nobody there its bytes go nowhere, for a guest that cannot send stands still.
  The active debugger may slow it down (no byte is lost to a slow reader), but not stop it: who takes nothing
  for `stall_s` loses bytes from then on. A watcher never slows anybody down.
- **The guest stays.** Debuggers come and go; the guest's side is opened first, and again whenever it is lost.
- Queues are bounded (`QUEUE_BYTES` each). A paced line holds back its source instead of queueing.

One thread polls, reads and writes without ever waiting in a read or write.
"""

from __future__ import annotations

import socket
from time import monotonic, monotonic_ns

from .looking import DEBUGGER, TARGET, Looking
from .peer import QUEUE_BYTES, Peer, role, state
from .polling import READ, SPIN_US, WRITE, Poller
from .transports.base import READ_SIZE, LinkEnded

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .injection import Injector
    from .looking import Observer
    from .transports.base import Link, Transport


STALL_S = 1.0
MOST_DEBUGGERS = 16
# A line that cannot say who is there has lost its debugger if another speaks up after such a silence.
SILENT_S = 30.0
_TICK_S = 1.0
_INJECT_S = 0.1


class Bridge:
    """guest: its line. debuggers: where they come from. observers: are shown what went through, afterwards.

    log: gets a line for each event. on_tick: is called about once a second. stall_s: see the module.
    injector: decides what the bridge may send by itself; None, the default, is nothing ever. spin_us: see
    `Poller`.
    """

    def __init__(
        self,
        guest: Transport,
        debuggers: Sequence[Transport],
        *,
        observers: Sequence[Observer] = (),
        log: Callable[[str], None] = lambda text: None,
        on_tick: Callable[[], None] = lambda: None,
        stall_s: float = STALL_S,
        injector: Injector | None = None,
        spin_us: int = SPIN_US,
    ) -> None:
        self._guest_side = guest
        self._debug_side = list(debuggers)
        self._looking = Looking(observers, log)
        self.counters = self._looking.counters
        self._log = log
        self._on_tick = on_tick
        self._stall_s = stall_s
        self._injector = injector
        self._guest: Peer | None = None
        self._debuggers: list[Peer] = []
        self._active: Peer | None = None
        self._poller = Poller(spin_us)
        self._by_fd: dict[int, Peer] = {}
        self._waiting: dict[int, Transport] = {}
        self._due = 0.0
        self._tick = 0.0
        self._unplugged = 0
        self._opened: list[Transport] = []
        self._stopping = False
        self._wake_in, self._wake_out = socket.socketpair()
        for sock in (self._wake_in, self._wake_out):
            sock.setblocking(False)
        self._poller.want(self._wake_in.fileno(), READ)
        small = any(side.pace_baud for side in (guest, *debuggers))
        for side in (guest, *debuggers):
            side.small = small

    # -- from any thread -----------------------------------------------------------------------

    def stop(self) -> None:
        """Begin to end. Also from a signal handler, and more than once."""
        self._stopping = True
        self._wake(b"x")

    def request_status(self) -> None:
        """Have `status` written to the log. May be called from a signal handler."""
        self._wake(b"s")

    def _wake(self, what: bytes) -> None:
        try:
            self._wake_out.send(what)
        except OSError:
            pass  # full: it wakes up anyway; closed: it has ended

    def status(self) -> str:
        """Who is there and what went through; lines for people."""
        counters = self.counters
        lines = [
            f"guest {self._guest_side.address()}: {state(self._guest, self._guest_side)}",
            *(
                f"{role(peer)} {peer.link.peer}: {'active' if peer is self._active else 'watching'}, "
                f"{state(peer, peer.transport)}"
                for peer in list(self._debuggers)
            ),
            f"from the guest {counters.bytes[TARGET]} bytes, {counters.packets[TARGET]} packets; to it "
            f"{counters.bytes[DEBUGGER]} bytes, {counters.packets[DEBUGGER]} packets; "
            f"{counters.round_trips} round trips",
        ]
        return "\n".join(lines)

    # -- life ----------------------------------------------------------------------------------

    def open(self) -> None:
        """Take names and ports, the guest's first. Raises UsageError and HostError; then nothing is left."""
        if self._opened:
            return
        try:
            for side in (self._guest_side, *self._debug_side):
                self._opened.append(side)
                side.open()
                self._advance(side)
        except BaseException:
            self.close()
            raise

    def run(self) -> None:
        """Carry bytes until `stop`, or until one side is finished for good. Opens if that was not done."""
        self.open()
        try:
            while not self._stopping:
                now = monotonic()
                if now >= self._due:
                    self._chores(now)
                if self._looking.pending:
                    # Observers take their time: first whatever else is to be forwarded.
                    events = self._poller.poll(0) if self._looking.is_slow else []
                    if not events:
                        self._looking.look()
                        continue
                else:
                    events = self._poller.wait(max(0, int((self._due - now) * 1000 + 1)))
                for fd, mask in events:
                    self._handle(fd, mask)
        finally:
            self.close()

    def close(self) -> None:
        """End all links and give names back; what is queued and can be written at once still is."""
        for peer in [*self._debuggers, *([self._guest] if self._guest else [])]:
            try:
                peer.flush()
            except LinkEnded:
                pass
            self._forget(peer)
        self._guest = self._active = None
        self._debuggers = []
        self._looking.catch_up()
        for side in reversed(self._opened):
            side.close()
        self._opened = []
        self._waiting = {}
        self._stopping = True
        self._wake_in.close()
        self._wake_out.close()

    # -- events --------------------------------------------------------------------------------

    def _handle(self, fd: int, mask: int) -> None:
        peer = self._by_fd.get(fd)
        if peer is not None:
            try:
                if mask != READ and fd == peer.link.write_fd:
                    peer.flush()
                    self._drained(peer)
                if mask == WRITE or fd != peer.link.read_fd:
                    return
                if peer.is_guest:
                    self._from_guest(peer)
                else:
                    self._from_debugger(peer)
            except LinkEnded as ended:
                self._lost(peer, str(ended))
        elif fd in self._waiting:
            self._advance(self._waiting[fd])
        elif fd == self._wake_in.fileno():
            try:
                if b"s" in self._wake_in.recv(4096):
                    for line in self.status().splitlines():
                        self._log(line)
            except BlockingIOError:
                pass

    def _from_guest(self, guest: Peer) -> None:
        active = self._active
        room = READ_SIZE
        if active is not None and not active.stalled:
            room = min(room, active.room())
        data = guest.read(room) if room > 0 else b""
        if not data:
            self._arm(guest)
            return
        guest.received += len(data)
        if len(self._debuggers) == 1:
            self._deliver(self._debuggers[0], data)
        else:
            for peer in list(self._debuggers):
                self._deliver(peer, data)
        if guest.link.pace_in is not None or (active is not None and active.queued):
            self._arm(guest)
        self._looking.saw(TARGET, data)

    def _deliver(self, peer: Peer, data: bytes) -> None:
        """From the guest to a debugger; a queue that is full drops it."""
        if peer.queued:
            room = peer.room() if peer is self._active else QUEUE_BYTES - peer.queued
            if len(data) > room:
                if not peer.dropped:
                    self._log(f"{peer.link.peer} is too slow, it loses bytes from the guest")
                peer.dropped += len(data)
                return
        try:
            peer.send(data)
        except LinkEnded as ended:
            self._lost(peer, str(ended))
            return
        if peer.queued:
            self._arm(peer)

    def _from_debugger(self, peer: Peer) -> None:
        guest = self._guest
        room = READ_SIZE if guest is None or peer is not self._active else min(READ_SIZE, guest.room())
        data = peer.read(room) if room > 0 else b""
        if not data:
            self._arm(peer)
            return
        peer.received += len(data)
        if peer is not self._active:
            self._claim(peer)
        if peer is not self._active:
            if not peer.unheard:
                self._log(f"{peer.link.peer} only watches: what it sends is not passed on")
            peer.unheard += len(data)
            return
        peer.spoke = True
        peer.spoken = monotonic()
        if peer.link.pace_in is not None:
            self._arm(peer)
        if guest is None:
            if not self._unplugged:
                self._log(f"the guest is not there: what {peer.link.peer} sends is lost")
            self._unplugged += len(data)
            return
        if self._injector is not None:
            data = self._injector.passed(DEBUGGER, data, monotonic_ns())
        if data:
            self._to_guest(data)
            self._looking.saw(DEBUGGER, data)
        if guest.queued:
            self._arm(peer)

    def _to_guest(self, data: bytes) -> None:
        guest = self._guest
        if guest is None:
            return
        try:
            guest.send(data)
        except LinkEnded as ended:
            self._lost(guest, str(ended))
            return
        if guest.queued:
            self._arm(guest)

    def _drained(self, peer: Peer) -> None:
        """Bytes left a queue: whoever was held back by it may be read again."""
        self._arm(peer)
        if peer.is_guest:
            if self._active is not None:
                self._arm(self._active)
        elif peer is self._active and self._guest is not None:
            self._arm(self._guest)

    # -- who is who ----------------------------------------------------------------------------

    def _claim(self, peer: Peer) -> None:
        """A debugger that is not the active one sends something."""
        if peer.transport.watch:
            return
        active = self._active
        if active is not None:
            # Of a cable nobody knows whether anyone is at its end.
            here = active.transport.knows_peer or monotonic() - active.spoken < SILENT_S
            if active.spoke and here:
                return
        self._activate(peer)

    def _activate(self, peer: Peer | None) -> None:
        if self._active is not None:
            self._looking.closed(DEBUGGER)
        self._active = peer
        if peer is not None:
            self._looking.opened(DEBUGGER)
            self._log(f"{peer.link.peer} is the active debugger")
            peer.unheard = 0
            self._arm(peer)
        if self._guest is not None:
            self._arm(self._guest)

    def _advance(self, side: Transport) -> None:
        """A transport may have a new link."""
        said = side.reason
        link = None
        try:
            if not self._is_full(side):
                link = side.advance()
        except OSError as error:  # no descriptors left, no memory: perhaps later
            side.retry((error.strerror or str(error)).lower(), 1.0)
        if link is not None:
            self._joined(link, side)
        elif side.reason and not said:
            self._log(f"waiting for {side.address()}: {side.reason}")
        self._watch_for(side)
        if side.due is not None:
            self._due = min(self._due, side.due)

    def _is_full(self, side: Transport) -> bool:
        """Nobody more may come: a guest has one line."""
        if side is self._guest_side:
            return self._guest is not None
        return sum(peer.transport is side for peer in self._debuggers) >= (MOST_DEBUGGERS if side.many else 1)

    def _watch_for(self, side: Transport) -> None:
        """Poll for what a transport waits for."""
        wanted = None if self._is_full(side) else side.wait()
        for fd in [fd for fd, other in self._waiting.items() if other is side]:
            if wanted is None or fd != wanted[0]:
                del self._waiting[fd]
                self._poller.want(fd, 0)
        if wanted is not None and wanted[0] not in self._waiting:
            self._waiting[wanted[0]] = side
            self._poller.want(*wanted)

    def _joined(self, link: Link, side: Transport) -> None:
        self._watch_for_nothing(link)
        peer = Peer(link, side, is_guest=side is self._guest_side)
        self._by_fd.update(dict.fromkeys(peer.fds, peer))
        if peer.is_guest:
            self._log(f"guest: {link.peer} is connected")
            self._guest = peer
            self._unplugged = 0
            self._looking.opened(TARGET)
            self._arm(peer)
            for other in self._debuggers:
                self._arm(other)
            return
        self._log(f"{role(peer)}: {link.peer} is connected")
        self._debuggers.append(peer)
        if self._active is None and not side.watch:
            self._activate(peer)
        self._looking.catch_up()
        self._arm(peer)
        if late := self._looking.latest.for_latecomer():
            self._log(f"{link.peer} came late: it gets the guest's newest packet, {len(late)} bytes")
            self._deliver(peer, late)

    def _watch_for_nothing(self, link: Link) -> None:
        """A descriptor that a transport waited for may now be the link's."""
        for fd in {link.read_fd, link.write_fd}:
            if self._waiting.pop(fd, None) is not None:
                self._poller.want(fd, 0)

    def _lost(self, peer: Peer, why: str) -> None:
        self._forget(peer)
        if peer is self._guest:
            self._guest = None
            self._log(f"guest: {peer.link.peer} is gone: {why}")
            self._looking.closed(TARGET)
        elif peer in self._debuggers:
            self._debuggers.remove(peer)
            self._log(f"{role(peer)}: {peer.link.peer} is gone: {why}")
            if peer is self._active:
                self._activate(next((one for one in self._debuggers if not one.transport.watch), None))
        peer.transport.lost()
        if self._guest_side.finished or all(side.finished for side in self._debug_side):
            self._stopping = True  # nobody will ever come to that side again
        self._watch_for(peer.transport)
        if peer.transport.due is not None:
            self._due = min(self._due, peer.transport.due)

    def _forget(self, peer: Peer) -> None:
        for fd in peer.fds:
            self._poller.want(fd, 0)
            if self._by_fd.get(fd) is peer:
                del self._by_fd[fd]
        peer.queue.clear()
        peer.queued = 0
        peer.link.close()

    # -- polling -------------------------------------------------------------------------------

    def _arm(self, peer: Peer) -> None:
        """Poll a peer's descriptors for what it may do now."""
        now = monotonic()
        events = dict.fromkeys(peer.fds, 0)
        if peer.link.read_fd >= 0 and self._may_read(peer, now):
            events[peer.link.read_fd] |= READ
        if peer.link.write_fd >= 0 and peer.may_write(now):
            events[peer.link.write_fd] |= WRITE
        for fd, wanted in events.items():
            self._poller.want(fd, wanted)
        # A paced peer is looked at again when its line is free.
        due = peer.due(now)
        if due is not None:
            self._due = min(self._due, due)

    def _may_read(self, peer: Peer, now: float) -> bool:
        pace = peer.link.pace_in
        if pace is not None and not pace.idle and pace.room(now) <= 0:
            return False
        if peer.is_guest:
            active = self._active
            return active is None or active.stalled or active.room() > 0
        return self._guest is None or peer is not self._active or self._guest.room() > 0

    # -- now and then --------------------------------------------------------------------------

    def _chores(self, now: float) -> None:
        self._due = now + _TICK_S
        for side in (self._guest_side, *self._debug_side):
            if side.due is not None:
                if now >= side.due:
                    self._advance(side)
                else:
                    self._due = min(self._due, side.due)
        for peer in self._peers():
            if peer.link.pace_out is not None and peer.queue:
                try:
                    peer.flush()
                except LinkEnded as ended:
                    self._lost(peer, str(ended))
                    continue
                self._drained(peer)
            self._arm(peer)
        self._check_stall(now)
        if self._injector is not None:
            self._inject(self._injector)
            self._due = min(self._due, now + _INJECT_S)
        if now >= self._tick:
            self._tick = now + _TICK_S
            for side in (self._guest_side, *self._debug_side):
                if text := side.notice():
                    self._log(text)
            self._looking.tick()
            self._on_tick()
        else:
            self._due = min(self._due, self._tick)

    def _peers(self) -> list[Peer]:
        return [*([self._guest] if self._guest is not None else []), *self._debuggers]

    def _check_stall(self, now: float) -> None:
        """An active debugger that takes nothing must not hold the guest."""
        active = self._active
        if active is None or not active.queue or active.stalled:
            return
        if now - active.stuck_since >= self._stall_s:
            active.stalled = True
            self._log(f"{active.link.peer} takes nothing: the guest is not held back for it any longer")
            if self._guest is not None:
                self._arm(self._guest)
        else:
            self._due = min(self._due, active.stuck_since + self._stall_s)

    def _inject(self, injector: Injector) -> None:
        """What the injector finds due; never into the middle of anything."""
        self._looking.catch_up()
        now_ns = monotonic_ns()
        if self._guest is not None and not self._guest.queue:
            for injection in injector.due(now_ns):
                if injection.side == TARGET and self._guest is not None:
                    self._log(f"injected towards the guest, {injection.data.hex()}: {injection.why}")
                    self._looking.injected(injection.side, injection.data, injection.why)
                    self._to_guest(injection.data)
        if late := injector.released(now_ns):
            self._to_guest(late)
            self._looking.saw(DEBUGGER, late)
