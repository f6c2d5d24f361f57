"""Which NBD server, which export, and how: from a URI or from image options.

    nbd://host:port/export             nbds:// with TLS
    nbd+unix:///export?socket=path     nbds+unix:/// with TLS
    nbd:host:port:exportname=name      nbd:unix:path:exportname=name   (QEMU's old way)

Query parameters: socket, tls-certificates (a directory, see storage.tls), tls-hostname,
tls-verify-peer=false. By the NBD URI specification; the last two are libnbd's.
"""

from __future__ import annotations

from urllib.parse import parse_qsl, quote, unquote, urlsplit

from ...errors import UsageError
from ...wire.nbd.constants import DEFAULT_PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

OPTIONS = (
    *("driver", "filename", "server", "type", "path", "host", "port", "export"),
    *("tls", "tls-dir", "tls-hostname", "connections", "reconnect-delay"),
)
_SERVER = ("type", "path", "host", "port")
_SCHEMES = {
    "nbd": (False, False),
    "nbds": (False, True),
    "nbd+unix": (True, False),
    "nbds+unix": (True, True),
}


class Address:
    """path: of a unix socket, or "" for TCP to host and port. export: its name.

    tls: speak TLS, with the certificates in tls_dir ("": the system's CAs). tls_hostname: whom the
    server's certificate must name, "" for host. verify: check the server's certificate at all.
    """

    __slots__ = ("export", "host", "path", "port", "tls", "tls_dir", "tls_hostname", "verify")

    def __init__(
        self,
        *,
        path: str = "",
        host: str = "localhost",
        port: int = DEFAULT_PORT,
        export: str = "",
        tls: bool = False,
        tls_dir: str = "",
        tls_hostname: str = "",
        verify: bool = True,
    ) -> None:
        self.path = path
        self.host = host
        self.port = port
        self.export = export
        self.tls = tls
        self.tls_dir = tls_dir
        self.tls_hostname = tls_hostname
        self.verify = verify

    @property
    def uri(self) -> str:
        scheme = "nbds" if self.tls else "nbd"
        name = quote(self.export, safe="")
        if self.path:
            return f"{scheme}+unix:///{name}?socket={quote(self.path)}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == DEFAULT_PORT else f":{self.port}"
        return f"{scheme}://{host}{port}/{name}"

    def __repr__(self) -> str:
        return f"<Address {self.uri}>"


def from_uri(uri: str) -> Address:
    """Raises UsageError."""
    if uri.startswith("nbd:") and not uri.startswith("nbd://"):
        return _from_old(uri)
    try:
        parts = urlsplit(uri)
        query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        port = DEFAULT_PORT if parts.port is None else parts.port
        if not port:
            raise ValueError("port 0 is none")
    except ValueError as error:
        raise _bad(uri, str(error)) from None
    if parts.scheme not in _SCHEMES:
        raise _bad(uri, f"scheme '{parts.scheme}' is not known")
    unix, tls = _SCHEMES[parts.scheme]
    path = query.pop("socket", "")
    if unix != bool(path):
        raise _bad(uri, "it needs ?socket=PATH" if unix else "?socket= is for nbd+unix://")
    verify = query.pop("tls-verify-peer", "true")
    address = Address(
        path=path,
        host=parts.hostname or "localhost",
        port=port,
        export=unquote(parts.path.removeprefix("/")),
        tls=tls,
        tls_dir=query.pop("tls-certificates", ""),
        tls_hostname=query.pop("tls-hostname", ""),
        verify=verify not in ("false", "0", "no", "off"),
    )
    if query:
        raise _bad(uri, f"parameter '{next(iter(query))}' is not known")
    if unix and parts.netloc:
        raise _bad(uri, "a unix socket has no host; there must be three slashes")
    return address


def _from_old(uri: str) -> Address:
    rest, marked, export = uri.removeprefix("nbd:").partition(":exportname=")
    if rest.startswith("unix:"):
        return Address(path=rest.removeprefix("unix:"), export=export if marked else "")
    host, _, port = rest.rpartition(":")
    if not host or not _is_port(port):
        raise _bad(uri, "it is not of the form nbd:host:port")
    return Address(host=host.strip("[]"), port=int(port), export=export if marked else "")


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 6 and 0 < int(text) < 65536


def _bad(uri: str, why: str) -> UsageError:
    return UsageError(
        f"'{uri}' is no NBD URI: {why}", hint="examples: nbd://host/export, nbd+unix:///export?socket=path"
    )


def from_options(options: dict[str, Any]) -> Address:
    """Options of `driver=nbd`, named as QEMU's: server.type, server.path, server.host, server.port
    (or path, host, port), export; and tls-dir, tls-hostname. Raises UsageError."""
    server = options.get("server", options)
    if not isinstance(server, dict):
        raise UsageError("option server of driver nbd is not a group", hint="give server.path or server.host")
    if server is not options:
        for key in server:
            if key not in _SERVER:
                raise UsageError(
                    f"driver nbd has no option 'server.{key}'", hint=f"use {' or '.join(_SERVER)}"
                )
    path = str(server.get("path", ""))
    if not path and "host" not in server:
        raise UsageError("driver nbd needs server.path or server.host")
    port = str(server.get("port", DEFAULT_PORT))
    if not _is_port(port):
        raise UsageError(f"'{port}' is no port")
    return Address(
        path=path,
        host=str(server.get("host", "localhost")),
        port=int(port),
        export=str(options.get("export", "")),
        tls="tls-dir" in options or str(options.get("tls", "")) in ("on", "true", "True"),
        tls_dir=str(options.get("tls-dir", "")),
        tls_hostname=str(options.get("tls-hostname", "")),
    )
