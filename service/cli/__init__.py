"""The command line: `chat-history serve`, `health`, `keys`, `verify`, `indexes`, `import` and others.

Slow imports stand in the functions that need them, so that a command starts soon; those of `serve` run while
the embedded engine starts.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from service.cli import data, health, keys, serve
from service.cli.context import say

app = typer.Typer(
    help="Chat History Database: the service in which AI agents keep their conversations.",
    epilog="Everything else is set by CHAT_* variables or in .env; docs/settings.md lists them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"chat-history {version('chat-history-database')}")
        raise typer.Exit


@app.callback()
def _program(
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None: ...


app.command("serve")(serve.serve)
app.command("health")(health.health)
app.command("import")(data.import_users)
app.command("expire")(data.expire)
app.command("indexes")(data.indexes)
app.command("mongo-url")(data.mongo_url)
app.command("verify")(data.verify)
app.add_typer(keys.commands, name="keys")


def main() -> None:
    """Run the command line; say in a sentence where a file or the output cannot be used, and end with 1.

    A command whose reader has closed the pipe ends quietly, because the reader has read enough.
    """
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:  # nobody has closed it before the start
                sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            name = f" ({error.filename})" if error.filename is not None else ""
            say(f"A file or the output cannot be used{name}: {error.strerror or error}.")
        sys.stdout = None  # so that it is not flushed again
        raise SystemExit(1) from error
