"""The server's certificate, key and client authorities, read anew for the first handshake after they have changed."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import cast

import grpc

from d2o_server.errors import SettingsError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files. With ``client_ca`` every caller must show a certificate that its authorities issued."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.certificate, self.key, *(() if self.client_ca is None else (self.client_ca,)))


def credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials that follow the files; those that cannot be used any more leave the last good ones in place.

    Raises:
        SettingsError: the files cannot be used at the start.
    """
    follower = _Follower(files)
    # gRPC takes None for no change; its stubs do not say so.
    fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", follower.next)
    return grpc.dynamic_ssl_server_credentials(
        follower.first, fetch, require_client_authentication=files.client_ca is not None
    )


class _Follower:
    """Called by gRPC at every handshake, in threads of its own."""

    def __init__(self, files: TlsFiles) -> None:
        self._files, self._lock = files, Lock()
        self._seen = _signature(files)
        self.first = load(files)

    def next(self) -> grpc.ServerCertificateConfiguration | None:
        """New configuration, or None where there is nothing new to use."""
        with self._lock:
            seen = _signature(self._files)
            if seen == self._seen:
                return None
            self._seen = seen
            try:
                configuration = load(self._files)
            except SettingsError as error:
                _log.error("the TLS certificate stays as it was: %s", error)
                return None
            _log.info("read the TLS certificate anew")
            return configuration


def _signature(files: TlsFiles) -> tuple[object, ...]:
    return tuple(_one_signature(path) for path in files.paths)


def _one_signature(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def load(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    """Reads and checks the files.

    Raises:
        SettingsError: one cannot be read, is no PEM, or the key is another certificate's.
    """
    chain = (_read("tls_key", files.key), _read("tls_certificate", files.certificate))
    # gRPC itself says no more of unusable files than that it cannot bind.
    check = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        check.load_cert_chain(files.certificate, files.key, password=lambda: "")
    except ssl.SSLError as error:
        given = f"{files.certificate}, {files.key}"
        allowed = f"a PEM certificate and its unencrypted key ({error.reason or error})"
        raise SettingsError(f"tls_certificate, tls_key: got {given}, allowed is {allowed}") from error
    if files.client_ca is None:
        return grpc.ssl_server_certificate_configuration([chain])
    authorities = _read("tls_client_ca", files.client_ca)
    try:
        check.load_verify_locations(files.client_ca)
    except ssl.SSLError as error:
        allowed = "PEM certificates"
        raise SettingsError(f"tls_client_ca: got {files.client_ca}, allowed is {allowed}") from error
    return grpc.ssl_server_certificate_configuration([chain], authorities)


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{name}: got {path}, allowed is a readable PEM file ({error.strerror})") from error
