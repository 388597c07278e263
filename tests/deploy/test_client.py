from __future__ import annotations

import ssl
from argparse import Namespace
from typing import Any

import aiohttp

from deploy.client import unreachable


def test_a_certificate_that_is_not_trusted_is_told_apart_from_silence() -> None:
    options = Namespace(url="https://gw")
    connection: Any = Namespace(host="gw", port=443, ssl=True)
    strange = aiohttp.ClientConnectorCertificateError(connection, ssl.CertificateError("unknown"))
    assert "SSL_CERT_FILE" in unreachable(options, strange).message
    assert "nothing answers at https://gw" in unreachable(options, TimeoutError()).message
