"""A certificate authority for one test, and a certificate for 127.0.0.1 that it signed."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

__all__ = ["make_certificate", "make_self_signed"]


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """Write ``ca.pem`` (to trust) and ``server.pem`` (certificate and key, to serve with)."""
    now = datetime.datetime.now(datetime.UTC)

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def builder(subject: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        start, end = now - datetime.timedelta(hours=1), now + datetime.timedelta(days=2)
        made = x509.CertificateBuilder(
            name("test authority"),
            name(subject),
            key.public_key(),
            x509.random_serial_number(),
            start,
            end,
        )
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
        return made.add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False
        ).add_extension(authority, False)

    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    ca = (
        builder("test authority", ca_key)
        .add_extension(x509.BasicConstraints(True, None), True)
        .add_extension(usage, True)
    )
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))])
    server = (
        builder("127.0.0.1", key)
        .add_extension(address, False)
        .add_extension(x509.BasicConstraints(False, None), True)
    )
    server = server.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
    pem = serialization.Encoding.PEM
    secret = _secret(key)
    (directory / "ca.pem").write_bytes(ca.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    (directory / "server.pem").write_bytes(
        server.sign(ca_key, hashes.SHA256()).public_bytes(pem) + secret
    )
    return directory / "ca.pem", directory / "server.pem"


def make_self_signed(directory: Path) -> tuple[Path, Path]:
    """Write ``own.pem`` (to trust) and ``own-server.pem`` (to serve with): one certificate for
    127.0.0.1 that signed itself and is an authority, as ``openssl req -x509`` makes them.
    """
    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    key = ec.generate_private_key(ec.SECP256R1())
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))])
    signed = (
        x509.CertificateBuilder(
            name,
            name,
            key.public_key(),
            x509.random_serial_number(),
            now - datetime.timedelta(hours=1),
            now + datetime.timedelta(days=2),
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(address, False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    (directory / "own.pem").write_bytes(signed)
    (directory / "own-server.pem").write_bytes(signed + _secret(key))
    return directory / "own.pem", directory / "own-server.pem"


def _secret(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
