"""The tests' own replica set in trouble behaves as MongoDB's documentation says, as the driver sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pymongo
import pytest
from pymongo.errors import AutoReconnect, OperationFailure, WTimeoutError
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from tests.harness import Service, new_id
from tests.mongo_proxy import MongoProxy, mongo_proxied

MAJORITY = WriteConcern("majority", j=True)


@pytest.fixture
def proxy(service: Service) -> Iterator[MongoProxy]:
    with mongo_proxied(service.database_url, new_id("proxy")) as started:
        yield started


@pytest.fixture
def there(proxy: MongoProxy) -> Iterator[Any]:
    """A collection as the service would use it."""
    with pymongo.MongoClient[dict[str, Any]](proxy.url, w="majority", readConcernLevel="majority") as client:
        things = client[proxy.database]["things"]
        things.insert_one({"_id": 1, "n": 0})
        yield things


def write(things: Any, n: int) -> None:
    with things.database.client.start_session() as session:
        session.start_transaction(ReadConcern("snapshot"), MAJORITY)
        things.update_one({"_id": 1}, {"$set": {"n": n}}, session=session)
        with pymongo.timeout(0.5):
            session.commit_transaction()


def test_the_engine_is_hidden_and_every_command_is_seen(proxy: MongoProxy, there: Any) -> None:
    assert "secantusVersion" not in there.database.client.server_info()
    (insert,) = proxy.commands("insert")
    assert insert["documents"] == [{"_id": 1, "n": 0}]


def test_a_command_is_refused_as_often_as_it_is_told_to(proxy: MongoProxy, there: Any) -> None:
    proxy.fail("find", 43, "CursorNotFound", when=lambda each: each["find"] == "things", times=1)
    with pytest.raises(OperationFailure) as raised:
        there.find_one()
    assert raised.value.code == 43
    assert there.find_one() == {"_id": 1, "n": 0}


def test_a_connection_is_lost_before_and_after_the_engine_has_a_command(
    proxy: MongoProxy, there: Any
) -> None:
    for drop, stored in (("before", 0), ("after", 1)):
        proxy.rule("update", drop=drop)
        with pytest.raises(AutoReconnect):
            there.update_one({"_id": 1}, {"$inc": {"n": 1}})
        assert there.find_one()["n"] == stored


def test_a_majority_read_lags_and_a_transaction_reads_the_latest(proxy: MongoProxy, there: Any) -> None:
    proxy.lag(commits="fail")
    with pytest.raises(WTimeoutError):
        write(there, 1)
    proxy.lag(commits="wait")
    with pytest.raises(OperationFailure) as raised:
        write(there, 2)
    assert raised.value.timeout
    assert there.find_one()["n"] == 1  # as of the second lag's beginning
    assert there.count_documents({"n": 2}) == 0
    with there.database.client.start_session() as session:
        session.start_transaction(ReadConcern("snapshot"), MAJORITY)
        assert there.find_one(session=session)["n"] == 2
        session.abort_transaction()
    proxy.catch_up()
    assert there.find_one()["n"] == 2


def test_a_lost_primary_takes_with_it_what_no_majority_had(proxy: MongoProxy, there: Any) -> None:
    proxy.lag(commits="succeed")
    write(there, 1)
    assert there.find_one()["n"] == 0
    proxy.fail_over()
    write(there, 5)
    assert there.find_one()["n"] == 5


def test_many_answers_of_an_older_view_come_from_it_to_the_last(proxy: MongoProxy, there: Any) -> None:
    there.insert_many([{"_id": n} for n in range(2, 300)])
    proxy.lag(commits="succeed")
    there.delete_many({})
    assert len(list(there.find().batch_size(50))) == 299
