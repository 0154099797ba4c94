"""A server of the S3 protocol (moto) on loopback, as a process, which fails when it is told to.

    python -m tests.helpers.s3_server        # prints the port

`POST /faults` replaces the faults: a JSON list of objects with `kind` (status, slow, cut), `path` (a part of the path
and query of the requests), `method`, `count` (how many requests it affects, null: all), `status` and `seconds`.
"""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import fsspec

ROOT = Path(__file__).parents[2]


@dataclass
class S3Server:
    """A running server.

    Attributes:
        endpoint: its URL.
    """

    endpoint: str
    process: subprocess.Popen[str] = field(repr=False)

    def set_faults(self, *faults: dict[str, Any]) -> None:
        """Replace the faults."""
        request = urllib.request.Request(f"{self.endpoint}/faults", json.dumps(faults).encode(), method="POST")
        urllib.request.urlopen(request, timeout=10).read()

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which botocore finds the server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
            "NO_PROXY": "127.0.0.1",
        }


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run a server within the block."""
    command = [sys.executable, "-m", "tests.helpers.s3_server"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield S3Server(f"http://127.0.0.1:{int(process.stdout.readline())}", process)
        finally:
            process.kill()


@dataclass(frozen=True)
class S3Bucket:
    """An empty bucket of a server on loopback.

    Attributes:
        url: ``s3://NAME``.
        files: the store, as fsspec opens it.
        server: the server, which can be told to fail.
    """

    url: str
    files: fsspec.AbstractFileSystem
    server: S3Server


class _Faulty:
    """A WSGI application that fails as the faults say, and otherwise calls ``inner``."""

    def __init__(self, inner: Callable[..., Iterable[bytes]]) -> None:
        self._inner, self._faults, self._lock = inner, [], Lock()
        self._faults: list[dict[str, Any]]

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/faults":
            self._faults = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
            start_response("200 OK", [("Content-Length", "0")])
            return [b""]
        fault = self._take(environ)
        if fault is None:
            return self._inner(environ, start_response)
        if fault["kind"] == "slow":
            time.sleep(fault["seconds"])
            return self._inner(environ, start_response)
        if fault["kind"] == "cut":
            return self._cut(b"".join(self._inner(environ, start_response)))
        code = {500: "InternalError", 503: "SlowDown", 403: "AccessDenied"}[fault["status"]]
        body = f"<Error><Code>{code}</Code><Message>told to fail</Message></Error>".encode()
        start_response(f"{fault['status']} Told", [("Content-Length", str(len(body))), ("Content-Type", "text/xml")])
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]

    def _cut(self, body: bytes) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        raise ConnectionAbortedError

    def _take(self, environ: dict[str, Any]) -> dict[str, Any] | None:
        target = f"{environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
        with self._lock:
            for fault in self._faults:
                if (
                    fault.get("path", "") not in target
                    or fault.get("method", environ["REQUEST_METHOD"]) != (environ["REQUEST_METHOD"])
                ):
                    continue
                if fault.get("count") is None:
                    return fault
                if fault["count"] > 0:
                    fault["count"] -= 1
                    return fault
        return None


def main() -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", 0, _Faulty(DomainDispatcherApplication(create_backend_app)), threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
