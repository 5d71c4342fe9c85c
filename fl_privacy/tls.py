"""Certificates and keys of a deployment: a private authority, its server, its nodes.

::

    DIR/                    mode 700; every .key mode 600
      ca.crt  ca.key        the authority; the key signs, no running process needs it
      server.crt  .key      the SuperLink, under the names by which it is reached
      node-0.key  .pub      who SuperNode 0 is: an EC key on P-384 in OpenSSH's format, which
                            `flower-supernode --auth-supernode-private-key` and
                            `flwr supernode register` read
      runtime-0.crt  .key   TLS between SuperNode 0 and the processes of its apps, on its own
                            machine: good for localhost and 127.0.0.1 only

All keys are elliptic-curve keys on P-384, certificates are signed with SHA-384 (RFC 5280).
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LOOPBACK = ("localhost", "127.0.0.1")
"""Names of every server certificate: control and runtime interfaces listen on loopback."""

DAYS = 365
CA, SERVER = "ca", "server"
_SKEW = timedelta(hours=1)
_LABEL = r"(?!-)[a-z0-9-]{1,63}(?<!-)"
_HOST = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*", re.IGNORECASE)

Key = ec.EllipticCurvePrivateKey


class CertificateError(ValueError):
    """Certificates cannot be made as asked."""


@dataclass(frozen=True)
class Signed:
    """A certificate and the key that belongs to it."""

    certificate: x509.Certificate
    key: Key


def write_certificates(
    folder: Path, names: Sequence[str] = (), *, nodes: int = 2, days: int = DAYS
) -> None:
    """Make everything that a SuperLink and ``nodes`` SuperNodes need, in a new folder.

    Args:
        folder: what to make; it appears whole or not at all.
        names: host names and addresses of the SuperLink, beside `LOOPBACK`.
        nodes: number of SuperNodes.
        days: how long the certificates are valid; keys of nodes have no end.

    Raises:
        CertificateError: the folder holds something, or a name is no name.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CertificateError(
            f"{folder} exists, and keys are not overwritten; name a new folder, or look at "
            f"this one: fl-privacy certs --check {folder}"
        )
    contents = certificates(names, nodes=nodes, days=days, now=datetime.now(UTC))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True
    ) as draft:
        whole = Path(draft) / folder.name
        whole.mkdir(mode=0o700)
        for name, content in contents.items():
            _write(whole / name, content)
        whole.rename(folder)  # refused by the system when somebody filled the folder meanwhile


def certificates(names: Sequence[str], *, nodes: int, days: int, now: datetime) -> dict[str, bytes]:
    """Content of each file, by file name; see the top of this module.

    Raises:
        CertificateError: a name is neither a host name nor an address.
    """
    authority = make_authority(days, now)
    server = make_server(authority, (*LOOPBACK, *names), days, now)
    files = _files(CA, authority) | _files(SERVER, server)
    for node in range(nodes):
        files |= _of_node(node, authority, days, now)
    return files


def add_nodes(folder: Path, nodes: Sequence[int], *, days: int = DAYS) -> None:
    """Make the keys and certificates of further nodes, signed by the folder's authority.

    Raises:
        CertificateError: the authority's key is not there, or a node has a key already.
    """
    now, files = datetime.now(UTC), dict[str, bytes]()
    try:
        held = (folder / f"{CA}.crt").read_bytes(), (folder / f"{CA}.key").read_bytes()
    except FileNotFoundError as error:
        raise CertificateError(
            f"{error.filename} is missing, which signs for new nodes: put it back for this"
        ) from None
    key = form.load_pem_private_key(held[1], None)
    assert isinstance(key, ec.EllipticCurvePrivateKey), "written by `certificates`"
    authority = Signed(x509.load_pem_x509_certificate(held[0]), key)
    for node in nodes:
        files |= _of_node(node, authority, days, now)
    if there := [name for name in files if (folder / name).exists()]:
        raise CertificateError(f"{folder / there[0]} exists, and keys are not overwritten")
    for name, content in files.items():
        _write(folder / name, content)


def _of_node(node: int, authority: Signed, days: int, now: datetime) -> dict[str, bytes]:
    key = ec.generate_private_key(ec.SECP384R1())
    return {
        f"node-{node}.key": _openssh(key),
        f"node-{node}.pub": _openssh_public(key),
        **_files(f"runtime-{node}", make_server(authority, LOOPBACK, days, now)),
    }


def make_authority(days: int, now: datetime) -> Signed:
    """A self-signed authority that may sign servers, but no further authority."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _subject("fl-privacy deployment authority")
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        _unsigned(name, key, days, now)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )
    return Signed(certificate, key)


def make_server(authority: Signed, names: Sequence[str], days: int, now: datetime) -> Signed:
    """A server that answers to ``names``, signed by ``authority``.

    Raises:
        CertificateError: a name is neither a host name nor an address.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    signer = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    answers_to = [general_name(name) for name in dict.fromkeys(names)]
    certificate = (
        _unsigned(_subject("fl-privacy server"), key, days, now)
        .issuer_name(authority.certificate.subject)
        .add_extension(x509.SubjectAlternativeName(answers_to), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(signer.value),
            critical=False,
        )
        .sign(authority.key, hashes.SHA384())
    )
    return Signed(certificate, key)


def general_name(name: str) -> x509.IPAddress | x509.DNSName:
    """A host name or an address as certificates hold it.

    Raises:
        CertificateError: it is neither.
    """
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        if not _HOST.fullmatch(name) or len(name) > 253:
            raise CertificateError(
                f"expected a host name or an address, got {name!r}; such as superlink.example.org "
                f"or 192.0.2.7, without scheme and port, and other alphabets in their xn-- form"
            ) from None
        return x509.DNSName(name.lower())


def _unsigned(subject: x509.Name, key: Key, days: int, now: datetime) -> x509.CertificateBuilder:
    """Who, which key, and when: from an hour ago, as clocks differ."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _files(name: str, signed: Signed) -> dict[str, bytes]:
    certificate = signed.certificate.public_bytes(form.Encoding.PEM)
    key = signed.key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    return {f"{name}.crt": certificate, f"{name}.key": key}


def _openssh(key: Key) -> bytes:
    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption())


def _openssh_public(key: Key) -> bytes:
    line = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    return line + b"\n"


def _write(path: Path, content: bytes) -> None:
    """Write a new file; a private one is never, not for a moment, open to others."""
    mode = 0o600 if path.suffix == ".key" else 0o644
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
