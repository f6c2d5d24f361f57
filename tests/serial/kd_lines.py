"""A simulated kernel and a debugger at the two ends of a bridge, over any transport."""

from __future__ import annotations

import select
from time import monotonic

from enban.serial.transports import LinkEnded
from tests.serial.lines import Client


class ClientStream:
    """A client as the simulator and the debugger of the tests use a line."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def read(self, timeout_s: float) -> bytes:
        end = monotonic() + timeout_s
        try:
            while True:
                if data := self.client.up.read():
                    return data
                left = end - monotonic()
                if left <= 0:
                    return b""
                poll = select.poll()
                poll.register(self.client.up.read_fd, select.POLLIN)
                poll.poll(left * 1000)
        except LinkEnded as error:
            raise EOFError from error

    def write(self, data: bytes) -> None:
        try:
            self.client.send(data)
        except LinkEnded as error:
            raise EOFError from error

    def close(self) -> None:
        self.client.close()
