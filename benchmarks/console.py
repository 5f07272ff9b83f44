"""How long a page of the console takes beside the JSON call that it shows: `python -m benchmarks.console`.

The two are asked in turns on one connection. A figure is the time until the head of the answer is there, which is
when its first byte is; a ratio is page by call in one round.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.compare import Service, started

# A page, and the call that it shows.
PAGES = {
    "conversations": ("/console/", "/conversations?limit=30"),
    "conversations of a user": ("/console/?user=ada", "/conversations?user_id=ada&limit=30"),
    "a conversation": ("/console/conversation?id=shown", "/conversations/shown/messages?last=50"),
    "a conversation, beside a call that keeps nothing": (
        "/console/conversation?id=shown",
        "/conversations/shown/messages?last=50&as=items",
    ),
    "a message": (
        "/console/message?id=shown&message=m40",
        "/conversations/shown/messages/m40",
    ),
    "a context": (
        "/console/context?id=shown&tokens=8000",
        "/conversations/shown/context?max_tokens=8000",
    ),
}


def first_byte_ms(service: Service, path: str) -> float:
    """Return the time until an answer begins."""
    began = time.perf_counter()
    service.connection.request("GET", path)
    response = service.connection.getresponse()
    took = time.perf_counter() - began
    body = response.read()
    assert response.status == 200, (path, response.status, body[:300])
    return took * 1e3


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    day = datetime.now(UTC).date()
    print(f"{day}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    with started(Path(__file__).parents[1]) as service:
        for number in range(40):
            service.call(
                "POST", "/conversations", {"user_id": "ada", "id": f"other-{number}", "title": "Tides"}
            )
        service.call("POST", "/conversations", {"user_id": "ada", "id": "shown", "title": "Tides"})
        for n in range(60):
            role = "assistant" if n % 2 else "user"
            message = {"id": f"m{n}", "role": role, "content": f"{n} Low tide is at six. " * 10}
            service.call("POST", "/conversations/shown/messages", message)
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in PAGES}
        for turn in range(arguments.rounds + 5):  # the first ones warm both up
            for name, pair in PAGES.items():
                took = {each: first_byte_ms(service, each) for each in (pair if turn % 2 else pair[::-1])}
                if turn >= 5:
                    rounds[name].append((took[pair[0]], took[pair[1]]))
    print("| page | ms | its call, ms | ratio |\n| --- | ---: | ---: | ---: |")
    for name, times in rounds.items():
        shown, asked = (statistics.median(each[place] for each in times) for place in (0, 1))
        ratio = statistics.median(page / call for page, call in times)
        print(f"| {name} | {shown:.1f} | {asked:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
