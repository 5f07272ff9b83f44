"""One client in many processes, threads and event loops: no answer goes to another, nothing is left open."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import pickle
import select
import signal
import ssl
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from chat_history_client import AsyncChatHistoryClient, ChatHistoryClient
from chat_history_client.langchain import ChatHistoryMessages
from tests.harness import Service, new_id
from tests.proxy import Proxy, proxied

# Python 3.12 warns of what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

CHILD_TIMEOUT_S = 120
TRIALS = 8
USERS = ("ada", "bob")


def in_child(work: Callable[[], Any]) -> Callable[[], Any]:
    """Fork, do the work in the child, and return the function that waits for what it returned."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            result: Any = (True, work())
        except BaseException:  # noqa: BLE001  (told to the parent)
            result = (False, traceback.format_exc())
        with os.fdopen(writer, "wb") as out:
            out.write(pickle.dumps(result))
        os._exit(0)
    os.close(writer)

    def join() -> Any:
        done, said = select.select([reader], [], [], CHILD_TIMEOUT_S)[0], b""
        if not done:
            os.kill(pid, signal.SIGKILL)
        with os.fdopen(reader, "rb") as source:
            said = source.read()
        os.waitpid(pid, 0)
        assert done, "the child did not end"
        good, result = pickle.loads(said)
        assert good, result
        return result

    return join


@pytest.fixture(autouse=True)
def no_log_lines() -> Iterator[None]:
    """Keep httpx from logging, because pytest's log file cannot be written by a child of a busy process.

    Python gives a child new locks for its log handlers, but not for the buffered file beneath them. Where
    another thread was writing to that file during the fork, the child's first log line waits for ever.
    """
    logger = logging.getLogger("httpx")
    before = logger.level
    logger.setLevel(logging.WARNING)
    yield
    logger.setLevel(before)


@pytest.fixture
def proxy(service: Service) -> Iterator[Proxy]:
    with proxied(service.port) as started:
        yield started


@pytest.fixture
def conversations(service: Service) -> dict[str, str]:
    """A conversation for each user, whose every message says whose it is."""
    with ChatHistoryClient(service.url) as history:
        made = {user: new_id() for user in USERS}
        for user, conversation in made.items():
            history.get_or_create_conversation("default", conversation)
            text = {"role": "user", "content": user * 500}
            history.add_messages(conversation, [text | {"id": f"{user}{n}"} for n in range(40)])
    return made


def read_own(history: ChatHistoryClient, conversations: dict[str, str], user: str) -> set[str]:
    page = history.get_chat_history(conversations[user], limit=40)
    return {message["content"][:3] for message in page.data}


def read_own_through_langchain(
    history: ChatHistoryClient, conversations: dict[str, str], user: str
) -> set[str]:
    messages = ChatHistoryMessages(conversations[user], history).messages
    return {str(message.content)[:3] for message in messages}


def read_own_in_threads(history: ChatHistoryClient, conversations: dict[str, str], user: str) -> set[str]:
    found: list[set[str]] = []

    def read() -> None:
        found.extend(read_own(history, conversations, user) for _ in range(2))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    return set.union(*found)


def read_own_in_a_grandchild(
    history: ChatHistoryClient, conversations: dict[str, str], user: str
) -> set[str]:
    read_own(history, conversations, user)
    joins = [in_child(lambda: read_own(history, conversations, user)) for _ in range(2)]
    return set.union(read_own(history, conversations, user), *(join() for join in joins))


@pytest.mark.parametrize(
    "read", [read_own, read_own_through_langchain, read_own_in_threads, read_own_in_a_grandchild]
)
def test_a_child_process_reads_its_own_users_messages(
    service: Service, conversations: dict[str, str], read: Any
) -> None:
    with ChatHistoryClient(service.url) as history:
        history.get_conversation(conversations["ada"])
        for _ in range(TRIALS):
            joins = [(user, in_child(partial(read, history, conversations, user))) for user in USERS * 2]
            assert read(history, conversations, "ada") == {"ada"}
            assert [(user, join()) for user, join in joins] == [(user, {user}) for user, _ in joins]


def test_children_of_multiprocessing_read_their_own_users_messages(
    service: Service, conversations: dict[str, str]
) -> None:
    fork = multiprocessing.get_context("fork")
    results: Any = fork.SimpleQueue()

    with ChatHistoryClient(service.url) as history:

        def work(user: str) -> None:
            results.put((user, [read_own(history, conversations, user) for _ in range(5)]))

        history.get_conversation(conversations["ada"])
        for _ in range(4):
            children = [fork.Process(target=work, args=(user,)) for user in USERS * 2]
            for child in children:
                child.start()
            for child in children:
                child.join(CHILD_TIMEOUT_S)
                assert child.exitcode == 0
            for _ in children:
                user, found = results.get()
                assert found == [{user}] * 5


def test_the_asynchronous_client_has_its_own_connections_in_each_process(
    service: Service, conversations: dict[str, str]
) -> None:
    history = AsyncChatHistoryClient(service.url)

    async def read(user: str) -> set[str]:
        page = await history.get_chat_history(conversations[user], limit=40)
        streamed = [message async for message in history.stream_chat_history(conversations[user])]
        return {message["content"][:3] for message in [*page.data, *streamed]}

    def run(user: str) -> set[str]:
        return asyncio.run(read(user))

    async def parent() -> None:
        assert await read("ada") == {"ada"}
        for _ in range(TRIALS):
            # In the middle of a running event loop, as a worker that is started from a coroutine.
            half_read = history.stream_chat_history(conversations["ada"])
            await anext(half_read)
            joins = [(user, in_child(partial(run, user))) for user in USERS * 2]
            assert await read("ada") == {"ada"}
            assert len([message async for message in half_read]) == 39
            for user, join in joins:
                assert await asyncio.to_thread(join) == {user}

    asyncio.run(parent())
    # An event loop that is used before and after, in both.
    loop = asyncio.new_event_loop()
    loop.run_until_complete(read("ada"))
    for _ in range(TRIALS):
        join = in_child(lambda: loop.run_until_complete(read("bob")))
        assert loop.run_until_complete(read("ada")) == {"ada"}
        assert join() == {"bob"}
    loop.run_until_complete(history.aclose())
    loop.close()


def test_a_fork_while_other_threads_are_in_a_call_leaves_a_client_that_works(
    service: Service, conversations: dict[str, str]
) -> None:
    """A lock that one of those threads held stays locked in the child, where the thread is not."""
    stop = threading.Event()
    wrong: list[Any] = []

    with ChatHistoryClient(service.url) as history:

        def busy(user: str) -> None:
            while not stop.is_set():
                try:
                    found = read_own(history, conversations, user)
                except Exception as error:  # noqa: BLE001  (told to the test's own thread)
                    wrong.append(error)
                    return
                if found != {user}:
                    wrong.append(found)

        threads = [threading.Thread(target=busy, args=(user,)) for user in USERS * 2]
        for thread in threads:
            thread.start()
        try:
            for _ in range(TRIALS):
                joins = [in_child(lambda: read_own(history, conversations, "bob")) for _ in range(2)]
                assert [join() for join in joins] == [{"bob"}] * 2
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert not wrong


def test_parent_and_child_both_go_on_with_a_stream_that_the_parent_began(service: Service) -> None:
    with ChatHistoryClient(service.url) as history:
        conversation = history.get_or_create_conversation("ada")["id"]
        for _ in range(4):
            history.add_messages(conversation, [{"role": "user", "content": "x" * 5_000} for _ in range(500)])
        for child_reads_first in (True, False):
            stream = history.stream_chat_history(conversation)
            begun = [next(stream)["seq"] for _ in range(100)]
            join = in_child(lambda: [message["seq"] for message in stream])  # noqa: B023
            childs = join() if child_reads_first else None
            rest = [message["seq"] for message in stream]
            assert begun + rest == list(range(1, 2_001))
            assert begun + (childs or join()) == list(range(1, 2_001))
        # A child that leaves it alone.
        stream = history.stream_chat_history(conversation)
        next(stream)

        def leave() -> bool:
            stream.close()
            history.close()
            return True

        assert in_child(leave)()
        assert [message["seq"] for message in stream] == list(range(2, 2_001))


CHILD_THAT_ENDS = """
import asyncio, gc, os, sys
from chat_history_client import AsyncChatHistoryClient, ChatHistoryClient

def both(url, conversation):
    history = ChatHistoryClient(url, retry_s=0)
    history.get_conversation(conversation)
    if os.fork() == 0:
        if sys.argv[3] == "use":
            history.get_conversation(conversation)
        history.close()
        del history
        gc.collect()
        sys.exit(0)
    assert os.wait()[1] == 0
    history.get_conversation(conversation)

async def asynchronously(url, conversation):
    history = AsyncChatHistoryClient(url, retry_s=0)
    await history.get_conversation(conversation)
    if os.fork() == 0:
        async def child():
            if sys.argv[3] == "use":
                await history.get_conversation(conversation)
            await history.aclose()
        asyncio.run(child())
        del history
        gc.collect()
        os._exit(0)  # or asyncio would end the parent's event loop here, whose selector is the parent's, too
    assert os.wait()[1] == 0
    await history.get_conversation(conversation)
    await history.aclose()

url, conversation = sys.argv[1:3]
both(url, conversation)
asyncio.run(asynchronously(url, conversation))
"""


class Secure:
    """An HTTPS server that counts its connections and answers every request as one conversation."""

    def __init__(self, directory: Path) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
        now = datetime.now(UTC)
        day = timedelta(days=1)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        self.certificate, keys = directory / "certificate.pem", directory / "key.pem"
        self.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        private = serialization.PrivateFormat.PKCS8
        keys.write_bytes(key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption()))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, keys)
        secure = self
        self.accepted = 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                secure.accepted += 1
                super().setup()

            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                """A client that does not trust the certificate is no error of the test."""

            def finish_request(self, request: Any, address: Any) -> None:
                with context.wrap_socket(request, server_side=True) as wrapped:
                    super().finish_request(wrapped, address)

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"https://localhost:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[Secure]:
    started = Secure(tmp_path)
    yield started
    started.stop()


def run_script(source: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", source, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=CHILD_TIMEOUT_S,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("child", ["use", "leave"])
def test_a_child_that_closes_its_client_and_ends_leaves_the_parents_connection_open(
    proxy: Proxy, secure: Secure, conversations: dict[str, str], child: str
) -> None:
    """The parent's second call goes over its first connection: the child closed none and said no goodbye."""
    url = f"http://127.0.0.1:{proxy.port}"
    run_script(CHILD_THAT_ENDS, url, conversations["ada"], child)
    assert proxy.accepted == (4 if child == "use" else 2)
    run_script(CHILD_THAT_ENDS, secure.url, "c", child, SSL_CERT_FILE=str(secure.certificate))
    assert secure.accepted == (4 if child == "use" else 2)


def test_a_client_that_the_parent_closed_still_serves_the_child(
    service: Service, conversations: dict[str, str]
) -> None:
    history = ChatHistoryClient(service.url)
    history.get_conversation(conversations["ada"])
    reader, writer = os.pipe()

    def wait_and_read() -> set[str]:
        read_own(history, conversations, "bob")
        os.read(reader, 1)
        return read_own(history, conversations, "bob")

    join = in_child(wait_and_read)
    history.close()
    os.write(writer, b"x")
    assert join() == {"bob"}
    os.close(reader)
    os.close(writer)


def test_a_transport_of_the_callers_own_is_made_for_each_process_or_refused(
    service: Service, conversations: dict[str, str]
) -> None:
    with ChatHistoryClient(service.url, transport=httpx.HTTPTransport) as history:
        read_own(history, conversations, "ada")
        joins = [in_child(lambda: read_own(history, conversations, "bob")) for _ in range(4)]
        assert [join() for join in joins] == [{"bob"}] * 4
    with ChatHistoryClient(service.url, transport=httpx.HTTPTransport()) as history:
        read_own(history, conversations, "ada")

        def refused() -> bool:
            with pytest.raises(RuntimeError, match="transport"):
                read_own(history, conversations, "bob")
            return True

        assert in_child(refused)()
        assert read_own(history, conversations, "ada") == {"ada"}


# -- event loops ---------------------------------------------------------------------------------------

MANY_LOOPS = """
import asyncio, os, resource, sys, threading
from chat_history_client import AsyncChatHistoryClient

url, conversation, kind = sys.argv[1:4]
times, files = (400, 256) if kind == "run" else (140, 128)
resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
history = AsyncChatHistoryClient(url, retry_s=0)
held = []

def run():
    asyncio.run(history.get_conversation(conversation))

def run_and_stream():
    async def half():
        stream = history.stream_chat_history(conversation)
        await anext(stream)
        held.append(stream)
    asyncio.run(half())

def in_thread():
    thread = threading.Thread(target=closed)
    thread.start()
    thread.join()

def closed():
    loop = asyncio.new_event_loop()
    loop.run_until_complete(history.get_conversation(conversation))
    loop.close()

def idle():
    loop = asyncio.new_event_loop()
    loop.run_until_complete(history.get_conversation(conversation))
    held.append(loop)
    if len(held) > 20:  # an event loop has three descriptors of its own
        held.pop(0).close()

before = len(os.listdir("/dev/fd"))
for _ in range(times):
    globals()[kind]()
print(len(os.listdir("/dev/fd")) - before)
"""


@pytest.mark.parametrize(
    ("kind", "open_at_most"),
    [("run", 0), ("run_and_stream", 0), ("closed", 20), ("in_thread", 20), ("idle", 100)],
)
def test_connections_are_bounded_however_many_event_loops_use_a_client(
    service: Service, conversations: dict[str, str], kind: str, open_at_most: int
) -> None:
    left = run_script(MANY_LOOPS, service.url, conversations["ada"], kind)
    assert int(left) <= open_at_most


def test_an_event_loops_end_closes_its_connections_in_order(
    service: Service, conversations: dict[str, str]
) -> None:
    """Warnings are errors here, and one that is left open is a ResourceWarning."""
    history = AsyncChatHistoryClient(service.url)

    async def several() -> None:
        await asyncio.gather(*(history.get_conversation(conversations["ada"]) for _ in range(5)))

    for _ in range(3):
        asyncio.run(several())
    assert not history._open
    loops: list[Any] = []

    async def close_twice() -> None:
        await several()
        loops.append(len(history._open))
        await asyncio.gather(history.aclose(), history.aclose())
        await several()
        await history.aclose()

    asyncio.run(close_twice())
    assert loops == [1]
    assert not history._open
