"""The faults that were found in the runtime, and a breach of each law, to be put back on purpose.

``python -m tests.simulation --seeded`` finds the first seed that shows each.
"""

from __future__ import annotations

from tests.simulation.seeding import SeededFault

FAULTS = {
    # -- L1
    "a mark of mail is not stored with the memory": SeededFault(
        "runtime.state:RuntimeState._prepare",
        "copy.committing(body, copy.add_marks(group))",
        "copy.committing(body, {})",
        "L1",
        8,
    ),
    "a reply marks its message at once": SeededFault(
        "runtime.context:TaskContext.reply",
        "self._copy.mark(\n",
        "await self._state.manager.save('mail', (message.to_agent, message.message_id),"
        " mark_replied(message, sent.message_id, self.now()))\n    self._copy.mark(\n",
        "L1",
        10,
    ),
    # -- L2
    "a handler changes the agent itself, not a copy": SeededFault(
        "runtime.attempt:WorkingCopy.part",
        "plain_copy(self._known_part(name))",
        "self._known_part(name)",
        "L2",
        4,
    ),
    "what a failed attempt changed is stored": SeededFault(
        "runtime.outcomes:AttemptFinisher._finish",
        "await self._fail(agent, live, outcome.error, handler)",
        "await self._store(agent, live, partial(transitions.fail, error='?', now=now,"
        " policy=self._state.retry, random=self._state.random), copy=copy)",
        "L2",
        4,
    ),
    "a cancelled attempt leaves what it changed": SeededFault(
        "runtime.outcomes:AttemptFinisher._finish",
        "partial(transitions.cancel, now=now))",
        "partial(transitions.cancel, now=now), copy=copy)",
        "L2",
        233,
    ),
    "a shutdown stores half of an attempt": SeededFault(
        "runtime.outcomes:AttemptFinisher._finish",
        "transitions.release)",
        "transitions.release, copy=copy)",
        "L2",
        26,
    ),
    "each step stores the memory of the agent": SeededFault(
        "runtime.context:TaskContext._save",
        "copy=self._copy if commit_point else None,\n",
        "copy=self._copy,\n",
        "L2",
        4,
    ),
    "a checkpoint leaves the changes of steps to be made again": SeededFault(
        "runtime.attempt:WorkingCopy.without_contained",
        "drops = self._contained if",
        "drops = set() if",
        "L2",
        20,
    ),
    "a remembered step is forgotten": SeededFault(
        "runtime.context:TaskContext.step",
        'known.status == "done"',
        "False",
        "L2",
        20,
    ),
    "what overlapping steps change is mixed up": SeededFault(
        "runtime.attempt:WorkingCopy._flush",
        "self._parts_of_steps[-1:] or self._threads",
        "self._steps[:1]",
        "L2",
        11,
    ),
    "step_at_most_once runs again": SeededFault(
        "runtime.context:TaskContext.step_at_most_once",
        'known.status == "started"',
        "False",
        "L2",
        71,
    ),
    # -- L3
    "a completed task, and its memory later": SeededFault(
        "runtime.state:RuntimeState._prepare",
        "if agent.leased and not task_only:",
        'if agent.leased and not task_only and (changed is None or changed.status != "completed"):',
        "L3",
        2,
    ),
    "a checkpoint stores the progress alone": SeededFault(
        "runtime.context:TaskContext.checkpoint",
        "commit_point=True",
        "commit_point=False",
        "L2",
        6,
    ),
    "a step's result without what it changed": SeededFault(
        "runtime.context:TaskContext._do_step",
        "[*changes.patches]",
        "[]",
        "L3",
        5,
    ),
    "a patch of a step writes over another task's": SeededFault(
        "runtime.attempt:_apply_to_container",
        'elif op == "append" and type(now) is type(value) is list:',
        "elif False:",
        "L3",
        9,
    ),
    # -- L4
    "cleaning up forgets what a task has sent": SeededFault(
        "cleanup:_Cleanup._archive_sent",
        "if isinstance(sender, TaskReference):",
        "if False:",
        "L4",
        688,
    ),
    "each attempt sends anew": SeededFault(
        "runtime.context:TaskContext._own_id",
        'return f"{self._live.task.task_id}.{dedupe_key}"',
        'return f"{self._live.task.task_id}.{self.attempt}.{dedupe_key}"',
        "L4",
        4,
    ),
    "a key is shared by all senders of mail": SeededFault(
        "runtime.mail:MailService.send",
        "dedupe.dedupe_id(to_agent, from_agent, dedupe_key)",
        "dedupe.dedupe_id(to_agent, dedupe_key)",
        "L6",
        0,
    ),
    "a key is shared by all kinds of tasks": SeededFault(
        "runtime.tasks:TaskService.submit",
        "dedupe.dedupe_id(agent_id, name, submitter, dedupe_key)",
        "dedupe.dedupe_id(agent_id, dedupe_key)",
        "L6",
        2,
    ),
    "cleaning up frees a key before its time": SeededFault(
        "cleanup:_Cleanup._is_old",
        "until is None or instant(until) <= self._now",
        "True",
        "L4",
        2,
    ),
    # -- L5
    "a commit does not check who owns the agent": SeededFault(
        "runtime.state:RuntimeState.commit",
        "if agent.fence is not None:",
        "if False:",
        "L5",
        41,
    ),
    "an agent is taken without compare-and-set": SeededFault(
        "runtime.ownership:AgentOwnership._take",
        "expected=stored.revision if stored else 0",
        "expected=None",
        "L5",
        16,
    ),
    "the token does not grow": SeededFault(
        "runtime.ownership:AgentOwnership._take",
        '"token": token + 1}',
        '"token": max(1, token)}',
        "L5",
        1,
    ),
    "an agent is taken though its owner lives": SeededFault(
        "runtime.ownership:AgentOwnership._take",
        "agent.owner = owner if alive else None",
        "alive = False",
        "L5",
        3,
    ),
    # -- L6
    "start fails as a whole": SeededFault(
        "runtime.agents:AgentService._restore_for_report",
        "repairs[agent_id] = error",
        "raise",
        "L6",
        216,
    ),
    "a runtime does not live in a second event loop": SeededFault(
        "runtime.runner:Runner.begin",
        "self.timers = TimerQueue(self._state)",
        "self.timers = self.timers if hasattr(self, 'timers') else TimerQueue(self._state)",
        "L6",
        6,
    ),
    "a service that failed is not started again": SeededFault(
        "runtime.runtime:AsyncAgentSessionManager._supervise",
        "while True:",
        "for _ in range(1):",
        "L6",
        65,
    ),
    "a heartbeat per agent": SeededFault(
        "runtime.ownership:AgentOwnership.renew",
        "await state.manager.save(",
        "for agent in state.agents: await state.manager.save('system', ('beats', agent), body)\n"
        "    await state.manager.save(",
        "L6",
        11,
    ),
    "restoring a running runtime says that it crashed": SeededFault(
        "runtime.agents:AgentService.restore_all",
        "report.after_crash and not self.started",
        "report.after_crash or self.started",
        "L6",
        18,
    ),
    "wait_idle returns while nobody runs the agents": SeededFault(
        "runtime.live_agent:LiveAgent.is_idle",
        "if self.owner is not None or self.elsewhere is not None or not self._can_work():",
        "if not self.may_work():",
        "L6",
        65,
    ),
    "the agents of a dead runtime stay without one": SeededFault(
        "runtime.agents:AgentService.take_free",
        "agent.owner is None and",
        "False and",
        "L6",
        3,
    ),
    "a word that another program writes for stopped is not known": SeededFault(
        "runtime.live_agent:translate",
        "if meaning != document.status:",
        "if False:",
        "L6",
        74,
    ),
    "a change without a known outcome is not looked at again": SeededFault(
        "runtime.state:RuntimeState.commit",
        "self.doubtful.update(",
        "dict().update(",
        "L6",
        291,
    ),
    "a notice that could not be applied is dropped": SeededFault(
        "runtime.reconciler:Reconciler.notice",
        "self._state.doubtful[notice.kind, notice.key] = None",
        "pass",
        "L6",
        122,
    ),
    # -- L7
    "a step gives what it made at first, and what is stored later": SeededFault(
        "runtime.context:TaskContext._do_step",
        "result = result_type.to_json(await self._call(function, changes))",
        "raw = await self._call(function, changes)\n"
        "            result = result_type.to_json(raw)\n"
        "            result_type.from_json = lambda _: raw",
        "L7",
        4,
    ),
    "a task's result is of another type at once": SeededFault(
        "runtime.outcomes:AttemptFinisher._finish",
        "handler.result_to_json(outcome.result)",
        "outcome.result",
        "L7",
        3,
    ),
}
