"""The cut of a context over generated histories, through a store in memory, beside a simple reference."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.context_cut import simulate
from service.formats import message_pieces
from service.formats.message_pieces import begins_turn, pieces, tokens_of
from service.history import context as contexts
from service.history.context import ContextRequest, ShortenedResults
from service.history.context_cut import Unit
from service.tenancy import ConversationRef
from tests.unit.fake_store import KEY, OWNER, conversation, fake_store, message

Json = dict[str, Any]
REF = ConversationRef(KEY, OWNER)


def call(call_id: str, name: str = "search") -> Json:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}


@st.composite
def histories(draw: Any, turns: int = 12) -> list[Json]:
    """System messages, and turns with parallel, unanswered and late calls, pictures and reasoning."""
    sizes = st.integers(1, 400)
    found: list[Json] = [
        {"role": draw(st.sampled_from(["system", "developer"])), "content": "x" * draw(sizes)}
        for _ in range(draw(st.integers(0, 2)))
    ]
    late: list[str] = []
    for turn in range(draw(st.integers(0, turns))):
        if draw(st.integers(0, 9)):
            found.append({"role": "user", "content": draw(_contents(sizes))})
        else:
            found.append({"role": "system", "content": "in between"})
        found += [{"role": "tool", "tool_call_id": each, "content": "late"} for each in late]
        late = []
        for step in range(draw(st.sampled_from([0, 1, 1, 2, 3, 8]))):
            names = [f"c{turn}.{step}.{n}" for n in range(draw(st.sampled_from([0, 1, 1, 2, 3])))]
            as_items = draw(st.booleans())
            if as_items:
                found.append({"role": "assistant", "content": None, "openai_item": _reasoning()})
                found += [
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [call(each)],
                        "openai_item": dict.fromkeys(("call_id", "name", "arguments"))
                        | {"type": "function_call"},
                    }
                    for each in names
                ]
            else:
                said: Json = {"role": "assistant", "content": "x" * draw(sizes)}
                found.append(said | ({"tool_calls": [call(each) for each in names]} if names else {}))
            for each in names:
                fate = draw(st.sampled_from(["now", "now", "now", "never", "late"]))
                if fate == "now":
                    found.append({"role": "tool", "tool_call_id": each, "content": "x" * draw(sizes)})
                elif fate == "late":
                    late.append(each)
        if draw(st.booleans()):
            found.append({"role": "assistant", "content": "x" * draw(sizes)})
        if not draw(st.integers(0, 15)):
            found.append({"role": "tool", "tool_call_id": "of nobody", "content": "x"})
    return found


def _contents(sizes: st.SearchStrategy[int]) -> st.SearchStrategy[Any]:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 9_000}}
    return st.one_of(
        sizes.map(lambda size: "x" * size),
        sizes.map(lambda size: [{"type": "text", "text": "x" * size}, picture]),
    )


def _reasoning() -> Json:
    return {"type": "reasoning", "id": "rs_1", "summary": []}


def stored(history: Sequence[Json], *, totals: bool = True) -> list[Json]:
    """Return the documents of a conversation, each message with the totals that an append gives it."""
    tokens = turns = 0
    documents = []
    for seq, fields in enumerate(history, 1):
        before: Json = {"_tokens_before": tokens, "_turns_before": turns} if totals else {}
        documents.append(message(seq, **before, **fields))
        tokens += tokens_of(fields)[0]
        turns += begins_turn(fields)
    counts: Json = {"last_seq": len(history), "message_count": len(history), "version": len(history)}
    sums: Json = {"tokens_total": tokens, "turns_total": turns} if totals else {}
    return [conversation(**counts, **sums), *documents]


def context_of(documents: Sequence[Json], wanted: ContextRequest, *, embedded: bool = True) -> Json:
    store, _ = fake_store(documents, embedded=embedded)
    return asyncio.run(contexts.context(store, REF, wanted))


def results_and_calls(messages: Sequence[Json]) -> tuple[list[str], list[str]]:
    found = [piece for each in messages for piece in pieces(each)]
    return (
        [each.call_id for each in found if each.is_result],
        [each.call_id for each in found if each.is_call],
    )


UNITS: list[Unit] = ["tokens", "messages", "turns"]
MOST = {"tokens": st.integers(50, 3_000), "messages": st.integers(1, 30), "turns": st.integers(1, 6)}


@st.composite
def requests(draw: Any) -> ContextRequest:
    unit = draw(st.sampled_from(UNITS))
    return ContextRequest(unit, draw(MOST[unit]), keep_ratio=draw(st.sampled_from([0.0, 0.3, 0.7, 0.9, 1.0])))


@settings(deadline=None, max_examples=300)
@given(histories(), requests(), st.booleans())
def test_a_context_keeps_every_promise(history: list[Json], wanted: ContextRequest, totals: bool) -> None:
    made = context_of(stored(history, totals=totals), wanted)
    sent = made["messages"]
    # Within the budget, but for what is flagged.
    if not made["over_budget"]:
        sizes = {
            "tokens": made["tokens"],
            "messages": len(sent),
            "turns": sum(map(begins_turn, sent)),
        }
        assert sizes[wanted.unit] <= wanted.most
        assert made["tokens"] == sum(tokens_of(each)[0] for each in sent)
    # The head is always in.
    head = contexts._leading(history)
    assert [each["content"] for each in sent[: len(head)]] == [each["content"] for each in head]
    # No result without its call, and no call whose stored result is left out.
    results, calls = results_and_calls(sent)
    assert set(results) <= set(calls)
    answered = {piece.call_id for each in history for piece in pieces(each) if piece.is_result}
    missing = {call for call in calls if call not in results}
    assert not missing & answered
    # The rest is in the order of the history, and without holes, but for the user's message of a cut turn.
    kept = [each["seq"] for each in sent[len(head) :]]
    assert kept == sorted(kept)
    if kept and made["from_seq"] is not None:
        behind = [seq for seq in kept if seq >= made["from_seq"]]
        dropped = set(range(made["from_seq"], made["to_seq"] + 1)) - set(behind)
        assert all(history[seq - 1]["role"] == "tool" for seq in dropped)  # a result without its call
        before = [seq for seq in kept if seq < made["from_seq"]]
        assert len(before) <= 1
        if not begins_turn(history[made["from_seq"] - 1]) and made["from_seq"] > len(head) + 1:
            users = [n for n in range(len(head) + 1, made["from_seq"]) if begins_turn(history[n - 1])]
            assert before == users[-1:]


@pytest.mark.parametrize("totals", [True, False])
def test_a_turn_cut_by_a_late_result_keeps_the_users_message(totals: bool) -> None:
    history: list[Json] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "x", "tool_calls": [call("late")]},
        {"role": "user", "content": "x"},
        {"role": "tool", "tool_call_id": "late", "content": "x"},
        {"role": "tool", "tool_call_id": "of nobody", "content": "x"},
    ]
    made = context_of(stored(history, totals=totals), ContextRequest("turns", 1, keep_ratio=0.0))
    assert [each["seq"] for each in made["messages"]] == [1, 2, 3, 4]


@settings(deadline=None, max_examples=200)
@given(histories(), st.integers(200, 3_000), st.sampled_from(["openai", "responses", "anthropic", "native"]))
def test_what_stands_for_missing_results_is_within_the_budget(
    history: list[Json], most: int, form: contexts.Form
) -> None:
    made = context_of(stored(history), ContextRequest("tokens", most, form=form, repair=True))
    assert made["over_budget"] or made["tokens"] <= most
    assert made["from_seq"] == context_of(stored(history), ContextRequest("tokens", most))["from_seq"]


def test_many_missing_results_are_within_the_budget() -> None:
    history = [
        each
        for turn in range(40)
        for each in (
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": None, "tool_calls": [call(f"c{turn}.{n}") for n in range(4)]},
        )
    ]
    for most in range(400, 1_600, 7):
        made = context_of(stored(history), ContextRequest("tokens", most, keep_ratio=1, repair=True))
        assert len(made["synthetic"]) >= 4
        assert made["tokens"] <= most


@settings(deadline=None, max_examples=150)
@given(histories(), requests())
def test_a_cut_never_moves_back_while_messages_are_appended(
    history: list[Json], wanted: ContextRequest
) -> None:
    before = 0
    for count in range(1, len(history) + 1):
        # A late result ties its call to all messages between the two, so it may make the context begin there.
        now = context_of(stored(history[:count]), wanted)["from_seq"] or 0
        if any(each.get("content") == "late" for each in history[:count]):
            return
        assert now >= before
        before = now


@settings(deadline=None, max_examples=100)
@given(histories(), requests())
def test_a_cut_is_the_same_on_an_engine_that_reads_in_windows_and_on_mongodb(
    history: list[Json], wanted: ContextRequest
) -> None:
    documents = stored(history)
    assert context_of(documents, wanted) == context_of(documents, wanted, embedded=False)


def reference(history: Sequence[Json], most: int, step: int) -> int:
    """Return where a context in tokens begins, of turns without calls that are all within the budget."""
    sizes = [tokens_of(each)[0] for each in history]
    begins = [sum(sizes[:place]) for place in range(len(sizes))]
    turns = [place for place, each in enumerate(history) if begins_turn(each)]
    if sum(sizes) <= most:
        return 1
    last_out = max(place for place in range(len(sizes)) if sum(sizes[place:]) > most)
    line = next(n * step for n in range(len(sizes) * most) if n * step > begins[last_out])
    fitting = [place for place in turns if place > last_out]
    on_line = [place for place in fitting if begins[place] >= line]
    best = on_line[0] if on_line and begins[on_line[0]] - begins[fitting[0]] <= step else fitting[0]
    return best + 1


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), min_size=1), st.integers(100, 900))
def test_a_cut_between_turns_is_the_one_of_the_reference(turns: list[tuple[int, int]], most: int) -> None:
    history = [
        each
        for asked, answered in turns
        for each in (
            {"role": "user", "content": "x" * asked},
            {"role": "assistant", "content": "x" * answered},
        )
    ]
    wanted = ContextRequest("tokens", most)
    assert context_of(stored(history), wanted)["from_seq"] == reference(history, most, wanted.step)


def plain(turns: int, size: int = 70) -> list[Json]:
    return [{"role": "user" if n % 2 == 0 else "assistant", "content": "x" * size} for n in range(2 * turns)]


def test_a_context_without_totals_is_cut_at_a_place_that_stays() -> None:
    """An earlier version stored no totals: the grid then begins where the first message with totals is."""
    old, new = stored(plain(100), totals=False), stored(plain(30))
    documents = old[1:]
    for seq, each in enumerate(new[1:], 201):
        documents.append({**each, "_id": f"{KEY}/m{seq}", "seq": seq})
    places = []
    for count in range(200, 261):
        sums: Json = {"tokens_total": 0, "turns_total": 0}
        if count > 200:
            last = documents[count - 1]
            sums["tokens_total"] = last["_tokens_before"] + tokens_of(plain(1)[(count + 1) % 2])[0]
        about = conversation(last_seq=count, message_count=count, **sums)
        places.append(context_of([about, *documents[:count]], ContextRequest("tokens", 1_000))["from_seq"])
    assert places == sorted(places)
    assert len(set(places)) < 12  # of 60 messages; "the newest that fit" would move 30 times


def test_a_deletion_moves_no_cut() -> None:
    documents = stored(plain(100))
    wanted = ContextRequest("tokens", 1_000)
    before = context_of(documents, wanted)["from_seq"]
    for removed in (before - 2, before + 3):
        rest = [each for each in documents if each.get("seq") != removed]
        assert context_of(rest, wanted)["from_seq"] <= before
    assert context_of([each for each in documents if each.get("seq") != 200], wanted)["from_seq"] <= before
    assert context_of([each for each in documents if each.get("seq") != 5], wanted)["from_seq"] == before


def test_a_turn_over_the_budget_is_cut_between_its_steps_also_when_the_next_turn_has_begun() -> None:
    steps = [
        {"role": "assistant", "content": "x" * 60, "tool_calls": [call(f"c{n}")]}
        if part == 0
        else {"role": "tool", "tool_call_id": f"c{n}", "content": "y" * 60}
        for n in range(30)
        for part in (0, 1)
    ]
    history = [*plain(3), {"role": "user", "content": "the task"}, *steps]
    wanted = ContextRequest("tokens", 600)
    for more in ([], [{"role": "assistant", "content": "done"}, {"role": "user", "content": "thanks"}]):
        made = context_of(stored([*history, *more]), wanted)
        assert made["messages"][0]["content"] == "the task"
        assert made["messages"][1]["tool_calls"]
        assert made["messages"][1]["seq"] == made["from_seq"] > 8
        assert 300 < made["tokens"] <= 600
        assert not made["over_budget"]


def test_a_late_result_holds_together_all_that_stands_between_it_and_its_call() -> None:
    late: list[Json] = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": [call("c")]},
        {"role": "user", "content": "and meanwhile?"},
        {"role": "assistant", "content": "I wait"},
        {"role": "tool", "tool_call_id": "c", "content": "found"},
        {"role": "assistant", "content": "found it"},
    ]
    history = [*plain(20), *late, *plain(3)]
    asked, answered = 42, 45
    smallest = sum(tokens_of(each)[0] for each in history[asked - 1 :])
    for most in range(smallest, 4 * smallest, 5):
        made = context_of(stored(history), ContextRequest("tokens", most, keep_ratio=0.8))
        assert not asked < made["from_seq"] <= answered
        results, calls = results_and_calls(made["messages"])
        assert results == calls


def test_a_step_that_alone_is_over_the_budget_is_in_and_flagged() -> None:
    large = {"role": "assistant", "content": "x" * 9_000}
    made = context_of(
        stored([*plain(40), {"role": "user", "content": "?"}, large]), ContextRequest("tokens", 500)
    )
    assert [each["content"][:1] for each in made["messages"]] == ["?", "x"]
    assert made["over_budget"]


def test_older_results_are_left_out_by_the_grid_alone() -> None:
    history: list[Json] = []
    for n in range(60):
        history += [
            {"role": "user", "content": f"q{n}"},
            {"role": "assistant", "content": None, "tool_calls": [call(f"c{n}")]},
            {"role": "tool", "tool_call_id": f"c{n}", "content": "y" * (40 if n % 5 == 0 else 800)},
            {"role": "assistant", "content": "a"},
        ]
    wanted = ContextRequest("tokens", 4_000, shortened=ShortenedResults(3, 100))
    firsts = []
    for count in range(100, 241, 4):
        sent = context_of(stored(history[:count]), wanted)["messages"]
        results = [each for each in sent if each["role"] == "tool"]
        short = ["left out" in each["content"] for each in results]
        assert not any(short[-3:])
        assert all(each["id"] in each["content"] for each, out in zip(results, short, strict=True) if out)
        assert not any(
            out and len(history[each["seq"] - 1]["content"]) == 40
            for each, out in zip(results, short, strict=True)
        )
        firsts.append(max((each["seq"] for each, out in zip(results, short, strict=True) if out), default=0))
    assert firsts == sorted(firsts)
    assert any(firsts)
    assert len(set(firsts)) <= len(firsts) / 2


@pytest.mark.parametrize("unit", UNITS)
def test_an_empty_conversation_has_an_empty_context(unit: Unit) -> None:
    made = context_of([conversation()], ContextRequest(unit, 5))
    assert made["messages"] == []
    assert (made["from_seq"], made["to_seq"], made["tokens"]) == (None, None, 0)


def test_what_is_left_out_is_counted() -> None:
    history = [{"role": "system", "content": "be good"}, *plain(100)]
    made = context_of(stored(history), ContextRequest("tokens", 1_000))
    out = history[1 : made["from_seq"] - 1]
    assert made["left_out"] == {"messages": len(out), "tokens": sum(tokens_of(each)[0] for each in out)}


# -- a simulation (python -m benchmarks.context_cut prints it for more budgets) ----------------------------


def test_over_3000_turns_the_cut_stands_still_and_most_of_what_is_sent_is_an_unchanged_prefix() -> None:
    grid, newest = simulate(3_000, 8_000, 0.7), simulate(3_000, 8_000, 1.0)
    print(f"\nthe grid: {grid}; the newest that fit: {newest}")
    assert grid.moved < 0.25
    assert newest.moved > 0.6
    assert grid.unchanged > 0.7
    assert newest.unchanged < 0.4


def test_tokens_are_the_callers_or_an_estimate_of_the_text() -> None:
    said = {"role": "user", "content": "x" * 400}
    assert tokens_of(said) == (107, True)
    assert tokens_of(said | {"token_count": 7}) == (7, False)
    for wrong in (True, -1, 1.5, "7", None, 10**9 + 1):
        assert tokens_of(said | {"token_count": wrong}) == (107, True)
    assert tokens_of(said | {"metadata": {"a": "x" * 400}, "id": "m", "seq": 5})[0] == 107
    url = "data:image/png;base64," + "A" * 400_000
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    assert 1_024 < tokens_of(picture)[0] < 1_060
    assert message_pieces.tokens_of({"role": "user", "content": "ä" * 4_000})[0] > 2_000
