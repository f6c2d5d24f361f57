"""Which serial ports this machine has, by what sysfs says: opening one would raise its modem lines."""

from __future__ import annotations

import os

SYSFS = "/sys/class/tty"
BY_ID = "/dev/serial/by-id"


class SerialPortInfo:
    """device: /dev/ttyUSB0. driver: its name in the kernel. link: a name that stays the same, "" if none."""

    __slots__ = ("device", "driver", "link")

    def __init__(self, device: str, driver: str, link: str) -> None:
        self.device = device
        self.driver = driver
        self.link = link

    def as_json(self) -> dict[str, str]:
        return {"device": self.device, "driver": self.driver, "link": self.link}


def serial_ports(sysfs: str = SYSFS, by_id: str = BY_ID) -> list[SerialPortInfo]:
    """Ports that hardware stands behind, in the order of their names."""
    links: dict[str, str] = {}
    for name in _names(by_id):
        path = os.path.join(by_id, name)
        links.setdefault(os.path.basename(os.path.realpath(path)), path)
    found = []
    for name in _names(sysfs):
        folder = os.path.join(sysfs, name)
        if not os.path.exists(os.path.join(folder, "device")):
            continue  # a console, a pty
        # The kernel keeps places for 8250 ports; of type 0 are those that nobody has found.
        if _text(os.path.join(folder, "type")) == "0":
            continue
        driver = os.path.basename(os.path.realpath(os.path.join(folder, "device", "driver")))
        found.append(SerialPortInfo(f"/dev/{name}", driver, links.get(name, "")))
    return found


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder), key=lambda name: (name.rstrip("0123456789"), len(name), name))
    except OSError:
        return []


def _text(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""
