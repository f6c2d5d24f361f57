"""TLS for network storage and exports: certificates from a directory, as QEMU lays them out.

    ca-cert.pem                         who signs the peers we believe
    server-cert.pem, server-key.pem     what a server shows
    client-cert.pem, client-key.pem     what a client shows, if it has any

Only TLS 1.2 and later is spoken.
"""

from __future__ import annotations

import os
import ssl

from ..errors import UsageError

CA, SERVER, CLIENT = "ca-cert.pem", "server", "client"


def server_context(directory: str, *, verify_peer: bool = True) -> ssl.SSLContext:
    """What a server needs. verify_peer: turn away clients without a certificate signed by the CA.

    Raises UsageError if a file is missing or no good.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_chain(context, directory, SERVER)
    if verify_peer:
        _load_ca(context, directory)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(directory: str = "", *, verify_host: bool = True) -> ssl.SSLContext:
    """What a client needs: with a directory its CA and, if it is there, our certificate; without
    one the system's CAs. verify_host: the server's certificate must name the host we asked for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = verify_host
    if not directory:
        context.load_default_certs()
        return context
    _load_ca(context, directory)
    if os.path.exists(os.path.join(directory, f"{CLIENT}-cert.pem")):
        _load_chain(context, directory, CLIENT)
    return context


def _load_ca(context: ssl.SSLContext, directory: str) -> None:
    path = os.path.join(directory, CA)
    try:
        context.load_verify_locations(path)
    except (OSError, ssl.SSLError) as error:
        raise _bad(path, error) from None


def _load_chain(context: ssl.SSLContext, directory: str, role: str) -> None:
    certificate = os.path.join(directory, f"{role}-cert.pem")
    key = os.path.join(directory, f"{role}-key.pem")
    for path in (certificate, key):
        if not os.path.exists(path):
            raise UsageError("no such file", path=path, hint="TLS needs it, see the how-to on serving")
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise _bad(certificate, error) from None


def _bad(path: str, error: Exception) -> UsageError:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    return UsageError(f"cannot be used for TLS: {str(reason).lower()}", path=path)
