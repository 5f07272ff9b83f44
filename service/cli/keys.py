"""The commands of API keys: `keys create`, `keys list` and `keys revoke`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from service.cli.context import (
    audited,
    fail,
    opened_database,
    read_settings,
    require_tenant,
    run_on_database,
)

if TYPE_CHECKING:
    from service.access.api_keys import ApiKeys

T = TypeVar("T")

commands = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)


@commands.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    scope: Annotated[list[str], typer.Option(help="read, write or admin; may be said several times.")],
    tenant: Annotated[str, typer.Option(help="The one tenant whose data it reaches.")] = "",
    days: Annotated[
        int | None, typer.Option(min=1, max=36_500, help="After so many days it expires.")
    ] = None,
) -> None:
    """Make a key and print it, once: only a hash of it is stored."""
    from datetime import UTC, datetime, timedelta

    require_tenant(tenant)
    unknown = set(scope) - {"read", "write", "admin"}
    if unknown:
        fail(f"There is no scope {unknown.pop()!r}.")
    expires_at = datetime.now(UTC) + timedelta(days=days) if days else None
    scopes: Any = sorted(set(scope))

    async def create(keys: ApiKeys, facts: dict[str, Any]) -> str:
        key, text = await keys.create(name, scopes, tenant=tenant, expires_at=expires_at)
        facts |= {"tenant": tenant, "what": f"{key.id}: {'+'.join(scopes)}"}
        return text

    print(_with_keys("keys create", create))


# Tabs stand between the columns, so that `cut` and a spreadsheet take them.
_COLUMNS = ("id", "name", "scopes", "tenant", "events")


@commands.command("list")
def list_keys() -> None:
    """List every key: its id, name, scopes, tenant, and what became of it."""
    found = _with_keys("keys list", lambda keys, _: keys.list_all())
    print("\t".join(_COLUMNS))
    for key in found:
        times = {"expires": key.expires_at, "revoked": key.revoked_at, "last used": key.last_used_at}
        events = [f"{event} {when:%Y-%m-%d %H:%M}" for event, when in times.items() if when is not None]
        print("\t".join([key.id, key.name, "+".join(key.scopes), key.tenant or "-", ", ".join(events)]))


@commands.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(help="The id, as `keys list` prints it.")]) -> None:
    """Revoke a key. A service that runs knows within CHAT_KEY_CACHE_MS."""

    async def revoke(keys: ApiKeys, facts: dict[str, Any]) -> bool:
        revoked = await keys.revoke(key_id)
        facts |= {"what": key_id[:128], "status": 0 if revoked else 1}
        return revoked

    if not _with_keys("keys revoke", revoke):
        fail(f"There is no key {key_id} that is not revoked already.")


def _with_keys(command: str, work: Callable[[ApiKeys, dict[str, Any]], Coroutine[Any, Any, T]]) -> T:
    """Run work on the API keys in the database.

    The work puts facts for the audit trail into its second argument.
    """
    from service.access.api_keys import ApiKeys

    settings = read_settings()

    async def run() -> T:
        async with opened_database(settings) as database, audited(settings, database, command) as facts:
            return await work(ApiKeys(database, settings), facts)

    return run_on_database(settings, run)
