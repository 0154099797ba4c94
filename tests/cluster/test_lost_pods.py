"""The init container of k8s/job asks the API server, over TLS and with its token, to count lost pods anew."""

import json
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from mlet_dist.cluster.lost_pods import ANNOTATION, begin_anew
from tests.helpers.mlet_command import ROOT

PATH = "/api/v1/namespaces/space/pods/mlet-train-0-abcde"


class ApiServer(BaseHTTPRequestHandler):
    """Keeps what it is asked, and answers with the codes that it is given."""

    codes: list[int]
    asked: list[tuple[str, str, str, str]]

    def do_PATCH(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.asked.append((self.path, self.headers["Authorization"], self.headers["Content-Type"], body))
        code = self.codes.pop(0)
        answer = {"kind": "Pod"} if code == 200 else {"message": 'pods "x" is forbidden:\n cannot patch'}
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a token, and a certificate of localhost that has signed itself."""
    folder = tmp_path_factory.mktemp("secrets")
    words = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    names = ["-keyout", str(folder / "key"), "-out", str(folder / "ca.crt")]
    subprocess.run([*words.split(), *names], check=True, capture_output=True)
    (folder / "token").write_text("secret\n")
    return folder


@contextmanager
def api_server(secrets: Path, *codes: int) -> Iterator[tuple[type[ApiServer], dict[str, str]]]:
    """Start a server, and yield what it is asked, and the environment of the init container."""
    handler = type("Handler", (ApiServer,), {"codes": list(codes), "asked": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(secrets / "ca.crt", secrets / "key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"LOST_PODS": "3", "POD_NAME": "mlet-train-0-abcde", "POD_NAMESPACE": "space"}
    environment |= {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(server.server_port)}
    try:
        yield handler, environment
    finally:
        server.shutdown()
        server.server_close()


def test_the_annotation_is_removed_and_no_other(secrets: Path) -> None:
    with api_server(secrets, 200) as (server, environment):
        line = begin_anew(environment, secrets)
    assert line == "pods of this index that were lost before: 3; the Job controller does not count them any more"
    ((path, token, kind, body),) = server.asked
    assert (path, token, kind) == (PATH, "Bearer secret", "application/merge-patch+json")
    assert json.loads(body) == {"metadata": {"annotations": {ANNOTATION: None}}}


def test_the_first_pod_of_an_index_asks_for_nothing(tmp_path: Path) -> None:
    assert begin_anew({"LOST_PODS": ""}, tmp_path) == ""


def test_a_passing_fault_is_tried_again(secrets: Path) -> None:
    with api_server(secrets, 500, 200) as (server, environment):
        assert "not count them any more" in begin_anew(environment, secrets, pause_s=0)
    assert len(server.asked) == 2


def test_a_refusal_says_what_follows(secrets: Path) -> None:
    with api_server(secrets, 403, 403, 403) as (_, environment):
        line = begin_anew(environment, secrets, pause_s=0)
    assert f"the annotation {ANNOTATION} could not be removed (403 Forbidden: pods" in line
    assert 'pods "x" is forbidden: cannot patch' in line
    assert "it is replaced later; docs/clusters/job.md says what to do" in line
    assert "\n" not in line


def test_nothing_is_sent_to_a_server_with_another_certificate(secrets: Path, tmp_path: Path) -> None:
    words = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=other -addext subjectAltName=IP:127.0.0.1"
    names = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "ca.crt")]
    subprocess.run([*words.split(), *names], check=True, capture_output=True)
    (tmp_path / "token").write_text("secret")
    with api_server(secrets, 200) as (server, environment):
        assert "CERTIFICATE_VERIFY_FAILED" in begin_anew(environment, tmp_path, pause_s=0)
    assert server.asked == []


@pytest.mark.parametrize("missing", ["token", "KUBERNETES_SERVICE_HOST", "server"])
def test_what_is_missing_is_no_error(missing: str, secrets: Path, tmp_path: Path) -> None:
    with api_server(secrets) as (_, environment):
        pass
    if missing == "KUBERNETES_SERVICE_HOST":
        del environment[missing]
    line = begin_anew(environment, tmp_path if missing == "token" else secrets, pause_s=0)
    assert "goes on counting them" in line


def test_the_container_imports_no_torch_and_ends_with_0() -> None:
    """It asks for 128 MiB of memory."""
    command = [sys.executable, "-X", "importtime", "-m", "mlet_dist.cluster.lost_pods"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "LOST_PODS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "goes on counting them" in done.stderr
    assert "torch" not in done.stderr.partition("mlet: ")[0]
