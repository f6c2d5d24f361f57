"""One side of a KD session as seen from the line: what it sent, what of it was acknowledged, how soon.

A `Sender` keeps facts and counts; what they mean is for `verdicts`. Its memory does not grow with the
session: counters, the packet in flight, the last one acknowledged, and short windows of recent measurements.

    new packet -> in flight --ACK--> acknowledged --the same again--> duplicate (the ACK was lost or late)
                     |  ^
                     +--+ the same again: a retransmission
"""

from __future__ import annotations

from collections import deque

from ..wire.kd import constants as k
from ..wire.kd.messages import decode
from ..wire.kd.parser import Broken, Noise, Packet, Parser, ack_id, next_id

TARGET, DEBUGGER = 0, 1
SIDES = ("target", "debugger")
WINDOW = 64  # recent measurements kept
MS = 1_000_000
SECOND = 1_000_000_000


class Flight:
    """A data packet and the life it had: until its ACK, and after it to know it again."""

    __slots__ = ("acked_ns", "first_ns", "implicit", "last_ns", "packet", "renamed", "sends")

    def __init__(self, packet: Packet, when_ns: int) -> None:
        self.packet = packet  # as sent last
        self.first_ns = self.last_ns = when_ns
        self.acked_ns = 0
        self.sends = 1
        self.implicit = False  # the other side sent data since, which counts as an ACK
        self.renamed = False  # ids began anew: it may come again under another one

    def is_same(self, packet: Packet) -> bool:
        mine = self.packet
        return (
            packet.type == mine.type
            and packet.payload == mine.payload
            and (self.renamed or packet.id | k.SYNC == mine.id | k.SYNC)
        )

    @property
    def words(self) -> str:
        return f"{self.packet.name} ({decode(self.packet).words()})"


class Sender:
    """What one side sends, and the ACKs it is given. timeout_ns: how long a side waits before it sends
    again."""

    def __init__(self, side: int, timeout_ns: int) -> None:
        self.side = side
        self.timeout_ns = timeout_ns
        self.parser = Parser(break_ins=side == DEBUGGER)
        self.present: bool | None = None  # None: nobody told us
        self.opened_ns = self.closed_ns = 0
        self.sessions = 0

        self.bytes = self.packets = self.data_packets = 0
        self.first_ns = self.last_ns = 0
        self.noise = 0
        self.noise_at = -1  # offset of the first noise
        self.noise_sample = b""
        self.broken = 0
        self.broken_at: deque[tuple[int, str]] = deque(maxlen=8)  # (offset, reason)
        self.unhealed_ns = 0  # when a packet broke that nothing whole followed yet
        self.break_ins = 0
        self.acks = self.resends = self.resets = self.syncs = 0

        self.flight: Flight | None = None
        self.last_acked: Flight | None = None
        self.next_id = -1  # of the next new packet; -1 if unknown
        self.acked = 0
        self.ack_ns: deque[int] = deque(maxlen=WINDOW)  # recent latencies, from the first sending on
        self.ack_most_ns = 0
        self.retransmissions = self.retransmitted_bytes = 0
        self.late_acks = 0  # ACKs that came when the packet had been sent again
        self.lost_acks = 0  # acknowledged packets that came again although their ACK had been prompt
        self.lost_ack_run = 0  # the same without one that did not, between
        self.lost_ack_at: deque[int] = deque(maxlen=8)
        self.given_up = 0  # packets followed by another without an ACK
        self.wrong_ids: deque[tuple[int, int, int]] = deque(maxlen=8)  # (offset, id, the id expected)
        self.wrong_id_run = 0  # without a right one between
        self.sync_kept_run = 0  # ACKs given to this side that still carry SYNC
        self.wrong_ack_run = 0  # ACKs given to this side for a packet that is not in flight
        self.wrong_acks: deque[tuple[int, int, int]] = deque(maxlen=8)  # (offset, id, the id in flight)

        self.rates: deque[float] = deque(maxlen=WINDOW)  # bytes/s inside of packets
        self.gaps: deque[tuple[int, int]] = deque(
            maxlen=WINDOW
        )  # (pause before owed bytes in ns, their number)
        self._began_ns = self._began_bytes = 0

    # -- bytes ---------------------------------------------------------------------------------

    def took(self, length: int, when_ns: int, owing: bool) -> None:
        """Bytes came. owing: this side had more to say at once: a rest of a packet, or an answer."""
        if owing and self.last_ns:
            self.gaps.append((when_ns - self.last_ns, length))
        if not self.bytes:
            self.first_ns = when_ns
        if not self.parser.pending:
            self._began_ns, self._began_bytes = when_ns, length
        self.bytes += length
        self.last_ns = when_ns

    def made_noise(self, event: Noise) -> None:
        if not self.noise:
            self.noise_at, self.noise_sample = event.offset, event.sample
        self.noise += event.length

    def broke(self, event: Broken, when_ns: int) -> None:
        self.broken += 1
        self.broken_at.append((event.offset, event.reason))
        self.unhealed_ns = self.unhealed_ns or when_ns

    # -- what this side sends ------------------------------------------------------------------

    def sent_data(self, packet: Packet, when_ns: int) -> bool:
        """A whole data packet. Returns whether it is a new one."""
        self.data_packets += 1
        self.unhealed_ns = 0
        took_ns = when_ns - self._began_ns
        if packet.length > self._began_bytes and took_ns > 5 * MS:
            self.rates.append((packet.length - self._began_bytes) / took_ns * SECOND)
        flight, before = self.flight, self.last_acked
        if flight is not None and flight.is_same(packet):
            flight.sends += 1
            flight.last_ns = when_ns
            flight.packet, flight.renamed = packet, False
            self._count_again(packet)
            return False
        if flight is None and before is not None and before.is_same(packet):
            before.sends += 1
            self._count_again(packet)
            # Sent soon after its ACK: it was on its way already. Later: the ACK did not arrive there.
            if not before.renamed and when_ns - before.acked_ns > self.timeout_ns // 2:
                self.lost_acks += 1
                self.lost_ack_run += 1
                self.lost_ack_at.append(packet.offset)
            return False
        if before is not None and before.sends == 1:
            self.lost_ack_run = 0
        if packet.sync:
            self.syncs += 1
        elif self.next_id >= 0 and packet.id != self.next_id:
            self.wrong_id_run += 1
            self.wrong_ids.append((packet.offset, packet.id, self.next_id))
        else:
            self.wrong_id_run = 0
        if flight is not None and not flight.implicit and not flight.renamed:
            self.given_up += 1
        self.flight = Flight(packet, when_ns)
        return True

    def _count_again(self, packet: Packet) -> None:
        self.retransmissions += 1
        self.retransmitted_bytes += packet.length

    # -- what the other side says of it --------------------------------------------------------

    def got_ack(self, packet: Packet, when_ns: int) -> bool:
        """An ACK from the other side. Returns whether it is for the packet in flight."""
        flight = self.flight
        if flight is None:
            return False  # of a duplicate, or of something before we began to watch
        id = ack_id(flight.packet.id)
        if packet.id == id:
            latency = when_ns - flight.first_ns
            self.acked += 1
            self.ack_ns.append(latency)
            self.ack_most_ns = max(self.ack_most_ns, latency)
            if flight.sends > 1:
                self.late_acks += 1
            flight.acked_ns = when_ns
            self.last_acked, self.flight = flight, None
            self.next_id = next_id(id)
            self.sync_kept_run = self.wrong_ack_run = 0
            return True
        if ack_id(packet.id) == id:
            self.sync_kept_run += 1
        elif flight.sends > 1:  # before that it may be a late one, of the packet before
            self.wrong_ack_run += 1
        else:
            return False
        self.wrong_acks.append((packet.offset, packet.id, flight.packet.id))
        return False

    def got_data(self) -> None:
        """The other side sent data, which counts as an ACK."""
        if self.flight is not None:
            self.flight.implicit = True
            self.next_id = -1

    def restarted(self) -> None:
        """RESET, or SYNC from the other side: ids begin anew."""
        self.next_id = k.INITIAL_ID
        self.wrong_id_run = 0
        for flight in (self.flight, self.last_acked):
            if flight is not None:
                flight.renamed = True


def middle(values: deque[int] | deque[float]) -> float:
    """The median; 0 of nothing."""
    return sorted(values)[len(values) // 2] if values else 0
