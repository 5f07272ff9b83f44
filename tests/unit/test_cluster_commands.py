"""The commands for a sharded cluster in docs/mongodb.md: their form, and that both collections lie alike.

No cluster was there to run them on, so they are read as mongosh would read them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.database import suitability
from service.documents import Checkpoint, Conversation, Message
from tests.mongo_router import WITH_ZONES

PAGE = Path(__file__).parents[2] / "docs" / "mongodb.md"
MIN, MAX = -(2**63), 2**63  # the ends of the hashed key, MinKey and MaxKey
NAMESPACE = re.compile(r"chat_history\.(checkpoints|conversations|messages)$")
# How many arguments each command of mongosh has, in MongoDB's manual.
ARGUMENTS = {"shardCollection": 2, "addShardToZone": 2, "updateZoneKeyRange": 4, "reshardCollection": 2}
KEYS = {
    "conversations": {"_id": "hashed"},
    "messages": {"conversation_id": "hashed"},
    "checkpoints": {"conversation_id": "hashed"},
}


def calls(text: str) -> Iterator[tuple[str, list[Any]]]:
    """Yield each command `sh.name(…)` of a text, with its arguments as JSON has them."""
    for name, arguments in re.findall(r"\bsh\.(\w+)\((.*)\)", text):
        read = re.sub(r'NumberLong\("(-?\d+)"\)', r"\1", arguments)
        read = read.replace("MinKey", str(MIN)).replace("MaxKey", str(MAX))
        read = re.sub(r"{(\w+):", r'{"\1":', read)
        yield name, json.loads(f"[{read}]")


COMMANDS = [*calls("".join(re.findall(r"```js\n(.*?)```", PAGE.read_text(), re.DOTALL)))]


def arguments_of(wanted: str) -> list[list[Any]]:
    return [arguments for name, arguments in COMMANDS if name == wanted]


def ranges(collection: str) -> list[tuple[int, int, str]]:
    """The ranges of a collection's shard key, in order, and the zone of each."""
    (field,) = KEYS[collection]
    found = []
    for namespace, low, high, zone in arguments_of("updateZoneKeyRange"):
        if namespace == f"chat_history.{collection}":
            assert [*low] == [*high] == [field]
            found.append((low[field], high[field], zone))
    return sorted(found)


def test_each_command_has_its_arguments_and_a_namespace_of_ours() -> None:
    assert {name for name, _ in COMMANDS} == ARGUMENTS.keys()
    for name, arguments in COMMANDS:
        assert len(arguments) == ARGUMENTS[name], name
        if name != "addShardToZone":
            assert NAMESPACE.match(arguments[0]), arguments
    collections = {each.Settings.name for each in (Checkpoint, Conversation, Message)}
    assert collections == KEYS.keys()


def test_all_three_collections_are_sharded_by_the_hash_of_the_conversation() -> None:
    sharded = {namespace.partition(".")[2]: key for namespace, key in arguments_of("shardCollection")}
    assert sharded == KEYS
    assert {name: dict(key.fields) for name, key in WITH_ZONES.items()} == KEYS, "the router's are the same"


@pytest.mark.parametrize("collection", [*KEYS])
def test_the_zones_cover_the_whole_range_of_the_hashed_key_once(collection: str) -> None:
    found = ranges(collection)
    ends = [MIN, *(high for _, high, _ in found)]
    assert [low for low, _, _ in found] == ends[:-1], "each range begins where the one before it ends"
    assert ends[-1] == MAX
    assert all(low < high for low, high, _ in found)
    shards = {zone: shard for shard, zone in arguments_of("addShardToZone")}
    assert len({shards[zone] for _, _, zone in found}) == len(found) == len(shards), "a zone for each shard"


def test_both_collections_have_the_same_zones() -> None:
    assert ranges("conversations") == ranges("messages")
    # The router with zones has these ranges, so what is tested there is what the page says.
    for collection, key in WITH_ZONES.items():
        assert tuple(high for _, high, _ in ranges(collection)[:-1]) == key.splits
        zones = [zone for _, _, zone in ranges(collection)]
        assert tuple(zones.index(zone) for zone in zones) == key.shards


def test_the_refusals_name_the_command_of_the_page() -> None:
    """What the start of the service says is what the page says."""
    texts = {"messages": suitability._MESSAGES_SPLIT, "conversations": suitability._CONVERSATIONS_SPLIT}
    for collection, text in texts.items():
        ((name, (namespace, key)),) = calls(text.format(namespace=f"chat_history.{collection}", key="x"))
        assert (name, key) == ("reshardCollection", KEYS[collection])
        assert NAMESPACE.match(namespace)
    assert arguments_of("reshardCollection") == [["chat_history.messages", KEYS["messages"]]]
