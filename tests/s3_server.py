"""An S3 server on this machine that drops connections and answers 503 at random."""

import random
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import Request, urlopen

import fsspec
import pytest
from conftest import require_package


class Faults:
    """A WSGI application in front of another. It fails at random."""

    def __init__(self, application: Callable[..., Iterable[bytes]]):
        self.application = application
        self.rate = 0.0
        self.random = random.Random(0)
        self.requests: list[str] = []

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        self.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        if self.random.random() < self.rate:
            if self.random.random() < 0.5:
                start_response("503 Slow Down", [("Content-Length", "0")])
                return []
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return self.application(environ, start_response)


@contextmanager
def s3_server() -> Iterator[tuple[str, Faults]]:
    """Yields the address of the server, and its faults."""
    require_package("moto")
    require_package("s3fs")
    from moto.server import DomainDispatcherApplication, create_backend_app  # takes time that few tests need
    from werkzeug.serving import make_server

    faults = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faults, threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))  # polls for its shutdown
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        urlopen(Request(f"{address}/moto-api/reset", method="POST")).close()  # forgets the buckets of earlier servers
        yield address, faults
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def make_bucket(name: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a bucket. From now on, `s3://` is at the address, in processes that are started, too."""
    names = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    for variable, value in {**names, "AWS_ENDPOINT_URL": address}.items():
        monkeypatch.setenv(variable, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # of an earlier server
    fsspec.filesystem("s3").mkdir(name)
