"""Random interleavings of everything, over conversations and users, against a model in plain Python."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from tests.harness import Service, new_id, sent

USERS = ("ada", "bob")
ROLES = ("user", "assistant", "tool")


@dataclass
class Talk:
    """What the model knows of a conversation: its messages by seq, and how they were appended."""

    user: str
    title: str | None
    last_seq: int = 0
    messages: dict[int, dict[str, Any]] = field(default_factory=dict)
    appended: dict[str, tuple[list[Any], list[int]]] = field(default_factory=dict)


def history_machine(client: httpx.Client) -> type[RuleBasedStateMachine]:  # noqa: C901  (its rules)
    numbers = st.integers(0, 2)
    sizes = st.integers(1, 4)

    class HistoryMachine(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            run = new_id("m")
            self.users = [f"{user}-{run}" for user in USERS]
            self.ids = [f"{run}-{number}" for number in range(3)]
            self.talks: dict[str, Talk] = {}
            self.activity: list[str] = []
            self.count = 0
            self.acted: set[int] = set()  # on which conversations the latest step acted

        # -- what callers do ---------------------------------------------------------------------------

        @rule(number=numbers, owner=st.integers(0, 1))
        def create(self, number: int, owner: int) -> None:
            conversation, user = self.ids[number], self.users[owner]
            self.count += 1
            self.acted.add(number)
            body = {"id": conversation, "user_id": user, "title": f"t{self.count}"}
            response = client.post("/conversations", json=body)
            talk = self.talks.get(conversation)
            if talk is None:
                assert response.status_code == 201
                self.talks[conversation] = Talk(user, body["title"])
                self.touch(conversation)
            else:
                assert response.status_code == (200 if talk.user == user else 409)

        @rule(number=numbers, size=sizes, keyed=st.booleans(), named=st.booleans())
        def append(self, number: int, size: int, keyed: bool, named: bool) -> None:
            self.count += 1
            batch: list[dict[str, Any]] = [
                {"role": ROLES[(self.count + part) % 3], "content": f"{self.count}/{part}", "n": [part, {}]}
                for part in range(size)
            ]
            if named and not keyed:
                batch[0]["id"] = f"own-{self.count}"
            key = f"key-{self.count}" if keyed else None
            response = self.post(number, batch, key)
            talk = self.talks.get(self.ids[number])
            if talk is None:
                assert response.status_code == 404
                return
            assert response.status_code == 201
            stored = response.json()["data"]
            seqs = [talk.last_seq + part + 1 for part in range(size)]
            assert [each["seq"] for each in stored] == seqs
            assert [sent(each) for each in stored] == [_unnamed(each) for each in batch]
            talk.last_seq += size
            talk.messages |= {each["seq"]: each for each in stored}
            if keyed or named:
                talk.appended[key or batch[0]["id"]] = (batch, seqs)
            self.touch(self.ids[number])

        @rule(number=numbers, owner=st.integers(0, 1))
        def append_or_create(self, number: int, owner: int) -> None:
            conversation, user = self.ids[number], self.users[owner]
            self.count += 1
            self.acted.add(number)
            message = {"id": f"first-{self.count}", "role": "user", "content": f"{self.count}"}
            body = {"conversation": {"user_id": user, "title": f"t{self.count}"}, "messages": [message]}
            for status in (201, 200):  # the second is a replay
                response = client.post(f"/conversations/{conversation}/messages", json=body)
                talk = self.talks.get(conversation)
                if talk is not None and talk.user != user:
                    assert response.status_code == 409
                    return
                assert response.status_code == status
                if talk is None:
                    talk = self.talks[conversation] = Talk(user, f"t{self.count}")
                (stored,) = response.json()["data"]
                talk.last_seq = max(talk.last_seq, stored["seq"])
                assert stored["seq"] == talk.last_seq
                talk.messages[stored["seq"]] = stored
            self.touch(conversation)

        @rule(number=numbers, behind=st.integers(0, 3), by_version=st.booleans())
        def append_if(self, number: int, behind: int, by_version: bool) -> None:
            """Append on the condition that nothing is behind a seq, or that the version is one of before."""
            conversation, talk = self.ids[number], self.talks.get(self.ids[number])
            self.count += 1
            self.acted.add(number)
            expected = max(0, talk.last_seq - behind) if talk else 0
            options: dict[str, Any] = {"params": {"expected_last_seq": expected}}
            holds = talk is not None and (
                expected == talk.last_seq or not any(seq > expected for seq in talk.messages)
            )
            if by_version and talk is not None:
                version = client.get(f"/conversations/{conversation}").json()["version"]
                options = {"headers": {"If-Match": f'"{max(0, version - behind)}"'}}
                holds = behind == 0 or version == 0
            message = {"role": "user", "content": f"if {self.count}"}
            response = client.post(f"/conversations/{conversation}/messages", json=message, **options)
            if talk is None:
                assert response.status_code == 404
            elif holds:
                assert response.status_code == 201
                talk.last_seq += 1
                assert response.json()["seq"] == talk.last_seq
                talk.messages[talk.last_seq] = response.json()
                self.touch(conversation)
            else:
                assert response.status_code == 409
                said = response.json()
                assert said["last_seq"] == talk.last_seq
                if not by_version:
                    missed = [talk.messages[seq] for seq in sorted(talk.messages) if seq > expected]
                    assert said["missed"] == missed

        @precondition(lambda self: any(talk.messages for talk in self.talks.values()))
        @rule(data=st.data(), same=st.booleans())
        def replace_one(self, data: st.DataObject, same: bool) -> None:
            conversation = data.draw(st.sampled_from([c for c, t in self.talks.items() if t.messages]))
            talk = self.talks[conversation]
            self.count += 1
            self.acted.add(self.ids.index(conversation))
            seq = data.draw(st.sampled_from(sorted(talk.messages)))
            before = talk.messages[seq]
            new = sent(before) if same else {"role": "tool", "content": f"replaced {self.count}"}
            path = f"/conversations/{conversation}/messages/{before['id']}"
            response = client.put(path, json=new)
            assert response.status_code == 200
            stored = response.json()
            self.compare_replaced(before, stored, new)
            talk.messages[seq] = stored
            talk.appended = {}  # what was appended so is not what is stored any more

        @rule(number=numbers, kept=st.integers(0, 6), changed=st.booleans(), added=st.integers(0, 3))
        def put_list(self, number: int, kept: int, changed: bool, added: int) -> None:
            """Make the history its first messages, of which the last may be changed, and new ones."""
            conversation, talk = self.ids[number], self.talks.get(self.ids[number])
            self.count += 1
            self.acted.add(number)
            before = [talk.messages[seq] for seq in sorted(talk.messages)][:kept] if talk else []
            new = [{"id": each["id"], **sent(each)} for each in before]
            if new and changed:
                new[-1] = {"id": new[-1]["id"], "role": "user", "content": f"put {self.count}"}
            new += [{"id": f"put-{self.count}-{part}", "role": "assistant"} for part in range(added)]
            response = client.put(f"/conversations/{conversation}/messages", json={"messages": new})
            if talk is None:
                assert response.status_code == 404
                return
            assert response.status_code == 200
            stored = response.json()["data"]
            assert [each["id"] for each in stored] == [each["id"] for each in new]
            assert [each["seq"] for each in stored[len(before) :]] == [
                talk.last_seq + part + 1 for part in range(added)
            ]
            for old, now, wanted in zip(before, stored, new, strict=False):
                self.compare_replaced(old, now, sent(wanted))
            talk.last_seq += added
            talk.messages = {each["seq"]: each for each in stored}
            talk.appended = {}
            if added:
                self.touch(conversation)

        def compare_replaced(self, before: Any, stored: Any, new: Any) -> None:
            assert sent(stored) == new
            for name in ("id", "seq", "created_at"):
                assert stored[name] == before[name]
            if sent(before) == new:
                assert stored == before
            else:
                assert stored["revision"] == before.get("revision", 0) + 1

        @precondition(lambda self: any(talk.appended for talk in self.talks.values()))
        @rule(data=st.data(), changed=st.booleans())
        def retry(self, data: st.DataObject, changed: bool) -> None:
            conversation = data.draw(st.sampled_from([c for c, t in self.talks.items() if t.appended]))
            talk = self.talks[conversation]
            key = data.draw(st.sampled_from(sorted(talk.appended)))
            batch, seqs = talk.appended[key]
            if changed:
                self.count += 1  # so that it is a change, also from what an earlier change had stored
                batch = [batch[0] | {"content": f"changed {self.count}"}, *batch[1:]]
            response = self.post(self.ids.index(conversation), batch, key if key.startswith("key") else None)
            left = [seq for seq in seqs if seq in talk.messages]
            if not left:
                # A key is good for as long as its messages exist; then it is a new one.
                assert response.status_code == 201
                stored = response.json()["data"]
                new = [talk.last_seq + part + 1 for part in range(len(batch))]
                assert [each["seq"] for each in stored] == new
                talk.last_seq += len(batch)
                talk.messages |= {each["seq"]: each for each in stored}
                talk.appended[key] = (batch, new)
                self.touch(conversation)
            elif changed or left != seqs:
                assert response.status_code == 409
            else:
                assert response.status_code == 200
                assert response.headers["idempotent-replayed"] == "true"
                assert response.json()["data"] == [talk.messages[seq] for seq in seqs]

        @precondition(lambda self: any(talk.messages for talk in self.talks.values()))
        @rule(data=st.data())
        def delete_one(self, data: st.DataObject) -> None:
            conversation = data.draw(st.sampled_from([c for c, t in self.talks.items() if t.messages]))
            talk = self.talks[conversation]
            self.acted.add(self.ids.index(conversation))
            seq = data.draw(st.sampled_from(sorted(talk.messages)))
            path = f"/conversations/{conversation}/messages/{talk.messages[seq]['id']}"
            assert client.delete(path).status_code == 204
            assert client.delete(path).status_code == 404
            del talk.messages[seq]
            self.touch(conversation)

        @rule(number=numbers, after=st.integers(0, 12))
        def delete_messages(self, number: int, after: int) -> None:
            conversation = self.ids[number]
            self.acted.add(number)
            response = client.delete(f"/conversations/{conversation}/messages", params={"after": after})
            talk = self.talks.get(conversation)
            assert response.status_code == (404 if talk is None else 204)
            if talk is not None and talk.last_seq > after:
                talk.messages = {seq: each for seq, each in talk.messages.items() if seq <= after}
                self.touch(conversation)

        @rule(number=numbers)
        def pop(self, number: int) -> None:
            conversation = self.ids[number]
            self.acted.add(number)
            response = client.post(f"/conversations/{conversation}/pop")
            talk = self.talks.get(conversation)
            if talk is None or not talk.messages:
                assert response.status_code == (404 if talk is None else 204)
                return
            assert response.json() == talk.messages.pop(max(talk.messages))
            self.touch(conversation)

        @rule(number=numbers)
        def delete(self, number: int) -> None:
            conversation = self.ids[number]
            self.acted.add(number)
            response = client.delete(f"/conversations/{conversation}")
            assert response.status_code == (204 if conversation in self.talks else 404)
            self.talks.pop(conversation, None)
            self.activity = [each for each in self.activity if each != conversation]

        # -- what readers see --------------------------------------------------------------------------

        @rule(
            number=numbers,
            limit=st.integers(1, 5),
            backwards=st.booleans(),
            role=st.none() | st.sampled_from(ROLES),
        )
        def page_through(self, number: int, limit: int, backwards: bool, role: str | None) -> None:
            talk = self.talks.get(self.ids[number])
            if talk is None:
                return
            expected = [talk.messages[seq] for seq in sorted(talk.messages)]
            if role is not None:
                expected = [each for each in expected if each["role"] == role]
            if backwards:
                expected.reverse()
            found: list[Any] = []
            query: dict[str, Any] = {"limit": limit, "order": "desc" if backwards else "asc"}
            query |= {"role": role} if role else {}
            while True:
                page = client.get(f"/conversations/{self.ids[number]}/messages", params=query).json()
                found += page["data"]
                assert len(page["data"]) == min(limit, len(expected) - len(found) + len(page["data"]))
                assert page["has_more"] is (len(found) < len(expected))
                if not page["has_more"]:
                    assert page["next"] is None
                    break
                query["before" if backwards else "after"] = page["next"]
            assert found == expected

        @rule(number=numbers, last=st.integers(1, 6))
        def read_last(self, number: int, last: int) -> None:
            talk = self.talks.get(self.ids[number])
            if talk is not None:
                expected = [talk.messages[seq] for seq in sorted(talk.messages)]
                query = {"last": last}
                page = client.get(f"/conversations/{self.ids[number]}/messages", params=query).json()
                assert page["data"] == expected[-last:]
                assert page["has_more"] is (len(expected) > last)

        @invariant()
        def the_service_and_the_model_agree(self) -> None:
            """Compare the conversations that the step acted on, and at the end (`teardown`) all of them."""
            if self.acted:
                self.compare(self.acted)
                self.compare_lists()
                self.acted = set()

        def teardown(self) -> None:
            self.compare(range(len(self.ids)))
            self.compare_lists()

        # -- helpers -----------------------------------------------------------------------------------

        def compare(self, numbers: Iterable[int]) -> None:
            for number in numbers:
                conversation = self.ids[number]
                response = client.get(f"/conversations/{conversation}")
                talk = self.talks.get(conversation)
                assert response.status_code == (404 if talk is None else 200), number
                if talk is not None:
                    about = response.json()
                    assert (about["user_id"], about["title"]) == (talk.user, talk.title)
                    assert (about["last_seq"], about["message_count"]) == (talk.last_seq, len(talk.messages))
                    history = client.get(f"/conversations/{conversation}/messages?limit=1000").json()
                    assert history["data"] == [talk.messages[seq] for seq in sorted(talk.messages)]
                    times = [each["created_at"] for each in history["data"]]
                    assert times == sorted(times)

        def compare_lists(self) -> None:
            """The lists are by latest activity."""
            for user in self.users:
                listed = client.get("/conversations", params={"user_id": user}).json()["data"]
                theirs = {c for c in self.activity if self.talks[c].user == user}
                assert {each["id"] for each in listed} == theirs
                order = [(each["active_at"], each["id"]) for each in listed]
                assert [time for time, _ in order] == sorted((time for time, _ in order), reverse=True)
            # The list of all users begins with these, because nobody else is at work.
            everybody = client.get("/conversations", params={"limit": 20}).json()["data"]
            assert {each["id"] for each in everybody if each["id"] in self.ids} == set(self.talks)

        def post(self, number: int, batch: list[Any], key: str | None) -> httpx.Response:
            self.acted.add(number)
            headers = {"Idempotency-Key": key} if key else {}
            path = f"/conversations/{self.ids[number]}/messages"
            return client.post(path, json={"messages": batch}, headers=headers)

        def touch(self, conversation: str) -> None:
            self.activity = [each for each in self.activity if each != conversation] + [conversation]

    return HistoryMachine


def _unnamed(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "id"}


def test_any_interleaving_leaves_what_the_model_says(service: Service) -> None:
    with service.client() as client:
        run_machine(
            history_machine(client),
            settings=settings(
                max_examples=25,
                stateful_step_count=25,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
