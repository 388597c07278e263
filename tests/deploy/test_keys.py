from __future__ import annotations

import ssl
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509

from cluster.credentials import AUTHORITY, KV_RECEIVER, KV_SENDER, name_of
from cluster.errors import StartError
from deploy.keys import main, make

FILES = {
    AUTHORITY,
    KV_SENDER,
    KV_RECEIVER,
    *("gateway.pem", "gateway.key", "worker.pem", "worker.key"),
}


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def names(signed: x509.Certificate) -> x509.SubjectAlternativeName:
    return signed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def test_nobody_but_their_owner_reads_them(tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    make(directory)
    assert directory.stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()}
    assert modes == dict.fromkeys(FILES, 0o600)


def test_a_directory_that_was_open_to_others_is_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    make(tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o700


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    make(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(StartError, match="never overwritten"):
        main([str(tmp_path)])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_it_says_what_goes_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "keys")]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in FILES)


def test_certificates_name_a_role_and_where_gateways_are(tmp_path: Path) -> None:
    main([str(tmp_path), "--host", "gw.example", "192.0.2.7"])
    authority = certificate(tmp_path / AUTHORITY)
    for role, others in (("gateway", ["gw.example"]), ("worker", [])):
        signed = certificate(tmp_path / f"{role}.pem")
        signed.verify_directly_issued_by(authority)
        assert names(signed).get_values_for_type(x509.DNSName) == [
            name_of(role),
            "localhost",
            *others,
        ]
    addresses = names(certificate(tmp_path / "gateway.pem")).get_values_for_type(x509.IPAddress)
    assert addresses == [*map(ip_address, ("127.0.0.1", "::1", "192.0.2.7"))]


def test_the_authority_can_sign_nothing_more(tmp_path: Path) -> None:
    """Neither is its key kept, nor may what it signed sign anything."""
    make(tmp_path)
    public = certificate(tmp_path / AUTHORITY).public_key()
    for path in tmp_path.glob("*.key"):
        if b"PRIVATE KEY" in path.read_bytes():
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(path.with_suffix(".pem"), path)
            assert certificate(path.with_suffix(".pem")).public_key() != public
    for role in ("gateway", "worker"):
        signed = certificate(tmp_path / f"{role}.pem")
        assert not signed.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_two_clusters_have_nothing_in_common(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b")
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "b" / name).read_bytes()


def test_what_cannot_be_named_or_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="'schlüssel': is no host's name"):
        main([str(tmp_path / "a"), "--host", "schlüssel"])
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="file"):
        main([str(tmp_path / "file")])
