"""Turns answers into results and errors, and says which calls are repeated, when, and for how long."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

import httpx
from tenacity import RetryCallState, retry_if_exception, stop_after_delay, wait_random_exponential

from chat_history_client._requests import EVENTS, Call
from chat_history_client.errors import ApiError, Conflict, NotFound, Stale, Unavailable

Stop = Callable[[RetryCallState], bool]

_REPEATED_STATUSES = frozenset({429, 502, 503, 504})
_JITTER = wait_random_exponential(multiplier=0.05, max=2)


def retrying(call: Call, retry_s: float, stop: Stop | None = None) -> dict[str, Any]:
    """Return the options of tenacity's Retrying and AsyncRetrying for a call."""
    stop = stop or stop_after_delay(retry_s)
    return {"retry": _worth_repeating(call), "wait": _wait, "stop": stop, "reraise": True}


def raise_for(response: httpx.Response) -> None:
    """Raise the error that an answer says, if it says one; the service never redirects."""
    if response.is_success:
        return
    problem = _problem(response)
    named = {404: NotFound, 409: Conflict, **dict.fromkeys(_REPEATED_STATUSES, Unavailable)}
    seconds = response.headers.get("retry-after", "")
    after = float(seconds) if seconds.isdecimal() else None
    kind = named.get(response.status_code, ApiError)
    if kind is Conflict and str(problem.get("type")).endswith(":stale"):
        kind = Stale
    if kind is NotFound and not str(problem.get("type")).endswith("-not-found"):
        # There is no such path, or it is another server. Adapters take NotFound for a conversation that is
        # empty as yet, so this must be an error that they do not take.
        kind = ApiError
    raise kind(response.status_code, problem, after)


_OPENAI_API = (
    "The service answered as OpenAI's API, which is below `/v1`: give this client a `base_url` without `/v1`."
)
_NOT_THE_SERVICE = (
    "This is no answer of the service about its data, so correct the `base_url` of this client."
)


def _problem(response: httpx.Response) -> dict[str, Any]:
    """Return the problem document of an answer, or what another answer says in the form of one."""
    try:
        said = response.json()
    except ValueError:
        said = {"detail": response.text[:200] or f"Redirected to {response.headers.get('location')}."}
    problem = said if isinstance(said, dict) else {}
    error = problem.get("error")
    if isinstance(error, dict):
        return {"title": str(error.get("type", "")), "detail": f"{error.get('message', '')} {_OPENAI_API}"}
    if response.status_code == 404 and not str(problem.get("type")).endswith("-not-found"):
        return {**problem, "detail": f"{problem.get('detail', '')} {_NOT_THE_SERVICE}".strip()}
    return problem


def answer(response: httpx.Response) -> Any:
    raise_for(response)
    try:
        return response.json() if response.content else None
    except ValueError:
        detail = "The answer is not JSON, so `base_url` is not this service's."
        raise ApiError(response.status_code, {"detail": detail}) from None


def raise_unless_begun(call: Call, response: httpx.Response) -> None:
    """Raise the error that the head of an answer says, also if it is no stream of events and must be one."""
    raise_for(response)
    wanted = EVENTS["Accept"]
    if (call.headers or {}).get("Accept") != wanted:
        return
    if not response.headers.get("content-type", "").startswith(wanted):
        detail = "The answer is no stream of events, so `base_url` is not this service's."
        raise ApiError(response.status_code, {"detail": detail})


# Reasons of OpenSSL that mean that the other side does not speak TLS, or none that we do.
_NEVER_TLS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNSUPPORTED_PROTOCOL"})


def _is_final(error: BaseException | None) -> bool:
    """Tell whether a failure stays the same, however often the call is repeated."""
    if isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        return True
    if isinstance(error, httpx.ProxyError) and str(error).startswith(("401", "403", "407")):
        return True  # the proxy's own refusal, 407 for one
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError | Stale):
            return True
        if isinstance(error, ssl.SSLError) and error.reason in _NEVER_TLS:
            return True
        error = error.__cause__ or error.__context__
    return False


_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


def _worth_repeating(call: Call) -> Any:
    def worth(error: BaseException) -> bool:
        if _is_final(error):
            return False
        if isinstance(error, _NOT_SENT):
            return True
        return call.repeatable and isinstance(error, Unavailable | httpx.TransportError)

    return retry_if_exception(worth)


def _wait(state: RetryCallState) -> float:
    """Wait as long as the service says, or a random time that grows."""
    error = state.outcome.exception() if state.outcome else None
    said = error.retry_after_s if isinstance(error, Unavailable) else None
    return float(_JITTER(state)) + (said or 0)


def gone_already(call: Call, attempts: int, error: BaseException) -> bool:
    """Tell whether a deletion found nothing because its own first attempt, unanswered, was done."""
    return call.gone_is_done and attempts > 1 and isinstance(error, NotFound)


def may_be_done(error: Exception) -> bool:
    """Tell whether an attempt that failed in this way may have been done nevertheless."""
    if isinstance(error, Unavailable):
        return error.status != 429
    return not isinstance(error, _NOT_SENT)
