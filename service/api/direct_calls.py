"""Calls the functions of routes without FastAPI's solver of dependencies.

The solver looks at every dependency anew in each request, which takes a quarter of a small request. A route
of this service needs little: the request, steps of its path, and what functions make of the request. FastAPI
still describes such a route, and answers where a step of the path is not valid.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from fastapi import params
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import request_response
from starlette.types import Receive, Scope, Send

_Maker = Callable[[Request], Awaitable[Any]]


def call_directly(route: APIRoute) -> None:
    """Let requests call the route's function directly, if it has no other parameters than these."""
    hints = get_type_hints(route.endpoint, include_extras=True)
    if not _is(hints.pop("return", None), Response):
        return  # FastAPI makes the response of what the function returns
    names = list(inspect.signature(route.endpoint).parameters)
    requests = [name for name in names if hints.get(name) is Request]
    makers = {name: maker for name in names if (maker := _maker(_marked(hints.get(name), params.Depends)))}
    steps = {name: TypeAdapter(hints[name]) for name in names if _marked(hints.get(name), params.Path)}
    before = [_maker(each) for each in route.dependencies]
    if len(requests) + len(makers) + len(steps) < len(names) or None in before:
        return

    async def call(request: Request) -> Response:
        for check in before:
            await check(request)  # type: ignore[misc]
        values = dict.fromkeys(requests, request) | {name: request.path_params[name] for name in steps}
        for name, make in makers.items():
            values[name] = await make(request)
        response: Response = await route.endpoint(**values)
        return response

    solved, direct = route.app, request_response(call)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            for name, step in steps.items():
                step.validate_python(scope["path_params"][name])
        except ValidationError:
            await solved(scope, receive, send)
        else:
            await direct(scope, receive, send)

    route.app = app


def _marked(hint: Any, kind: type[Any]) -> Any:
    """Return what marks a parameter as one of this kind, or None."""
    extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((each for each in extras if isinstance(each, kind)), None)


def _maker(depends: params.Depends | None) -> _Maker | None:
    """Return the function of a dependency if it needs nothing but the request."""
    function = None if depends is None else depends.dependency
    if function is None or not inspect.iscoroutinefunction(function):
        return None
    hints = get_type_hints(function)
    hints.pop("return", None)
    return function if list(hints.values()) == [Request] else None


def _is(hint: Any, kind: type[Any]) -> bool:
    return isinstance(hint, type) and issubclass(hint, kind)
