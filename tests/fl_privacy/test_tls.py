"""Certificates hold to a verifier of X.509 and to Flower's own readers of keys."""

from __future__ import annotations

import os
import ssl
import stat
from argparse import Namespace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import (
    public_key_to_bytes,
    sign_message,
    verify_signature,
)
from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication
from typer.testing import CliRunner

from fl_privacy import tls
from fl_privacy.cli import app
from fl_privacy.tls_check import problems, valid_until

NAMES = ("superlink.example.org", "192.0.2.7", "2001:db8::7", "*.nodes.example.org")
NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def made() -> dict[str, bytes]:
    return tls.certificates(NAMES, nodes=2, days=30, now=NOW)


@pytest.fixture
def folder(tmp_path: Path, made: dict[str, bytes]) -> Path:
    """A folder that may be damaged."""
    place = tmp_path / "certs"
    place.mkdir(mode=0o700)
    for name, content in made.items():
        (place / name).write_bytes(content)
        (place / name).chmod(0o600)
    return place


def certificate(content: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(content)


def verify(made: dict[str, bytes], name: str, now: datetime, ca: bytes | None = None) -> None:
    store = Store([certificate(ca or made["ca.crt"])])
    verifier = PolicyBuilder().store(store).time(now)
    subject = tls.general_name(name)
    verifier.build_server_verifier(subject).verify(certificate(made["server.crt"]), [])


@pytest.mark.parametrize(
    "name", ["localhost", "127.0.0.1", *NAMES[:3], "a.nodes.example.org", "SUPERLINK.example.org"]
)
def test_the_server_is_who_it_says(made: dict[str, bytes], name: str) -> None:
    verify(made, name, NOW)


@pytest.mark.parametrize("name", ["example.org", "192.0.2.8", "a.b.nodes.example.org"])
def test_the_server_is_nobody_else(made: dict[str, bytes], name: str) -> None:
    with pytest.raises(VerificationError):
        verify(made, name, NOW)


def test_certificates_are_valid_for_the_days_asked_and_slow_clocks(made: dict[str, bytes]) -> None:
    for moment in (NOW - timedelta(minutes=59), NOW + timedelta(days=30, seconds=-1)):
        verify(made, "localhost", moment)
    for moment in (NOW - timedelta(minutes=61), NOW + timedelta(days=30, seconds=1)):
        with pytest.raises(VerificationError):
            verify(made, "localhost", moment)


def test_another_authority_of_the_same_name_is_refused(made: dict[str, bytes]) -> None:
    other = tls.certificates((), nodes=0, days=30, now=NOW)["ca.crt"]
    assert certificate(other).subject == certificate(made["ca.crt"]).subject
    with pytest.raises(VerificationError):
        verify(made, "localhost", NOW, ca=other)


def test_a_server_cannot_sign_and_a_node_cannot_be_the_server(made: dict[str, bytes]) -> None:
    for name in ("server.crt", "runtime-0.crt"):
        limits = certificate(made[name]).extensions.get_extension_for_class(x509.BasicConstraints)
        assert not limits.value.ca
    names = certificate(made["runtime-0.crt"]).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert [str(name.value) for name in names.value] == ["localhost", "127.0.0.1"]


@pytest.mark.parametrize("node", [0, 1])
def test_flower_reads_the_keys_of_nodes(folder: Path, node: int) -> None:
    args = Namespace(
        auth_supernode_private_key=str(folder / f"node-{node}.key"), auth_supernode_public_key=None
    )
    keys = _try_setup_client_authentication(args)
    assert keys is not None
    private, public = keys
    assert isinstance(private.curve, ec.SECP384R1)
    registered = try_load_public_key(folder / f"node-{node}.pub")
    assert registered == public_key_to_bytes(public)
    assert verify_signature(public, b"message", sign_message(private, b"message"))


def test_every_key_is_another(made: dict[str, bytes]) -> None:
    keys = [content for name, content in made.items() if name.endswith((".key", ".pub"))]
    assert len(set(keys)) == len(keys) == 8


def test_tls_is_spoken_with_them_and_only_by_those_who_trust_the_authority(folder: Path) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.crt", folder / "server.key")
    trusting = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    assert shaken(server, trusting, "superlink.example.org") == ""
    assert "Hostname mismatch" in shaken(server, trusting, "elsewhere.example.org")
    strange = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    assert "unable to get local issuer" in shaken(server, strange, "superlink.example.org")


def shaken(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> str:
    """Handshake in memory; empty, or why the client ended it."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname=name)
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    done = False
    while not done:
        done = True
        for end in (ours, theirs):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                done = False
            except ssl.SSLCertVerificationError as error:
                return error.verify_message
    return ""


def test_private_files_are_never_open_to_others(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        tls.write_certificates(tmp_path / "a" / "certs", nodes=1)
    finally:
        os.umask(before)
    made = tmp_path / "a" / "certs"
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in made.iterdir()}
    assert {name for name, mode in modes.items() if mode == 0o600} == {
        "ca.key",
        "server.key",
        "node-0.key",
        "runtime-0.key",
    }
    assert set(modes.values()) == {0o600, 0o644}
    assert problems(made, nodes=1) == []
    assert list(made.parent.iterdir()) == [made]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(tls.CertificateError, match="not overwritten"):
        tls.write_certificates(tmp_path)
    with pytest.raises(tls.CertificateError, match="not overwritten"):
        tls.write_certificates(tmp_path / "mine")
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["", "https://x.org", "x.org:8000", "a b", "-a", "bücher.de"])
def test_a_name_that_is_none_is_refused_before_anything_is_written(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(tls.CertificateError, match="expected a host name or an address"):
        tls.write_certificates(tmp_path / "certs", [name])
    assert list(tmp_path.iterdir()) == []


def test_what_was_made_is_in_order(folder: Path) -> None:
    assert problems(folder, NAMES[:3], nodes=2, now=NOW) == []
    assert abs(valid_until(folder) - NOW - timedelta(days=30)) < timedelta(seconds=1)
    (folder / "ca.key").unlink()
    assert problems(folder, now=NOW) == []


@pytest.mark.parametrize(
    "name",
    ["ca.crt", "server.crt", "server.key", "node-0.key", "node-1.pub", "runtime-1.crt"],
)
def test_what_is_missing_or_damaged_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"no key")
    [text] = problems(folder, now=NOW)
    assert str(folder / name) in text
    assert "cannot be read" in text
    (folder / name).unlink()
    [text] = problems(folder, now=NOW)
    assert text == f"{folder / name} is missing"


def test_nodes_that_are_expected_and_parts_of_nodes_are_missing(folder: Path) -> None:
    missing = {f"{folder}/{n}" for n in ("node-2.key", "node-2.pub", "runtime-2.crt")}
    assert {text.removesuffix(" is missing") for text in problems(folder, nodes=3)} == missing
    for file in folder.glob("node-0.*"):
        file.unlink()
    assert len(problems(folder, now=NOW)) == 2


def test_certificates_that_expired_or_begin_later_are_named(folder: Path) -> None:
    late = problems(folder, now=NOW + timedelta(days=31))
    assert [text.partition(" expired")[0] for text in late] == [
        str(folder / name) for name in ("ca.crt", "server.crt", "runtime-0.crt", "runtime-1.crt")
    ]
    assert all("not valid before" in text for text in problems(folder, now=NOW - timedelta(days=1)))


def test_files_of_two_commands_do_not_fit(folder: Path) -> None:
    other = tls.certificates((), nodes=1, days=30, now=NOW)
    for name in ("server.crt", "node-0.pub"):
        (folder / name).write_bytes(other[name])
    key, signed, node = problems(folder, now=NOW)
    assert "server.key does not belong to" in key
    assert "not signed by" in signed
    assert "node-0.pub does not belong to node-0.key" in node


def test_what_others_may_read_is_named(folder: Path) -> None:
    folder.chmod(0o755)
    (folder / "node-1.key").chmod(0o640)
    assert [text.partition(",")[0] for text in problems(folder, now=NOW)] == [
        f"{folder} has mode 755",
        f"{folder / 'node-1.key'} has mode 640",
    ]


def test_the_command_makes_checks_and_refuses(tmp_path: Path) -> None:
    runner, place = CliRunner(), str(tmp_path / "certs")
    asked = ["certs", place, "--nodes", "1", "--name", "superlink"]
    assert runner.invoke(app, asked).exit_code == 0
    good = runner.invoke(app, [*asked, "--check"])
    assert (good.exit_code, "in order until" in good.output) == (0, True)
    bad = runner.invoke(app, ["certs", place, "--check", "--name", "elsewhere"])
    assert bad.exit_code == 1
    assert "not valid for elsewhere" in bad.stderr
    assert "localhost, 127.0.0.1, superlink" in bad.stderr
    assert isinstance(runner.invoke(app, asked).exception, tls.CertificateError)
