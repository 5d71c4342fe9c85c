"""What is wrong with the certificates and keys of a deployment, before anything starts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fl_privacy.tls import CA, LOOPBACK, SERVER, general_name

_NODE_FILE = re.compile(r"(?:node|runtime)-(\d+)\.(?:key|pub|crt)")
T = TypeVar("T")


def problems(
    folder: Path, names: Sequence[str] = (), *, nodes: int = 0, now: datetime | None = None
) -> list[str]:
    """Everything that would keep SuperLink and SuperNodes from starting, or let somebody in.

    Args:
        folder: a folder that `fl_privacy.tls.write_certificates` made.
        names: by these, beside `LOOPBACK`, the server certificate has to be valid.
        nodes: how many SuperNodes there have to be at least; more are checked as well.
        now: when certificates have to be valid, with a time zone; by default at this moment.

    Returns:
        A sentence for each problem, with what to do; empty if there is none. That ``ca.key`` is
        missing is none: it signs, and is better kept elsewhere.
    """
    if not folder.is_dir():
        return [f"{folder} is missing; make it: fl-privacy certs {folder}"]
    now = now or datetime.now(UTC)
    return [
        *_open_to_others(folder),
        *_server_problems(folder, (*LOOPBACK, *names), now),
        *(text for node in _nodes(folder, nodes) for text in _node(folder, node, now)),
    ]


def valid_until(folder: Path) -> datetime:
    """When the first certificate of the folder ends, in UTC."""
    found = [x509.load_pem_x509_certificate(file.read_bytes()) for file in folder.glob("*.crt")]
    return min(certificate.not_valid_after_utc for certificate in found)


def _nodes(folder: Path, expected: int) -> list[int]:
    """Numbers of the nodes that have to be there, and of those that have a file."""
    matches = (_NODE_FILE.fullmatch(file.name) for file in folder.iterdir())
    return sorted({*range(expected), *(int(match[1]) for match in matches if match)})


def _open_to_others(folder: Path) -> Iterator[str]:
    for path, wanted in [(folder, 0o700), *((key, 0o600) for key in sorted(folder.glob("*.key")))]:
        mode = path.stat().st_mode & 0o777
        if mode & ~wanted:
            yield (
                f"{path} has mode {mode:o}, expected {wanted:o}: others may read it; "
                f"chmod {wanted:o} {path}, and make new keys if others had access"
            )


def _server_problems(folder: Path, names: Sequence[str], now: datetime) -> Iterator[str]:
    authority, trouble = _read(folder / f"{CA}.crt", x509.load_pem_x509_certificate)
    if authority is None:
        yield trouble
        return
    if not _is_authority(authority):
        yield f"{folder / CA}.crt is no certificate of an authority"
    yield from _validity(folder / f"{CA}.crt", authority, now)
    if (folder / f"{CA}.key").exists():
        yield from _key_of(folder / f"{CA}.key", authority)
    yield from _certificate(folder, SERVER, authority, names, now)


def _node(folder: Path, node: int, now: datetime) -> Iterator[str]:
    key, trouble = _read(
        folder / f"node-{node}.key", lambda raw: form.load_ssh_private_key(raw, None)
    )
    public, other = _read(folder / f"node-{node}.pub", form.load_ssh_public_key)
    yield from filter(None, (trouble, other))
    for kind, found in (("key", key), ("pub", public)):
        if found is not None and not isinstance(
            found, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey
        ):
            yield f"{folder}/node-{node}.{kind} holds no elliptic-curve key, which Flower expects"
            return
    if key is not None and public is not None and key.public_key() != public:
        yield f"{folder}/node-{node}.pub does not belong to node-{node}.key and lets in another"
    authority, _ = _read(folder / f"{CA}.crt", x509.load_pem_x509_certificate)
    if authority is not None:
        yield from _certificate(folder, f"runtime-{node}", authority, LOOPBACK, now)


def _certificate(
    folder: Path, name: str, authority: x509.Certificate, names: Sequence[str], now: datetime
) -> Iterator[str]:
    """What is wrong with ``name.crt`` and ``name.key``: the cause, not what follows from it."""
    path = folder / f"{name}.crt"
    certificate, trouble = _read(path, x509.load_pem_x509_certificate)
    if certificate is None:
        yield trouble
        return
    yield from _key_of(folder / f"{name}.key", certificate)
    dated = list(_validity(path, certificate, now))
    yield from dated
    if not _signed_by(certificate, authority):
        yield f"{path} is not signed by {folder / CA}.crt; both have to come from one command"
    elif not dated:
        yield from _unverified(path, certificate, authority, names, now)


def _unverified(
    path: Path,
    certificate: x509.Certificate,
    authority: x509.Certificate,
    names: Sequence[str],
    now: datetime,
) -> Iterator[str]:
    """Names for which a client that trusts ``authority`` would refuse ``certificate``."""
    builder = PolicyBuilder().store(Store([authority])).time(now)
    for name in dict.fromkeys(names):
        try:
            builder.build_server_verifier(general_name(name)).verify(certificate, [])
        except VerificationError as error:
            yield (
                f"{path} is not valid for {name} ({error}); it is for "
                f"{', '.join(_names_of(certificate)) or 'no name'}: fl-privacy certs --name {name}"
            )


def _validity(path: Path, certificate: x509.Certificate, now: datetime) -> Iterator[str]:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        yield f"{path} expired on {end:%Y-%m-%d %H:%M} UTC; make new certificates"
    if now < start:
        yield f"{path} is not valid before {start:%Y-%m-%d %H:%M} UTC; is this clock right?"


def _key_of(path: Path, certificate: x509.Certificate) -> Iterator[str]:
    key, trouble = _read(path, lambda raw: form.load_pem_private_key(raw, None))
    if key is None:
        yield trouble
    elif key.public_key() != certificate.public_key():
        yield f"{path} does not belong to {path.with_suffix('.crt')}; both come from one command"


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _names_of(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names]


def _read(path: Path, load: Callable[[bytes], T]) -> tuple[T | None, str]:
    """What the file holds, or None and why not."""
    try:
        return load(path.read_bytes()), ""
    except FileNotFoundError:
        return None, f"{path} is missing"
    except PermissionError:
        return None, f"{path} is not readable by this user, who should own it"
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        return None, f"{path} cannot be read as what it should be: {error}"
