"""What the driver raises, and the error of the domain that stands for it."""

from __future__ import annotations

from typing import Any

import pytest
from dns.resolver import NXDOMAIN, LifetimeTimeout
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    DuplicateKeyError,
    ExecutionTimeout,
    InvalidOperation,
    NetworkTimeout,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WriteConcernError,
)

from service.database import driver_errors
from service.errors import (
    BatchTooLarge,
    ChatHistoryError,
    DatabaseUnavailable,
    StorageFull,
    UnsuitableDatabase,
)

SECRET_TEXT = "quotes what is stored"


def refusal(code: int | None, text: str = SECRET_TEXT, *labels: str) -> OperationFailure:
    return OperationFailure(text, code, {"errmsg": text, "errorLabels": list(labels)})


def batch(code: int, where: str = "writeErrors") -> BulkWriteError:
    return BulkWriteError({where: [{"index": 0, "code": code, "errmsg": SECRET_TEXT}]})


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def nxdomain() -> Exception:
    return NXDOMAIN()  # type: ignore[no-untyped-call]


def timed_out() -> Exception:
    return LifetimeTimeout()  # type: ignore[no-untyped-call]


def labelled(error: PyMongoError, label: str) -> PyMongoError:
    error._add_error_label(label)
    return error


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (AutoReconnect("x"), DatabaseUnavailable, "may have been stored"),
        (NetworkTimeout("x"), DatabaseUnavailable, "may have been stored"),
        (ServerSelectionTimeoutError("x"), DatabaseUnavailable, "may have been stored"),
        (ExecutionTimeout("x", 50), DatabaseUnavailable, "may have been stored"),
        (refusal(10107), DatabaseUnavailable, "may have been stored"),
        (refusal(12_345, SECRET_TEXT, "RetryableWriteError"), DatabaseUnavailable, "may have been stored"),
        (refusal(12_345, SECRET_TEXT, "SystemOverloadedError"), DatabaseUnavailable, "may have been stored"),
        (batch(13388), DatabaseUnavailable, "may have been stored"),
        (batch(64, "writeConcernErrors"), DatabaseUnavailable, "may have been stored"),
        # A write whose confirmation is missing is stored on the primary, even where the code says otherwise.
        (WriteConcernError("x", 13), DatabaseUnavailable, "may have been stored"),
        (WriteConcernError("x", 14031), DatabaseUnavailable, "may have been stored"),
        (refusal(14031), StorageFull, "nothing was stored"),
        (refusal(1, "write failed: No space left on device"), StorageFull, "nothing was stored"),
        (refusal(8000, "you are over your space quota"), StorageFull, "nothing was stored"),
        (batch(14031), StorageFull, "nothing was stored"),
        (refusal(257), BatchTooLarge, "smaller parts"),
        (refusal(388), BatchTooLarge, "smaller parts"),
        (refusal(18), UnsuitableDatabase, "refuses the user name or the password"),
        (refusal(334), UnsuitableDatabase, "(code 334)"),
        (refusal(8000, "bad auth : Authentication failed."), UnsuitableDatabase, "(code 8000)"),
        (refusal(13), ChatHistoryError, "lacks a privilege"),
        (refusal(8000, "user is not allowed to do action [insert]"), ChatHistoryError, "lacks a privilege"),
        (refusal(8000, "something else"), DatabaseUnavailable, "may have been stored"),
        (refusal(12_345), ChatHistoryError, "failed with code 12345"),
        (refusal(11000), ChatHistoryError, "failed with code 11000"),
        (InvalidOperation(SECRET_TEXT), ChatHistoryError, "failed with code None"),
    ],
)
def test_an_error_of_the_driver_becomes_one_of_the_domain_without_its_text(
    error: PyMongoError, kind: type[ChatHistoryError], says: str
) -> None:
    named = driver_errors.domain_error(error)
    assert type(named) is kind
    assert says in named.detail
    assert SECRET_TEXT not in named.detail


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (AutoReconnect("x"), True),
        (ConnectionFailure("x"), True),
        (NetworkTimeout("x"), True),
        (labelled(refusal(112), "TransientTransactionError"), True),
        (labelled(refusal(12_345), "UnknownTransactionCommitResult"), True),
        # The driver has looked for a server until the deadline, whatever the label says.
        (labelled(ServerSelectionTimeoutError("x"), "TransientTransactionError"), False),
        (labelled(refusal(91), "RetryableWriteError"), False),
        (refusal(112), False),
        (DuplicateKeyError("x", 11000), False),
        (TimeoutError(), False),
        (ValueError(), False),
    ],
)
def test_a_transaction_runs_again_only_where_another_run_may_succeed(
    error: Exception, expected: bool
) -> None:
    assert driver_errors.worth_another_run(error) is expected


@pytest.mark.parametrize(
    ("error", "outage", "unavailable"),
    [
        (AutoReconnect("x"), True, True),
        (ExecutionTimeout("x", 50), True, True),
        (refusal(10107), False, True),
        (WriteConcernError("x", 12_345), False, True),
        (labelled(refusal(None), "TransientTransactionError"), False, True),
        (refusal(13), False, False),
        (DuplicateKeyError("x", 11000), False, False),
    ],
)
def test_an_outage_is_a_database_that_does_not_answer(
    error: PyMongoError, outage: bool, unavailable: bool
) -> None:
    assert driver_errors.is_outage(error) is outage
    assert driver_errors.is_unavailable(error) is unavailable


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UnsuitableDatabase("x"), UnsuitableDatabase),
        (refusal(13), UnsuitableDatabase),
        (refusal(18), UnsuitableDatabase),
        (refusal(10107), DatabaseUnavailable),
        (AutoReconnect("x"), DatabaseUnavailable),
        (RuntimeError("x"), DatabaseUnavailable),
        (ConfigurationError("Server at a:1 reports wire version 6, but …"), UnsuitableDatabase),
        (
            caused(ConfigurationError("The DNS query name does not exist: _mongodb._tcp.x."), nxdomain()),
            UnsuitableDatabase,
        ),
        (
            caused(ConfigurationError("The resolution lifetime expired after 2 s: …"), timed_out()),
            DatabaseUnavailable,
        ),
    ],
)
def test_only_a_refusal_for_good_ends_the_attempts_to_open(
    error: Exception, kind: type[ChatHistoryError]
) -> None:
    assert type(driver_errors.opening_error(error)) is kind


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            AutoReconnect("127.0.0.1:1: refused, Timeout: 1s, Topology Description: <…>"),
            "127.0.0.1:1: refused",
        ),
        (refusal(13, "not authorized"), "not authorized"),
        (OperationFailure("x", 13), ""),
        (refusal(13, "x" * 1_000), "x" * 300),
        (ValueError("x"), ""),
    ],
)
def test_a_log_gets_the_reason_without_the_topology(error: Exception, expected: str) -> None:
    assert driver_errors.reason(error) == expected


def test_codes_that_end_a_call_for_another_reason_are_not_unavailable_codes() -> None:
    settled: set[Any] = {
        *driver_errors.DOCUMENT_TOO_LARGE,
        *driver_errors.INDEX_CONTRADICTED,
        *(13, 18, 257, 334, 388, 8000, 14031),
    }
    assert not settled & driver_errors.UNAVAILABLE_CODES
