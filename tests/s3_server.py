"""Moto's S3 server on loopback, with injected faults and the interface of `gcs_server.Server`."""

import logging
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

import gcs_server
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

HANG = 30.0
_CODES = {403: "AccessDenied", 503: "SlowDown"}
_REGION = "us-east-1"


class Server:
    """Serves from construction until `close`. The buckets of a process belong to all its servers.

    Faults are as for Google's, except that the path of an upload is that of its object.
    """

    scheme = "s3"

    def __init__(self, *buckets: str) -> None:
        self.fault: Callable[[str, str], gcs_server.Fault] = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        self._backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        for bucket in buckets:
            self._backend.create_bucket(bucket, _REGION)
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not every request
        server: Any = self._moto._server
        self._app, server.app = server.app, self._serve

    @property
    def environment(self) -> dict[str, str]:
        """Variables that point s3fs at this server."""
        host, port = self._moto.get_host_and_port()
        return {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "anything",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_DEFAULT_REGION": _REGION,
        }

    def names(self, prefix: str = "", bucket: str = "bucket") -> list[str]:
        return sorted(n for n in dict(self._backend.buckets[bucket].keys) if n.startswith(prefix))

    def read(self, name: str, bucket: str = "bucket") -> bytes:
        return self._backend.buckets[bucket].keys[name].value

    def _serve(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if environ["QUERY_STRING"]:
            path += f"?{environ['QUERY_STRING']}"
        self.requests.append((method, path))
        fault = self.fault(method, path)
        if fault == "hang":
            time.sleep(HANG)
        if fault == "drop":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        if not isinstance(fault, int):
            return self._app(environ, start_response)
        ends = environ.get("wsgi.input_terminated")  # else what is left would be the next request
        environ["wsgi.input"].read(-1 if ends else int(environ.get("CONTENT_LENGTH") or 0))
        code = _CODES[fault]
        body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        start_response(f"{fault} {code}", headers)
        return [] if method == "HEAD" else [body]

    def close(self) -> None:
        self._moto.stop()


Either = gcs_server.Server | Server
