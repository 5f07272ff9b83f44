"""A middleware for LangChain's `create_agent`, kept by the service (the extra `langchain-agents`).

It stores messages as `chat_history_client.langchain` does, so both read the same conversations. Each message
is stored under its id in LangGraph, so a step that LangGraph repeats is stored once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NotRequired

from langchain.agents.middleware import AgentMiddleware, AgentState
from langchain.agents.middleware.types import PrivateStateAttr
from langchain_core.messages import AnyMessage, BaseMessage, RemoveMessage
from langgraph.config import get_config
from langgraph.graph.message import REMOVE_ALL_MESSAGES

from chat_history_client import AsyncChatHistoryClient, ChatHistoryClient
from chat_history_client._adapters import aread, aread_or_begin, read, read_or_begin
from chat_history_client.langchain import restored_with_ids, stored_as
from chat_history_client.types import Context, Json


class ChatHistoryState(AgentState[Any]):
    """The agent's state, with the ids of the messages that the service has."""

    chat_history_stored: NotRequired[Annotated[list[str], PrivateStateAttr]]


class ChatHistoryMiddleware(AgentMiddleware[ChatHistoryState, Any, Any]):
    """Puts the history before the messages of a run, and stores what the run brings, step by step.

    The conversation is `conversation_id`, else the `thread_id` of the run's config; its owner is `user_id`,
    else the config's `user_id`, else `default`. So one agent serves many users:
    `agent.invoke(…, {"configurable": {"thread_id": "t1", "user_id": "ada"}})`. If the conversation is another
    user's, the run ends with Conflict before the model is called.

    What the user says is stored before the model is called. A call of tools is stored together with all of
    its results, so no stored call lacks its result, and the answer when the run ends. Put this middleware in
    front of those that shorten the messages (`SummarizationMiddleware`): the history stays whole, and a
    summary is not stored. A checkpointer is not needed; with one, the messages of both are told apart by id.

    With `max_context_tokens`, a run begins with what the service's `get_context` returns within so many
    tokens, in place of the whole history. What the run brings comes on top of that.

    `client` serves `invoke` and `stream`, and `async_client` serves `ainvoke` and `astream`.
    """

    state_schema = ChatHistoryState

    def __init__(
        self,
        client: ChatHistoryClient | None = None,
        *,
        async_client: AsyncChatHistoryClient | None = None,
        conversation_id: str | None = None,
        user_id: str | None = None,
        max_context_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self._client = client
        self._async_client = async_client
        self._conversation_id = conversation_id
        self._user_id = user_id
        self._max_context_tokens = max_context_tokens

    def before_agent(self, state: ChatHistoryState, runtime: Any) -> Json | None:
        """Load the history, or its context."""
        del runtime
        client, (name, user) = self._sync(), self._place()
        if (most := self._max_context_tokens) is None:
            return _loaded(read(client, name, user), state["messages"])

        def read_context() -> list[Json]:
            return _with_ids(client.get_context(name, max_tokens=most, repair="placeholder", user_id=user))

        return _loaded(read_or_begin(client, name, user, read_context), state["messages"], cut=True)

    async def abefore_agent(self, state: ChatHistoryState, runtime: Any) -> Json | None:
        """Load the history, or its context."""
        del runtime
        client, (name, user) = self._async(), self._place()
        if (most := self._max_context_tokens) is None:
            return _loaded(await aread(client, name, user), state["messages"])

        async def read_context() -> list[Json]:
            context = client.get_context(name, max_tokens=most, repair="placeholder", user_id=user)
            return _with_ids(await context)

        return _loaded(await aread_or_begin(client, name, user, read_context), state["messages"], cut=True)

    def before_model(self, state: ChatHistoryState, runtime: Any) -> Json | None:
        """Store what is new: what the user says, or a call with its results."""
        del runtime
        return self._store(state)

    async def abefore_model(self, state: ChatHistoryState, runtime: Any) -> Json | None:
        """Store what is new: what the user says, or a call with its results."""
        del runtime
        return await self._astore(state)

    def after_agent(self, state: ChatHistoryState, runtime: Any) -> Json | None:
        """Store the answer."""
        del runtime
        return self._store(state)

    async def aafter_agent(self, state: ChatHistoryState, runtime: Any) -> Json | None:
        """Store the answer."""
        del runtime
        return await self._astore(state)

    def _store(self, state: ChatHistoryState) -> Json | None:
        new = _new(state)
        if not new:
            return None
        conversation, user = self._place()
        self._sync().add_all_messages(conversation, list(map(_with_id, new)), user_id=user)
        return _stored(state, new)

    async def _astore(self, state: ChatHistoryState) -> Json | None:
        new = _new(state)
        if not new:
            return None
        conversation, user = self._place()
        await self._async().add_all_messages(conversation, list(map(_with_id, new)), user_id=user)
        return _stored(state, new)

    def _place(self) -> tuple[str, str]:
        """Return the conversation and its owner."""
        configurable = get_config().get("configurable", {})
        conversation = self._conversation_id or configurable.get("thread_id")
        if conversation is None:
            raise ValueError(
                "ChatHistoryMiddleware knows no conversation. Give it a `conversation_id`, or run the agent "
                'with the config {"configurable": {"thread_id": "…"}}.'
            )
        return str(conversation), str(self._user_id or configurable.get("user_id") or "default")

    def _sync(self) -> ChatHistoryClient:
        if self._client is None:
            raise ValueError("The synchronous methods need a ChatHistoryClient: `client`.")
        return self._client

    def _async(self) -> AsyncChatHistoryClient:
        if self._async_client is None:
            raise ValueError("The asynchronous methods need an AsyncChatHistoryClient: `async_client`.")
        return self._async_client


def _loaded(stored: Sequence[Json], messages: Sequence[BaseMessage], *, cut: bool = False) -> Json:
    """Return the update that puts the history before the messages that it does not have yet.

    Where the history is `cut`, messages of the run that stand before one of it were left out of it.
    """
    history = restored_with_ids(stored)
    ids = [message.id for message in history]
    known = [message.id in set(ids) for message in messages]
    first = len(known) - known[::-1].index(True) if cut and True in known else 0
    new = [message for message, is_known in zip(messages[first:], known[first:], strict=True) if not is_known]
    update: Json = {"chat_history_stored": ids}
    if history:
        update["messages"] = [RemoveMessage(id=REMOVE_ALL_MESSAGES), *history, *new]
    return update


def _with_ids(context: Context) -> list[Json]:
    """Return the messages of a context; the summary, and what stands for a missing result, have no ids."""
    return [{"id": f"context,{place}", **message} for place, message in enumerate(context["messages"])]


def _new(state: ChatHistoryState) -> list[AnyMessage]:
    """Return the messages that the service does not have yet; a summary of others is none."""
    stored = set(state.get("chat_history_stored", []))
    return [message for message in state["messages"] if message.id not in stored and not _is_summary(message)]


def _is_summary(message: BaseMessage) -> bool:
    return message.additional_kwargs.get("lc_source") == "summarization"


def _with_id(message: BaseMessage) -> Json:
    """Return the message to store, with its id, under which it is stored once."""
    return {"id": message.id, **stored_as(message)}


def _stored(state: ChatHistoryState, new: Sequence[BaseMessage]) -> Json:
    known = state.get("chat_history_stored", [])
    return {"chat_history_stored": [*known, *(message.id for message in new)]}
