"""Bugs that storage is known to have, seeded on purpose, each with the test that has to see it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """In ``file`` of the package, ``old`` (which occurs once) becomes ``new``.

    ``caught_by``: the tests that must then fail, as pytest is told.
    """

    file: str
    old: str
    new: str
    caught_by: str


_STATES = (
    "tests/faults/test_crash_states.py::test_after_a_power_cut_every_acknowledged_change_is_there"
)
_CALLS = "tests/faults/test_every_call.py::test_any_call_may_fail_or_be_the_last"
_LAWS = "tests/faults/test_laws_processes.py::test_the_laws_hold_whatever_befalls_real_processes"
_TRANSACTIONS = "tests/runtime/test_transactions.py::test_what_a"
_REMOVE = "wal.remove_segments(segments, self._directory.journal, sync=self.durable)"

MUTATIONS = {
    "no fsync": Mutation(
        "storage/syscalls.py",
        '    _sync_data = getattr(os, "fdatasync", os.fsync)',
        "    def _sync_data(fd: int) -> None: ...",
        _STATES,
    ),
    "no fsync of the directory": Mutation(
        "storage/syscalls.py",
        '    if os.name == "nt":\n        return\n    fd =',
        "    return\n    fd =",
        _STATES,
    ),
    "fsync tried again": Mutation(
        "storage/wal.py",
        "                syscalls.fdatasync(self._fd)\n",
        "                try:\n"
        "                    syscalls.fdatasync(self._fd)\n"
        "                except OSError:\n"
        "                    syscalls.fdatasync(self._fd)\n",
        "tests/storage/test_journal.py::test_an_fsync_that_failed_is_never_asked_again",
    ),
    "no lock": Mutation(
        "storage/locks.py",
        "                return lock_descriptor(self._fd, blocking=False)\n",
        "                return True\n",
        "tests/storage/test_locks.py::test_a_held_lock_is_not_given_twice",
    ),
    "a lock object shared by tasks": Mutation(
        "storage/locks.py",
        "        alone = self.holders.keys() <= {task}\n",
        "        alone = True\n",
        "tests/faults/test_four_writers.py",
    ),
    "no repair of a torn tail": Mutation(
        "storage/log_writer.py",
        "                syscalls.ftruncate(fd, end)\n",
        "",
        "tests/storage/test_logs.py::test_a_tail_torn_at_any_byte_costs_only_the_torn_record",
    ),
    "the lock file is unlinked": Mutation(
        "storage/locks.py",
        "                unlock_descriptor(fd)\n",
        "                os.unlink(self.path)\n                unlock_descriptor(fd)\n",
        "tests/storage/test_locks.py",
    ),
    "acknowledged before fsync": Mutation(
        "storage/wal_store.py",
        "            await commits.submit(LogSave(resolution.changes))\n",
        "            commits.submit(LogSave(resolution.changes))\n",
        f"--full {_CALLS}[exclusive-save]",
    ),
    "no shield against cancellation": Mutation(
        "storage/executor.py",
        "        self._abandoned = True\n        try:",
        "        return super().cancel(msg)\n        try:",
        "tests/storage/test_batches.py",
    ),
    "the journal goes before its files are durable": Mutation(
        "storage/checkpoint.py",
        f"        self.sync()\n        {_REMOVE}",
        f"        {_REMOVE}\n        self.sync()",
        _STATES,
    ),
    "the watcher's default filter": Mutation(
        "storage/watch.py",
        "watch_filter=self._concerns_us",
        "watch_filter=__import__('watchfiles').DefaultFilter()",
        "tests/storage/test_watch.py::test_events_hide_no_id",
    ),
    "a group without its intent": Mutation(
        "storage/group_writer.py",
        "        _write_record("
        "record, frame(encode_changes(changes, checked)), sync=directory.sync)\n",
        "",
        f"--full {_CALLS}[shared-group]",
    ),
    "a short write is taken for a whole one": Mutation(
        "storage/fileio.py",
        "    if done == len(data):\n        return\n",
        "    return\n",
        "tests/storage/test_atomic.py::test_a_short_write_is_continued",
    ),
    "a conflict is not looked at": Mutation(
        "storage/changes.py",
        "        if change.expected is not None and change.expected != actual:",
        "        if False:",
        "tests/faults/test_four_writers.py",
    ),
    "the owner of an agent is not checked": Mutation(
        "runtime/state.py",
        "                group.check(agent.fence.kind, agent.fence.key, agent.fence.expected)\n",
        "",
        f"{_LAWS}[shared]",
    ),
    "a task is completed without what its handler changed": Mutation(
        "runtime/outcomes.py",
        "await self._store(agent, live, change, copy=copy, claim_next=claim_next)\n",
        "await self._store(agent, live, change, claim_next=claim_next)\n",
        f"{_LAWS}[exclusive]",
    ),
    "a failed attempt leaves what it changed": Mutation(
        "runtime/attempt.py",
        "            self._parts[name] = plain_copy(self._known_part(name))\n",
        "            self._parts[name] = self._known_part(name)\n",
        f"{_LAWS}[exclusive]",
    ),
    "mail is not marked with the memory of it": Mutation(
        "runtime/state.py",
        "copy.committing(body, copy.add_marks(group))",
        "copy.committing(body, {})",
        f"{_LAWS}[exclusive]",
    ),
    "a later attempt does not get what a step changed": Mutation(
        "runtime/context.py",
        "            self._copy.apply(name, known.memory)\n",
        "",
        f"{_TRANSACTIONS}_step_changed_is_stored_with_its_result_and_never_done_twice",
    ),
    "an attempt sends under keys of its own": Mutation(
        "runtime/context.py",
        '        return f"{self._live.task.task_id}.{dedupe_key}"',
        '        return f"{self._live.task.task_id}.{self.attempt}.{dedupe_key}"',
        f"{_TRANSACTIONS}_task_sends_is_sent_once_whatever_cleanup_archives_meanwhile",
    ),
}
