# SPDX-License-Identifier: GPL-2.0-or-later
"""An authority of one's own, and the certificates of hosts that it signs.

Bytes in, bytes out; the time is an argument.  This is the only module that imports `cryptography`.
"""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from migrate.errors import MigrationError

AUTHORITY_DAYS = 3650
SLACK = datetime.timedelta(days=1)
"""How long before its making a certificate begins to be valid: the clocks of hosts differ."""
MAX_COMMON_NAME = 64
"""The longest common name that X.509 allows."""


@dataclass(frozen=True)
class Issued:
    """A certificate of a host, with its key, both as PEM."""

    certificate: bytes
    key: bytes
    until: datetime.datetime


class Authority:
    """An authority: an ECDSA key on P-256, and a certificate for it that it has signed itself."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey):
        self._certificate, self._key = certificate, key

    @classmethod
    def make(cls, now: datetime.datetime) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "xen-postcopy authority")])
        builder = (
            _certificate_of(key.public_key(), name, name)
            .not_valid_before(now - SLACK)
            .not_valid_after(now + datetime.timedelta(days=AUTHORITY_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
        )
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def load(cls, certificate: bytes, key: bytes) -> Authority:
        """Make the authority of its two PEM files.  Raises :class:`MigrationError`."""
        try:
            loaded = x509.load_pem_x509_certificate(certificate)
            secret = serialization.load_pem_private_key(key, password=None)
        except (ValueError, TypeError) as error:
            raise MigrationError(f"this is not a certificate and its key: {error}") from error
        if not isinstance(secret, ec.EllipticCurvePrivateKey):
            raise MigrationError("its key is none that `xen-postcopy init` has made")
        # Keys cannot be compared before cryptography 40.
        form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        if secret.public_key().public_bytes(*form) != loaded.public_key().public_bytes(*form):
            raise MigrationError("its key belongs to another certificate")
        return cls(loaded, secret)

    @property
    def until(self) -> datetime.datetime:
        return until_of(self._certificate)

    def certificate(self) -> bytes:
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def key(self) -> bytes:
        return _pem_of(self._key)

    def issue(self, names: tuple[str, ...], days: int, now: datetime.datetime) -> Issued:
        """Make a key for a host, and sign a certificate with ``names``, which are host names and
        addresses.  The certificate is valid for ``days``, but not for longer than the authority.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        until = min(now + datetime.timedelta(days=days), self.until)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:MAX_COMMON_NAME])])
        ours = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        both_ends = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = (
            _certificate_of(key.public_key(), subject, self._certificate.subject)
            .not_valid_before(now - SLACK)
            .not_valid_after(until)
            .add_extension(x509.SubjectAlternativeName(map(_general, names)), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(both_ends), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ours),
                critical=False,
            )
        )
        certificate = builder.sign(self._key, hashes.SHA256())
        return Issued(
            certificate.public_bytes(serialization.Encoding.PEM),
            _pem_of(key),
            until_of(certificate),
        )


def names_of(certificate: bytes) -> tuple[str, ...]:
    """Return the names in a host's certificate.  Raises :class:`MigrationError`."""
    try:
        loaded = x509.load_pem_x509_certificate(certificate)
        found = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (ValueError, x509.ExtensionNotFound) as error:
        raise MigrationError(f"this is no certificate of a host: {error}") from error
    return tuple(str(name.value) for name in found.value)


def until_of(certificate: x509.Certificate) -> datetime.datetime:
    """Return the end of a certificate's validity, in UTC.  Before cryptography 42 it has no
    timezone.
    """
    named = (
        "not_valid_after_utc" if hasattr(certificate, "not_valid_after_utc") else "not_valid_after"
    )
    until: datetime.datetime = getattr(certificate, named)
    return until.replace(tzinfo=datetime.UTC)


def _certificate_of(
    key: ec.EllipticCurvePublicKey, subject: x509.Name, issuer: x509.Name
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
