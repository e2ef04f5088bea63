"""One agent's mail in memory: its order, its unread messages, and what looking at it costs."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agent_state import MailMessage, SleepState
from agent_state.runtime.mailbox import Mailbox
from tests.runtime.runtimes import counted, make_runtime

STATUSES = ("unread", "read", "replied", "archived")


def message(number: int, status: str = "unread", **fields: Any) -> MailMessage:
    return MailMessage(
        message_id=f"m{number:04d}", timestamp=f"2026-01-01T00:00:{number:09d}Z", status=status
    ).model_copy(update=fields)


def calls(work: Callable[[], object]) -> int:
    with counted() as found:
        work()
    return found()


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([*STATUSES, None])), max_size=40))
def test_the_index_of_unread_mail_is_what_the_messages_say(
    changes: list[tuple[int, str | None]],
) -> None:
    mailbox, model = Mailbox(), dict[str, MailMessage]()
    for number, status in changes:
        if status is None:
            mailbox.pop(f"m{number:04d}", None)
            model.pop(f"m{number:04d}", None)
        else:
            new = message(number, status)
            mailbox[new.message_id] = model[new.message_id] = new
        assert dict(mailbox) == model
        unread = sorted(key for key, each in model.items() if each.status == "unread")
        assert [each.message_id for each in mailbox.unread()] == unread
        assert mailbox.unread_count == len(unread)


def test_a_message_whose_time_was_changed_by_hand_moves_in_the_order() -> None:
    mailbox = Mailbox()
    for number in (1, 2, 3):
        mailbox[f"m{number:04d}"] = message(number)
    mailbox["m0001"] = message(1, timestamp="2027-01-01T00:00:00Z")
    assert [each.message_id for each in mailbox.unread()] == ["m0002", "m0003", "m0001"]
    mailbox["m0001"] = message(1, "read", timestamp=None)
    assert [each.message_id for each in mailbox.unread()] == ["m0002", "m0003"]


async def test_the_inbox_is_the_oldest_first_and_as_many_as_asked_for() -> None:
    async with make_runtime() as runtime:
        await runtime.agents.create("bob", agent_type="none")
        for subject in "abcde":
            await runtime.mail.send("alice", "bob", subject=subject)
        ids = [each.message_id for each in runtime.mail.inbox("bob")]
        await runtime.mail.read("bob", ids[0])
        await runtime.mail.archive("bob", ids[1])
        assert [each.subject for each in runtime.mail.inbox("bob", limit=2)] == ["c", "d"]
        both = runtime.mail.inbox("bob", status=None, limit=2)
        assert [each.subject for each in both] == ["a", "c"]
        assert runtime.mail.inbox("bob", limit=0) == []
        assert len(runtime.mail.inbox("bob", limit=99)) == 3


async def test_what_looking_costs_depends_on_what_is_returned_and_not_on_the_mailbox() -> None:
    async with make_runtime() as runtime:
        cost = {}
        for agent_id, number in (("small", 10), ("large", 1000)):
            await runtime.agents.create(agent_id, agent_type="none")
            for n in range(number):
                await runtime.mail.send("x", agent_id, subject="s", body={"n": [n]})
            for read in runtime.mail.inbox(agent_id)[5:]:
                await runtime.mail.read(agent_id, read.message_id)
            cost[agent_id] = [
                calls(lambda agent_id=agent_id: runtime.mail.inbox(agent_id)),  # type: ignore[misc]
                calls(lambda agent_id=agent_id: runtime.mail.inbox(agent_id, limit=2)),  # type: ignore[misc]
            ]
        assert cost["large"] == cost["small"]


async def test_what_the_inbox_returned_can_be_changed_freely() -> None:
    async with make_runtime() as runtime:
        await runtime.agents.create("bob", agent_type="none")
        fields = {"body": {"n": [1]}, "metadata": {"tags": ["x"]}}
        await runtime.manager.save("mail", ("bob", "m"), {**fields, "message_id": "m", "own": [1]})
        await runtime.mail.send("alice", "bob", subject="s", **fields)  # type: ignore[arg-type]
        runtime.state.agents["bob"].mail["m"] = MailMessage.model_validate(
            {**fields, "message_id": "m", "own": [1]}
        )
        before = [each.model_dump() for each in runtime.mail.inbox("bob")]
        for found in runtime.mail.inbox("bob"):
            found.body["n"].append(2)
            found.metadata["tags"].append("y")
            found.status = "archived"
            if found.model_extra:
                found.model_extra["own"].append(2)
        assert [each.model_dump() for each in runtime.mail.inbox("bob")] == before


def test_a_mailbox_in_any_order_of_arrival_costs_about_the_same() -> None:
    def fill(numbers: list[int]) -> int:
        mailbox = Mailbox()

        def work() -> None:
            for number in numbers:
                mailbox[f"m{number:04d}"] = messages[number]

        return calls(work)

    messages = [message(number) for number in range(2000)]
    shuffled = random.Random(7).sample(range(2000), 2000)
    assert fill(shuffled) <= 2 * fill(list(range(2000)))


# -- sleeping with unread mail --------------------------------------------------------------------

STEPS = st.one_of(
    st.tuples(st.integers(0, 5), st.sampled_from([*STATUSES, None])),
    st.tuples(st.just("sleep"), st.sets(st.integers(0, 5), max_size=3)),
    st.tuples(st.just("restart"), st.none()),
)


@given(st.lists(STEPS, max_size=30))
def test_a_sleeper_has_seen_what_was_unread_and_not_left_out(steps: list[Any]) -> None:
    """The sums that are kept up agree with a model that looks at each message."""
    mailbox, sleep = Mailbox(), SleepState(agent_id="a")
    mailbox.begin_sleep(sleep)
    seen, new = set[str](), dict[str, None]()
    for step, what in steps:
        unread = [each.message_id for each in mailbox.unread()]
        if step == "sleep":
            left_out = [f"m{number:04d}" for number in what]
            sleep = SleepState(agent_id="a", sleep_started="2027-01-01T00:00:00Z")
            sleep.seen_mail = mailbox.seen(left_out)
            mailbox.begin_sleep(sleep, left_out)
            seen = {*unread} - {*left_out}
            new = {name: None for name in unread if name not in seen}
            assert (sleep.seen_mail is None) is (not seen)
        elif step == "restart":
            again = Mailbox()
            again.update(mailbox)
            found = {each.message_id for each in again.new(sleep)}
            assert found >= {*unread} - seen, "slept through something"
            if found != {*unread} - seen:
                assert found == {*unread}
        else:
            name = f"m{step:04d}"
            new.pop(name, None)
            if what is None:
                mailbox.pop(name, None)
            else:
                mailbox[name] = message(step, what)
                if what == "unread" and name not in seen:
                    new[name] = None
        assert [*mailbox._new] == [*new]
        unread = [each.message_id for each in mailbox.unread()]
        known = frozenset(unread[::2])
        assert mailbox.unread_except([*known]) == [each for each in unread if each not in known]


def test_falling_asleep_and_waking_cost_the_same_however_much_is_unread() -> None:
    cost = []
    for number in (10, 1000):
        mailbox = Mailbox()
        for each in range(number):
            mailbox[f"m{each:04d}"] = message(each)

        def work(mailbox: Mailbox = mailbox) -> None:
            for arrived in range(2000, 2020):
                sleep = SleepState.model_construct(agent_id="a", seen_mail=mailbox.seen())
                mailbox.begin_sleep(sleep)
                assert not [*mailbox.new(sleep)]
                mailbox[f"m{arrived:04d}"] = message(arrived)
                assert [each.message_id for each in mailbox.new(sleep)] == [f"m{arrived:04d}"]

        cost.append(calls(work))
    assert cost[1] == cost[0]
