"""Turns the errors of the driver and the codes of the server into the errors of the domain.

An error that a caller sees never quotes the server, because the server's text may quote stored content.
"""

from __future__ import annotations

import re

from pymongo.errors import (
    ConfigurationError,
    ConnectionFailure,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WriteConcernError,
)

from service.errors import (
    BatchTooLarge,
    ChatHistoryError,
    DatabaseUnavailable,
    StorageFull,
    UnsuitableDatabase,
)

# The codes below are the server's, which names them in its `error_codes.yml`.
_OUT_OF_SPACE = {14031}
# An update would make a document larger than 16 MiB: 10334 is BSONObjectTooLarge, 17419 is raised by updates.
DOCUMENT_TOO_LARGE = {10334, 17419}
# A transaction does not fit the oplog (257), or the cache (388).
_TRANSACTION_TOO_LARGE = {257, 388}
_UNAUTHORIZED = 13
_WRONG_CREDENTIALS = {18, 334}  # AuthenticationFailed, MechanismUnavailable
_ATLAS = 8000  # every refusal of Atlas has this code, so only the text tells them apart
# An index exists in another form, or stored documents contradict it.
INDEX_CONTRADICTED = {67, 85, 86, 197, 11000}
# The database, or a part of it, cannot serve now, and will: the same call later may succeed.
UNAVAILABLE_CODES = frozenset(
    {
        # The node is not the primary, no longer or not yet, or it is shutting down.
        *(91, 94, 109, 123, 133, 149, 189, 216, 308, 333, 372, 10058, 10107, 11600, 11602, 13435, 13436),
        # A node does not reach another node, or not in time.
        *(6, 7, 71, 74, 83, 89, 107, 145, 172, 173, 174, 190, 199, 202, 230, 303, 317, 384, 407, 9001, 56846),
        # The command was interrupted, took too long, or its cursor or plan was ended.
        *(24, 43, 46, 50, 90, 143, 175, 194, 237, 262, 279, 281, 282, 290, 310, 312, 314, 355, 442, 453),
        *(11601, 46841, 91331, 10045600),
        # A majority of the nodes did not answer.
        *(64, 75, 79, 100, 134),
        # The transaction or its session is gone, or collided with another operation.
        *(112, 117, 206, 217, 225, 228, 251, 267, 356, 358, 363, 413, 50915),
        # The node's view of the cluster, or of time, was out of date: chunks, databases or shards are moving.
        *(63, 70, 135, 150, 203, 209, 210, 211, 215, 227, 234, 239, 246, 249, 250, 272, 319, 338, 342, 343),
        *(406, 412, 414, 9996, 13388),
        # An index is being built.
        *(276, 285, 12586, 12587),
        # The server has too much to do, or accepts no writes for now.
        *(208, 261, 264, 365, 371, 402, 433, 449, 450, 462),
        # The connection must authenticate again, which the driver does by itself.
        391,
        # InternalError and UnknownError say nothing about the cause, so a later call may succeed.
        *(1, 8),
    }
)
# Labels by which the server or the driver says that the same command may succeed later.
_UNAVAILABLE_LABELS = (
    "TransientTransactionError",
    "UnknownTransactionCommitResult",
    "RetryableWriteError",
    "RetryableError",
    "SystemOverloadedError",
)
# The most that a log line quotes of the server's text.
_REASON_CHARS = 300

_MAY_BE_STORED = (
    "A write may have been stored nevertheless: repeat it with the same Idempotency-Key or message ids, and "
    "it is stored once."
)
NO_ANSWER = f"The database did not answer in time, or could not serve this call. {_MAY_BE_STORED}"
_NO_PRIVILEGE = (
    "The database user lacks a privilege (code 13). Grant it the role `readWrite` on the database of the "
    "service; if CHAT_MONGODB_URL names no user, name one."
)
_NO_URL = "CHAT_MONGODB_URL, or a setting that goes with it, cannot be used: {why}."
# The driver's words, as its view of the topology quotes them.
_OTHER_SET = "but this node belongs to a set named"
_WRONG_SET = (
    "The replica set has another name than `replicaSet` in CHAT_MONGODB_URL says. Correct it there; "
    "`rs.status().set` in mongosh tells the name."
)
_NO_LOGIN = (
    "The database refuses the user name or the password of CHAT_MONGODB_URL (code {code}). Correct them, and "
    "let `authSource` name the database in which the user is defined."
)


def domain_error(error: PyMongoError) -> ChatHistoryError:
    """Return the domain's error for a driver's error, without the server's text."""
    codes, text = _codes(error), str(error).lower()
    if isinstance(error, WriteConcernError):
        # The primary has stored the write whatever the code says, so only the confirmation is missing.
        return DatabaseUnavailable(NO_ANSWER)
    if codes & _OUT_OF_SPACE or "no space left" in text or (_ATLAS in codes and "quota" in text):
        return StorageFull(
            "The database has no room left, so nothing was stored. Give the database more space."
        )
    if codes & _TRANSACTION_TOO_LARGE:
        return BatchTooLarge(
            "The database cannot store so many bytes in one transaction, so nothing was stored. Append the "
            "batch in smaller parts."
        )
    if (refused := refusal(error)) is not None:
        return refused
    if is_unavailable(error) or _ATLAS in codes:
        return DatabaseUnavailable(NO_ANSWER)
    code = error.code if isinstance(error, OperationFailure) else None
    return ChatHistoryError(f"The database failed with code {code}. {_MAY_BE_STORED}")


def opening_error(error: Exception) -> ChatHistoryError:
    """Return why a database could not be opened: UnsuitableDatabase where another attempt cannot help."""
    if isinstance(error, UnsuitableDatabase | DatabaseUnavailable):
        return error
    if (refused := refusal(error)) is not None:
        return UnsuitableDatabase(refused.detail)
    if isinstance(error, ConfigurationError) and not _is_name_service_away(error):
        return unusable_url(error)
    if isinstance(error, ServerSelectionTimeoutError) and _OTHER_SET in str(error):
        return UnsuitableDatabase(_WRONG_SET)
    return DatabaseUnavailable("The service has not reached the database yet. Try again.")


def unusable_url(error: Exception) -> UnsuitableDatabase:
    """Return the error of a URL, or of a setting that goes with it, that the driver cannot use."""
    # The rest of the driver's text may quote the URL, and with it the password.
    why = re.split(r'"|: |\. Hint', str(error))[0].strip(" .")
    if isinstance(error, UserWarning):
        # What stands behind a `?` in a password is an option to the driver.
        why = (
            "the driver does not take one of its options, or its user name or password is not percent-encoded"
        )
    return UnsuitableDatabase(_NO_URL.format(why=why))


def _is_name_service_away(error: ConfigurationError) -> bool:
    """Tell whether the names of a `mongodb+srv` URL were not looked up, rather than not found.

    The driver raises the same error for both, with the name service's error as its cause.
    """
    return error.__cause__ is not None and type(error.__cause__).__name__ not in {"NXDOMAIN", "NoAnswer"}


def worth_another_run(error: BaseException) -> bool:
    """Tell whether a transaction may succeed when it runs again at once.

    Not where the driver found no server: it has looked for one until the deadline already.
    """
    if isinstance(error, ServerSelectionTimeoutError) or not isinstance(error, PyMongoError):
        return False
    return (
        isinstance(error, ConnectionFailure)
        or error.has_error_label("TransientTransactionError")
        or error.has_error_label("UnknownTransactionCommitResult")
    )


def is_unavailable(error: PyMongoError) -> bool:
    """Tell whether the database did not answer, or said that it cannot serve for now."""
    return (
        is_outage(error)
        or isinstance(error, WriteConcernError)
        or any(map(error.has_error_label, _UNAVAILABLE_LABELS))
        or bool(_codes(error) & UNAVAILABLE_CODES)
    )


def is_outage(error: BaseException) -> bool:
    """Tell whether the database did not answer, or not in time."""
    return isinstance(error, PyMongoError) and (error.timeout or isinstance(error, ConnectionFailure))


def reason(error: Exception) -> str:
    """Return the driver's text of an outage or a refusal, for a log, without its view of the topology."""
    if isinstance(error, OperationFailure):
        return str((error.details or {}).get("errmsg", ""))[:_REASON_CHARS]
    if isinstance(error, ConnectionFailure):
        return str(error).partition(", Timeout:")[0][:_REASON_CHARS]
    return ""


def refusal(error: BaseException) -> ChatHistoryError | None:
    """Return the error for refused credentials (UnsuitableDatabase) or a missing privilege, or None."""
    codes, text = _codes(error), str(error).lower()
    atlas = _ATLAS in codes
    if codes & _WRONG_CREDENTIALS or (atlas and ("bad auth" in text or "authentication failed" in text)):
        return UnsuitableDatabase(_NO_LOGIN.format(code=min(codes & {*_WRONG_CREDENTIALS, _ATLAS})))
    if _UNAUTHORIZED in codes or (atlas and ("not allowed" in text or "not authorized" in text)):
        return ChatHistoryError(_NO_PRIVILEGE)
    return None


def _codes(error: BaseException) -> set[int]:
    """Return the codes of a server's error, including the codes of the single writes of a batch."""
    if not isinstance(error, OperationFailure):
        return set()
    details = error.details or {}
    parts = [*details.get("writeErrors", ()), *details.get("writeConcernErrors", ())]
    return {code for code in (error.code, *(each.get("code") for each in parts)) if code is not None}
