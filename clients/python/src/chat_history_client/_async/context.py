"""The context of a model call, and the checkpoints that shorten it."""

from __future__ import annotations

from chat_history_client import _requests as requests
from chat_history_client._async.calls import Calls
from chat_history_client.types import Checkpoint, Context, ContextFormat, Json, Repair


class Contexts(Calls):
    """Reads contexts, and stores checkpoints."""

    async def get_context(
        self,
        conversation_id: str,
        *,
        max_tokens: int | None = None,
        max_messages: int | None = None,
        max_turns: int | None = None,
        keep_ratio: float | None = None,
        format: ContextFormat | None = None,  # noqa: A002  (the service's own name)
        tool_results: str | None = None,
        repair: Repair | None = None,
        user_id: str | None = None,
    ) -> Context:
        """Return what a model is to be sent of a conversation, within exactly one of the three maxima.

        The messages are in the form that `format` names: `native` as they are stored, else `openai`,
        `responses` or `anthropic`. No call is parted from its result, and the beginning stands still for many
        turns; see docs/context.md for `keep_ratio`, `tool_results` and `repair`.
        """
        query = {
            "max_tokens": max_tokens,
            "max_messages": max_messages,
            "max_turns": max_turns,
            "keep_ratio": keep_ratio,
            "format": format,
            "tool_results": tool_results,
            "repair": repair,
            "user_id": user_id,
        }
        context: Context = await self._do(requests.read_context(conversation_id, query))
        return context

    async def create_checkpoint(
        self,
        conversation_id: str,
        upto_seq: int,
        summary: str,
        *,
        metadata: Json | None = None,
        user_id: str | None = None,
    ) -> Checkpoint:
        """Store a summary of the history up to a seq, which the context then has in place of all of that.

        A turn must end there (else ApiError 422), and the newest checkpoint stand before it (else Conflict).
        """
        call = requests.create_checkpoint(conversation_id, upto_seq, summary, metadata, user_id)
        checkpoint: Checkpoint = await self._do(call)
        return checkpoint

    async def list_checkpoints(self, conversation_id: str, *, user_id: str | None = None) -> list[Checkpoint]:
        """Return all checkpoints of a conversation, newest first."""
        listed = await self._do(requests.list_checkpoints(conversation_id, user_id))
        return list(listed["data"])

    async def delete_checkpoint(
        self, conversation_id: str, checkpoint_id: str, *, user_id: str | None = None
    ) -> None:
        """Delete a checkpoint; if it was the newest, the one before it counts again."""
        await self._do(requests.delete_checkpoint(conversation_id, checkpoint_id, user_id))
