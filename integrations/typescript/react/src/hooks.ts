/** The hooks: each returns what it is about, and is rendered again only when that changes. */

import {
  type Agent,
  type AgentStateError,
  type ConversationState,
  LiveValue,
  liveAgents,
  liveTask,
  type PendingMessage,
  type SendOptions,
  type SessionMessage,
  type SessionSnapshot,
  type SessionStore,
  type Task,
  type Workflow,
} from "@agent-state/client";
import { useCallback, useMemo, useSyncExternalStore } from "react";
import { useStores } from "./provider.js";

/** The session, and what a page can do with it. */
export type UseSession = SessionSnapshot &
  Pick<
    SessionStore,
    | "isSessionValid"
    | "getSessionAge"
    | "initializeSession"
    | "refreshSession"
    | "clearSession"
    | "updateSessionState"
    | "updateLastActivity"
    | "sendMessage"
  >;

function useSnapshot(store: SessionStore): SessionSnapshot {
  return useSyncExternalStore(store.subscribe, store.getSnapshot, store.getSnapshot);
}

/** The session of the provider. Throws outside of a provider. */
export function useSession(): UseSession {
  const { session: store } = useStores("useSession");
  const snapshot = useSnapshot(store);
  return useMemo(
    () => ({
      ...snapshot,
      isSessionValid: store.isSessionValid,
      getSessionAge: store.getSessionAge,
      initializeSession: store.initializeSession,
      refreshSession: store.refreshSession,
      clearSession: store.clearSession,
      updateSessionState: store.updateSessionState,
      updateLastActivity: store.updateLastActivity,
      sendMessage: store.sendMessage,
    }),
    [snapshot, store],
  );
}

/** The same as `useSession`. */
export const useGlobalSession = useSession;

const NO_MESSAGES: readonly SessionMessage[] = [];

export interface UseConversation {
  /** The messages that were loaded, oldest first, each once. */
  readonly messages: readonly SessionMessage[];
  /** Own messages that the server has not confirmed yet; show them below the others. */
  readonly pending: readonly PendingMessage[];
  /** The conversation; null before it has begun. */
  readonly conversation: ConversationState | null;
  /** There are messages before the first one here. */
  readonly hasEarlier: boolean;
  /** Load earlier messages; returns whether there are still earlier ones. */
  readonly loadEarlier: (limit?: number) => Promise<boolean>;
  readonly send: (content: unknown, options?: SendOptions) => Promise<SessionMessage>;
}

/** The conversation with one agent. */
export function useConversation(agent: string): UseConversation {
  const { session: store } = useStores("useConversation");
  const read = () => store.getSnapshot().conversations[agent] ?? null;
  const conversation = useSyncExternalStore(store.subscribe, read, read);
  const readPending = () => store.getSnapshot().pending;
  const all = useSyncExternalStore(store.subscribe, readPending, readPending);
  const send = useCallback(
    (content: unknown, options?: SendOptions) => store.sendMessage(agent, content, options),
    [store, agent],
  );
  const loadEarlier = useCallback(
    (limit?: number) => store.loadEarlier(agent, limit),
    [store, agent],
  );
  return useMemo(() => {
    const messages = conversation?.messages ?? NO_MESSAGES;
    return {
      messages,
      pending: all.filter((one) => one.agent === agent),
      conversation,
      hasEarlier: messages.length ? (messages[0]?.seq ?? 1) > 1 : !!conversation?.message_count,
      loadEarlier,
      send,
    };
  }, [agent, conversation, all, loadEarlier, send]);
}

export interface UseOrchestrator {
  /** The status of the workflow that was reported last; `not_started` without a workflow. */
  readonly status: string;
  /** Its workflows: those that go on, then those that finished lately. */
  readonly workflows: readonly Workflow[];
}

/** The workflows of one orchestrator in the session. */
export function useOrchestrator(name: string): UseOrchestrator {
  const { session: store } = useStores("useOrchestrator");
  const { orchestratorContext: context, orchestratorStates } = useSnapshot(store);
  const status = orchestratorStates[name] ?? "not_started";
  return useMemo(() => {
    const all = context ? [...context.active_orchestrators, ...context.finished_orchestrators] : [];
    return { status, workflows: all.filter((one) => one.orchestrator_name === name) };
  }, [name, context, status]);
}

interface Operated {
  readonly error: AgentStateError | null;
  readonly isLoading: boolean;
  readonly refresh: () => Promise<void>;
}

/** What `make` returns for the present token; nothing is loaded without one. */
function useLive<T>(
  { session }: { session: SessionStore },
  make: () => LiveValue<T>,
): Operated & { data: T | null } {
  const visit = useSyncExternalStore(session.subscribe, session.getVisit, () => undefined);
  const value = useMemo(() => (visit ? make() : new LiveValue<T>()), [visit, make]);
  const loaded = useSyncExternalStore(value.subscribe, value.getSnapshot, value.getSnapshot);
  return useMemo(() => ({ ...loaded, refresh: value.refresh }), [loaded, value]);
}

const NO_AGENTS: readonly Agent[] = [];

/** All agents, by id. Needs the token of an operator; otherwise `error` has the status 403. */
export function useAgents(): Operated & { agents: readonly Agent[] } {
  const stores = useStores("useAgents");
  const make = useCallback(() => liveAgents(stores.session.client, stores.feed), [stores]);
  const { data, ...rest } = useLive(stores, make);
  return { ...rest, agents: data ?? NO_AGENTS };
}

/** One task, with its steps and its result; null before it is loaded. Needs an operator's token. */
export function useTask(id: string): Operated & { task: Task | null } {
  const stores = useStores("useTask");
  const make = useCallback(() => liveTask(stores.session.client, id, stores.feed), [stores, id]);
  const { data, ...rest } = useLive(stores, make);
  return { ...rest, task: data };
}
