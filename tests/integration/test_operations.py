"""What operators look at: metrics, the audit trail, traces; and HTTPS."""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pymongo import MongoClient

from tests.harness import Service, append, create, new_id, running

SECRET = "PLANTED-s3cr3t"


def value(text: str, name: str, **labels: Any) -> float:
    """The value of a metric in Prometheus's text, 0 where there is none."""
    for line in text.splitlines():
        found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
        if found and found[1] == name:
            said = dict(re.findall(r'(\w+)="([^"]*)"', found[2] or ""))
            if said == {key: str(each) for key, each in labels.items()}:
                return float(found[3])
    return 0.0


@pytest.mark.embedded_engine("it kills the engine")
def test_metrics_count_requests_by_route_round_trips_appends_replays_and_restarts(tmp_path: Path) -> None:
    with running(tmp_path, metrics="true") as service, service.client() as client:
        conversation = create(client)
        before = client.get("/metrics").text
        append(client, conversation, {"role": "user", "content": SECRET}, {"role": "user"}, key="k")
        append(client, conversation, {"role": "user", "content": SECRET}, {"role": "user"}, key="k")
        client.get(f"/conversations/{conversation}/messages?last=1")
        client.get(f"/conversations/{SECRET}")
        client.get(f"/{SECRET}")
        os.kill(service.engine_pid(), signal.SIGKILL)
        time.sleep(0.1)
        service.wait_until("/health/ready")
        after = client.get("/metrics").text
    assert after.startswith("# HELP")

    def grown(name: str, **labels: Any) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    messages = "/conversations/{conversation_id}/messages"
    assert grown("chat_requests_total", method="POST", route=messages, status=201) == 1
    assert grown("chat_requests_total", method="POST", route=messages, status=200) == 1
    assert grown("chat_requests_total", method="GET", route=messages, status=200) == 1
    assert grown("chat_requests_total", method="GET", route="(none)", status=404) == 1
    assert grown("chat_request_seconds_count", method="POST", route=messages) == 2
    assert grown("chat_appends_total") == 1
    assert grown("chat_messages_appended_total") == 2
    assert grown("chat_replays_total") == 1
    assert grown("chat_engine_restarts_total") == 1
    # The append's, and that of the transaction in which the replay is told from a conflict. The maintenance,
    # which begins beside them, has one of its own.
    assert grown("chat_database_seconds_count", command="commitTransaction") in {2, 3}
    assert grown("chat_database_seconds_count", command="find") >= 4
    assert conversation not in after
    assert SECRET not in after


def test_metrics_are_off_unless_asked_for_and_then_for_their_token_only(
    service: Service, tmp_path: Path
) -> None:
    with service.client() as client:
        assert client.get("/metrics").status_code == 404
    settings = {"metrics": "true", "metrics_token": SECRET, "auth": "key", "api_key": "k"}
    with running(tmp_path, **settings) as closed, closed.client() as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers={"Authorization": "Bearer k"}).status_code == 401
        answer = client.get("/metrics", headers={"Authorization": f"Bearer {SECRET}"})
        assert (answer.status_code, "chat_requests_total" in answer.text) == (200, True)


def test_metrics_without_a_token_are_not_for_who_comes_through_a_proxy(tmp_path: Path) -> None:
    with running(tmp_path, metrics="true", trusted_proxies="*") as service, service.client() as client:
        assert client.get("/metrics").status_code == 200
        for name in ("X-Forwarded-For", "X-Real-IP", "Forwarded", "Via"):
            assert client.get("/metrics", headers={name: "127.0.0.1"}).status_code == 401, name


def run(service: Service, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of the operator's, beside the service that runs."""
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        env=service.environment() | environment,
        cwd=service.directory,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.embedded_engine("it looks at the data directory")
@pytest.mark.parametrize(
    "arguments",
    [
        ("serve",),
        ("verify",),
        ("mongo-url",),
        ("expire",),
        ("keys", "list"),
        ("keys", "create", "k", "--scope", "read"),
        ("import", "/dev/null"),
    ],
)
def test_no_command_runs_on_settings_that_cannot_be_meant(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    service = Service(tmp_path)
    (tmp_path / ".env").write_text("CHAT_AUHT=key\n")
    done = run(service, *arguments, CHAT_API_KEY="s3cret")
    assert (done.returncode, done.stdout) == (1, "")
    assert "There is no setting CHAT_AUHT. CHAT_AUTH was meant" in done.stderr
    (tmp_path / ".env").unlink()
    done = run(service, *arguments, CHAT_API_KEY="s3cret")
    assert (done.returncode, done.stdout) == (1, "")
    assert "CHAT_API_KEY would have no effect" in done.stderr
    assert "s3cret" not in done.stderr
    assert "Traceback" not in done.stderr
    assert not service.data.exists()


def test_what_was_read_and_what_was_not_is_logged_at_start(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("CHAT_RETRY_AFTER_S=2\nCHAT_MODEL=large\nCHAT_HISTORY_URL=http://x\n")
    with running(tmp_path) as service:
        lines = [json.loads(line) for line in service.output().splitlines() if line.startswith("{")]
    said = {line["event"]: line for line in lines}
    assert said["env_file_read"]["file"] == str(tmp_path / ".env")
    assert said["unknown_variables"]["names"] == ["CHAT_MODEL"]


def test_an_import_for_one_user_stores_nothing_where_a_file_has_anything_of_another(service: Service) -> None:
    ada, eve = new_id("ada"), new_id("eve")

    def export(head: str, *owners: tuple[str, str]) -> list[Any]:
        at = {"created_at": "2026-01-01T00:00:00.000Z"}
        lines: list[Any] = [{"type": "export", "version": 1, "user_id": head, **at}]
        for number, (owner, author) in enumerate(owners):
            name = f"{ada}-{number}"
            about: dict[str, Any] = {
                "id": name,
                "user_id": owner,
                "title": None,
                "metadata": {},
                "updated_at": at["created_at"],
            }
            counts = {"last_seq": 1, "message_count": 1}
            lines.append({"type": "conversation", **about, **at, **counts})
            message = {"id": "m", "conversation_id": name, "user_id": author, "seq": 1, "role": "user", **at}
            lines.append({"type": "message", "message": message})
        return [*lines, {"type": "end", "conversations": len(owners), "messages": len(owners)}]

    def imported(*contents: list[Any]) -> subprocess.CompletedProcess[str]:
        files = []
        for number, lines in enumerate(contents):
            files.append(str(service.directory / f"{ada}-{number}.ndjson"))
            Path(files[-1]).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run(service, "import", "--user", ada, *files)

    good = export(ada, (ada, ada))
    with service.client() as client:
        for bad in (
            export(ada, (ada, ada), (eve, eve)),
            export(ada, (ada, ada), (ada, eve)),
            export(eve, (ada, ada)),
        ):
            done = imported(good, bad)
            assert done.returncode == 1
            assert "line " in done.stderr
            assert client.get(f"/conversations/{ada}-0").status_code == 404
        assert imported(good).returncode == 0
        assert client.get(f"/conversations/{ada}-0").json()["user_id"] == ada


def test_the_audit_trail_says_who_did_what_and_no_content(tmp_path: Path) -> None:
    with running(tmp_path, audit_days="30", auth="key", api_key="operators") as service:
        made = subprocess.run(
            [
                sys.executable,
                "-m",
                "service",
                "keys",
                "create",
                "agent",
                "--scope",
                "read",
                "--tenant",
                "acme",
            ],
            env=service.environment(),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        with service.client(headers={"X-API-Key": "operators", "X-Request-ID": "mine"}) as client:
            create(client, "c")
            append(client, "c", {"role": "user", "content": SECRET})
            client.get("/conversations/c/messages")
            client.get("/conversations?user_id=ada")
            client.get(f"/conversations/{SECRET}%0A")
            client.delete("/conversations/c")
            v1 = client.post("/v1/conversations", json={"metadata": {"user": "bob", "k": SECRET}}).json()[
                "id"
            ]
        with service.client(headers={"X-API-Key": made}) as client:
            assert client.get("/conversations/c").status_code == 404
        service.stop()
        service.start()
        with MongoClient[dict[str, Any]](service.database_url) as operator:
            audit = operator.get_default_database().audit
            entries = list(audit.find({"method": {"$ne": "COMMAND"}}, sort=[("at", 1)]))
            indexes = audit.index_information()
    facts = [
        (each["method"], each["route"], each["conversation_id"], each["user_id"], each["status"])
        for each in entries
    ]
    one, messages = "/conversations/{conversation_id}", "/conversations/{conversation_id}/messages"
    assert facts == [
        ("POST", "/conversations", "c", "ada", 201),
        ("POST", messages, "c", None, 201),
        ("GET", messages, "c", None, 200),
        ("GET", "/conversations", None, "ada", 200),
        ("GET", one, None, None, 422),
        ("DELETE", one, "c", None, 204),
        ("POST", "/v1/conversations", v1, "bob", 200),
        ("GET", one, "c", None, 404),
    ]
    assert [each["principal"] for each in entries] == ["key:CHAT_API_KEY"] * 7 + [f"key:{made.split('_')[1]}"]
    assert [each["tenant"] for each in entries] == [""] * 7 + ["acme"]
    assert entries[0]["request_id"] == "mine"
    assert indexes["at_1"]["expireAfterSeconds"] == 30 * 86_400
    assert SECRET not in str(entries)


@pytest.mark.embedded_engine("it kills the engine")
def test_the_audit_trail_outlives_an_outage_of_the_database(tmp_path: Path) -> None:
    with running(tmp_path, audit_days="30") as service, service.client() as client:
        create(client, "c")
        os.kill(service.engine_pid(), signal.SIGKILL)
        for _ in range(3):
            client.get("/conversations/c")
        service.wait_until("/health/ready")
        deadline = time.monotonic() + 20
        with MongoClient[dict[str, Any]](service.database_url) as operator:
            audit = operator.get_default_database().audit
            while audit.count_documents({}) < 4 and time.monotonic() < deadline:
                time.sleep(0.1)
            assert audit.count_documents({}) == 4


def test_traces_have_routes_and_commands_and_no_content(tmp_path: Path) -> None:
    received: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    os.environ["OTEL_EXPORTER_OTLP_COMPRESSION"] = "none"
    try:
        with running(tmp_path, tracing="true") as service, service.client() as client:
            conversation = create(client)
            append(client, conversation, {"role": "user", "content": SECRET})
            client.get(f"/conversations/{conversation}/messages")
            service.stop()
    finally:
        del os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"], os.environ["OTEL_EXPORTER_OTLP_COMPRESSION"]
        server.shutdown()
        server.server_close()
    spans = b"".join(received)
    assert b"/conversations/{conversation_id:id}/messages" in spans
    assert b"commitTransaction" in spans
    assert b"chat-history" in spans
    assert SECRET.encode() not in spans


def certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = directory / "cert.pem", directory / "key.pem"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    return paths


def test_with_a_certificate_it_speaks_https(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    service = Service(tmp_path, tls_cert=cert, tls_key=key, tls_key_password="password")
    try:
        service.start(wait=False)
        trusting = ssl.create_default_context(cafile=str(cert))
        with httpx.Client(base_url=f"https://127.0.0.1:{service.port}", verify=trusting) as client:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                try:
                    response = client.get("/health/ready")
                    break
                except httpx.ConnectError:
                    time.sleep(0.05)
            assert response.status_code in {200, 503}
            assert response.headers["strict-transport-security"]
            service.wait_to_say("https://")
    finally:
        service.stop()
        assert service.engine_is_gone()
