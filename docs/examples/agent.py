"""Agents that count together: each reads what fits its model, decides, and appends only if it was the first.

Run `python agent.py watch tides` in one terminal, and `python agent.py count tides` in two others. The
service is the one that CHAT_HISTORY_URL names, or the one on this machine.
"""

from __future__ import annotations

import sys
from typing import Any

from chat_history_client import ChatHistoryClient, Stale

LAST = 40


def model(messages: list[dict[str, Any]]) -> str:
    """Stand for a model: say the number behind the last one that was said."""
    said = [int(message["content"]) for message in messages if message["role"] == "assistant"]
    return str(said[-1] + 1 if said else 1)


def count(history: ChatHistoryClient, conversation: str) -> None:
    """Take turns with the other agents until all is counted."""
    while True:
        context = history.get_context(conversation, max_tokens=200, format="openai")
        number = model(context["messages"])
        if int(number) > LAST:
            return
        turn = [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": number}]
        try:
            history.add_messages(conversation, turn, expected_last_seq=context["last_seq"])
        except Stale:
            continue  # Another agent came first, so what this one decided is out of date.


def watch(history: ChatHistoryClient, conversation: str) -> None:
    """Print what the agents say, as they say it, whatever happens to the connection."""
    for event in history.tail(conversation, after=0):
        if event["event"] == "message" and event["data"]["role"] == "assistant":
            print(event["data"]["seq"], event["data"]["content"], flush=True)
            if event["data"]["content"] == str(LAST):
                return


if __name__ == "__main__":
    with ChatHistoryClient() as client:
        client.get_or_create_conversation("ada", sys.argv[2])
        run = watch if sys.argv[1] == "watch" else count
        run(client, sys.argv[2])
