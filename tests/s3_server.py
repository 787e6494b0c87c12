"""An S3 server on this machine that drops connections and answers 503 at random, and whose disk can be full."""

import random
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

FULL = b"<Error><Code>XMinioStorageFull</Code><Message>The disk is full.</Message></Error>"


class Faults:
    """A WSGI application that fails at random in front of another. It takes a limited number of files, if any."""

    def __init__(self, application: Callable[..., Iterable[bytes]]):
        self.application = application
        self.rate = 0.0
        self.room: int | None = None
        self.random = random.Random(0)
        self.requests: list[str] = []

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        self.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        if self.random.random() < self.rate:
            if self.random.random() < 0.5:
                start_response("503 Slow Down", [("Content-Length", "0")])
                return []
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        if self.room is not None and environ["REQUEST_METHOD"] == "PUT":
            if self.room == 0:
                start_response("507 Insufficient Storage", [("Content-Length", str(len(FULL)))])
                return [FULL]
            self.room -= 1
        return self.application(environ, start_response)


@contextmanager
def s3_server() -> Iterator[tuple[str, Faults]]:
    """Yields the address of the server, and its faults."""
    faults = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faults, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", faults
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
