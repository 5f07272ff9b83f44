"""The operations, asked in the same words of each contestant; their check; and the loop that measures."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlmodel import SQLModel
from sqlmodel.ext.asyncio.session import AsyncSession

from benchmarks import operations
from benchmarks.plain import design, goals
from benchmarks.plain.contestants import Connection, Contestant

CLIENTS = 16
# The service may still work after the client has its answer, for example at the line of its log.
_SETTLE_S = 0.003
_ids = itertools.count()


@dataclass(frozen=True)
class Sizes:
    """How much is stored and read; the smoke test takes little."""

    short: int = 1_000
    long: int = 20_000
    listed: int = 200
    first_reads: int = 20  # a round


TINY = Sizes(short=60, long=120, listed=5, first_reads=2)


# -- what is asked -------------------------------------------------------------------------------------


def create(connection: Connection, user: str, name: str) -> bytes:
    """Create a conversation."""
    return connection.ask("POST", "/conversations", {"user_id": user, "id": name})


def append(connection: Connection, name: str) -> bytes:
    """Append a message."""
    return connection.ask("POST", f"/conversations/{name}/messages", operations.message(next(_ids)))


def last_50(connection: Connection, name: str) -> bytes:
    """Read the newest 50 messages."""
    return connection.ask("GET", f"/conversations/{name}/messages?last=50")


def page(connection: Connection, name: str, query: str = "") -> bytes:
    """Read the first 1,000 messages."""
    return connection.ask("GET", f"/conversations/{name}/messages?limit=1000{query}")


def listed(connection: Connection) -> bytes:
    """Read the list of a user's conversations."""
    return connection.ask("GET", "/conversations?user_id=lister&limit=200")


def turns(connection: Connection, name: str) -> bytes:
    """Create a conversation, append to it ten times, and read it."""
    create(connection, "turner", name)
    for _ in range(10):
        append(connection, name)
    return last_50(connection, name)


# -- the operations ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """One thing that is measured: `once(connection, client, number)`, where no number comes twice.

    `before` is done before each, without being measured. `most` bounds how often a round does it.
    """

    name: str
    once: Callable[[Connection, int, int], object]
    clients: int = 1
    before: Callable[[Connection], object] | None = None
    most: int | None = None


def operations_of(sizes: Sizes, contestant: Contestant) -> list[Operation]:
    """Return the operations in the order of the table."""
    at = dict(zip(goals.LENGTHS, (sizes.short, sizes.long), strict=True))

    def first_page(connection: Connection, _: int, number: int) -> None:
        # One page behind the other, of a history of which a process keeps less than the whole; the plain design
        # remembers none, so any page will do.
        after = number * 1_000 % max(1, sizes.long - 1_000)
        page(connection, f"long-{sizes.long}", f"&after={after}" if contestant.name == "service" else "")

    reads = []
    for shown, length in at.items():
        name = f"long-{length}"
        last = functools.partial(_last, name)
        reads.append(Operation(goals.again(shown), last))
        reads.append(
            Operation(goals.after_append(shown), last, before=functools.partial(append, name=name), most=60)
        )
    return [
        Operation(goals.APPEND, lambda connection, client, _: append(connection, f"writer-{client}")),
        Operation(
            goals.APPEND_MANY, lambda connection, client, _: append(connection, f"writer-{client}"), CLIENTS
        ),
        *reads,
        Operation(
            goals.FIRST,
            lambda connection, _, number: last_50(connection, f"first-{number}"),
            most=sizes.first_reads,
        ),
        Operation(goals.PAGE_FIRST, first_page, most=sizes.first_reads),
        Operation(goals.PAGE, lambda connection, *_: page(connection, f"paged-{sizes.short}")),
        Operation(goals.LIST, lambda connection, *_: listed(connection)),
        Operation(goals.TURN, lambda connection, *_: turns(connection, f"turn-{next(_ids)}")),
    ]


def _last(name: str, connection: Connection, _client: int, _number: int) -> bytes:
    return last_50(connection, name)


# -- what is stored ------------------------------------------------------------------------------------


def stored(sizes: Sizes, rounds: int) -> Iterator[tuple[str, str, int]]:
    """Yield what must be there before: the user, the conversation, and its number of messages."""
    yield "reader", f"long-{sizes.long}", sizes.long
    yield "reader", f"long-{sizes.short}", sizes.short
    yield "reader", f"paged-{sizes.short}", sizes.short
    for number in range(rounds * sizes.first_reads):
        yield "reader", f"first-{number}", 60
    for number in range(CLIENTS):
        yield "writer", f"writer-{number}", 0
    for number in range(sizes.listed):
        yield "lister", f"listed-{number}", 0


def fill_service(contestant: Contestant, sizes: Sizes, rounds: int) -> int:
    """Store it through the API; return the memory of the service after half of the longest history."""
    resident = 0
    with Connection(contestant.port) as connection:
        for user, name, length in stored(sizes, rounds):
            create(connection, user, name)
            for first in range(0, length, 100):
                batch = [operations.message(each) for each in range(first, min(first + 100, length))]
                connection.ask("POST", f"/conversations/{name}/messages", {"messages": batch})
                if name == f"long-{sizes.long}" and first + 100 == sizes.long // 2:
                    resident = contestant.resident_bytes()
    return resident or contestant.resident_bytes()


async def fill_plain(url: str, sizes: Sizes, rounds: int) -> None:
    """Make the tables of the plain design, and store it there."""
    engine = design.make_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(SQLModel.metadata.create_all)
    async with AsyncSession(engine) as session:
        for user, name, length in stored(sizes, rounds):
            session.add(design.Conversation(id=name, user_id=user, last_seq=length, message_count=length))
            await session.flush()
            session.add_all(_seeded(user, name, seq) for seq in range(1, length + 1))
            await session.flush()
            session.expunge_all()
        await session.commit()
    await engine.dispose()


def _seeded(user: str, name: str, seq: int) -> design.Message:
    sent = operations.message(seq - 1)
    return design.Message(
        id=f"{name}-{seq}",
        conversation_id=name,
        user_id=user,
        seq=seq,
        role=sent["role"],
        content=sent["content"],
    )


# -- the check -----------------------------------------------------------------------------------------

# What no two contestants can answer alike, and what only the service has.
_OWN = {"id", "created_at", "updated_at", "next", "active_at", "version"}


def comparable(answer: bytes) -> Any:
    """Return an answer without what no two contestants can answer alike."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without(each) for name, each in value.items() if name not in _OWN}
        return [without(each) for each in value] if isinstance(value, list) else value

    return without(json.loads(answer))


def answers(contestant: Contestant, sizes: Sizes) -> dict[str, bytes]:
    """Ask each kind of operation once, with the same bodies for all contestants."""
    body = operations.message(7)
    with Connection(contestant.port) as connection:
        found = {
            "create": create(connection, "checker", "checked"),
            "append": connection.ask("POST", "/conversations/checked/messages", body),
            "read": last_50(connection, "checked"),
            "last 50": last_50(connection, f"long-{sizes.long}"),
            "page": page(connection, f"paged-{sizes.short}"),
            "list": listed(connection),
        }
    order = [each["id"] for each in json.loads(found["list"])["data"]]
    assert order == [f"listed-{number}" for number in reversed(range(sizes.listed))], "newest first"
    return found


def require_equal_answers(contestants: list[Contestant], sizes: Sizes) -> dict[str, dict[str, int]]:
    """Raise RuntimeError unless all answer alike; return how many bytes each answers."""
    found = {each.name: answers(each, sizes) for each in contestants}
    first, *others = found
    for other, kind in itertools.product(others, found[first]):
        mine, theirs = comparable(found[first][kind]), comparable(found[other][kind])
        if mine != theirs:
            raise RuntimeError(f"{kind}: {first} answers {str(mine)[:600]}, {other} {str(theirs)[:600]}")
    return {name: {kind: len(each) for kind, each in of.items()} for name, of in found.items()}


# -- the loop ------------------------------------------------------------------------------------------


@dataclass
class Spent:
    """The CPU time, in seconds, of the service, of its database and of this client."""

    service: float = 0
    database: float = 0
    client: float = 0

    @contextlib.contextmanager
    def counted(self, contestant: Contestant) -> Iterator[None]:
        """Add what the block costs, with what the contestant still does after its answer."""
        time.sleep(_SETTLE_S)
        database, service, client = contestant.database_cpu(), contestant.service_cpu(), time.process_time()
        yield
        self.client += time.process_time() - client
        time.sleep(_SETTLE_S)
        self.service += contestant.service_cpu() - service
        self.database += contestant.database_cpu() - database


def measure(contestant: Contestant, operation: Operation, seconds: float, first: int) -> dict[str, float]:
    """Do it over and over for so long; return operations per second, percentiles, and the CPU time of one."""
    spent = Spent()
    run = _one_by_one if operation.before else _side_by_side
    latencies, took = run(contestant, operation, seconds, first, spent)
    latencies.sort()
    count = len(latencies)
    return {
        "operations": count,
        "per_second": count / took,
        "service_us": spent.service / count * 1e6,
        "database_us": spent.database / count * 1e6,
        "client_us": spent.client / count * 1e6,
        "p50_ms": latencies[count // 2] * 1e3,
        "p99_ms": latencies[min(count - 1, count * 99 // 100)] * 1e3,
    }


def _one_by_one(
    contestant: Contestant, operation: Operation, seconds: float, first: int, spent: Spent
) -> tuple[list[float], float]:
    """Measure each operation alone, because what comes before it is not counted."""
    assert operation.before is not None
    latencies: list[float] = []
    end = time.perf_counter() + seconds
    with Connection(contestant.port) as connection:
        for number in itertools.count(first):
            if latencies and (time.perf_counter() > end or len(latencies) == operation.most):
                break
            operation.before(connection)
            with spent.counted(contestant):
                began = time.perf_counter()
                operation.once(connection, 0, number)
                latencies.append(time.perf_counter() - began)
    return latencies, sum(latencies)


def _side_by_side(
    contestant: Contestant, operation: Operation, seconds: float, first: int, spent: Spent
) -> tuple[list[float], float]:
    """Let so many clients, each a thread, repeat the operation."""
    latencies: list[float] = []
    errors: list[BaseException] = []
    numbers = itertools.count(first)
    connections = [Connection(contestant.port) for _ in range(operation.clients)]
    end = time.perf_counter() + seconds

    def client(place: int) -> None:
        try:
            while True:
                number = next(numbers)
                began = time.perf_counter()
                operation.once(connections[place], place, number)
                latencies.append(time.perf_counter() - began)
                if time.perf_counter() > end or number + 1 - first == operation.most:
                    return
        except BaseException as error:  # noqa: BLE001  (raised below, in the thread that asked)
            errors.append(error)

    threads = [threading.Thread(target=client, args=(place,)) for place in range(operation.clients)]
    with spent.counted(contestant):
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - began
    for connection in connections:
        connection.close()
    if errors:
        raise errors[0]
    return latencies, took
