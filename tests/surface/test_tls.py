"""A server with a certificate speaks TLS, and nothing else."""

import datetime
import ssl
import urllib.request

import pytest


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate of 127.0.0.1, and its key, in one file."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    begin = datetime.datetime(2020, 1, 1)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=36500))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


def test_a_server_with_a_certificate_speaks_tls(start, certificate):
    with start(ssl_certfile=str(certificate), wait=False) as server:
        trusting = ssl.create_default_context(cafile=str(certificate))
        url = f"https://localhost:{server.port}/livez"
        while server.process.poll() is None:
            try:
                with urllib.request.urlopen(url, context=trusting, timeout=60) as answer:
                    assert answer.status == 200
                break
            except OSError:
                server.process_tick()
        assert server.process.poll() is None, server.log.read_text()
        assert server.raw(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n") == b""
