/** React hooks for the sessions of an agent_state server. */

export type {
  Agent,
  ConversationState,
  OrchestratorContext,
  PendingMessage,
  SendOptions,
  Session,
  SessionMessage,
  SessionSnapshot,
  SessionStatus,
  Task,
  Workflow,
} from "@agent-state/client";
export { AgentStateError } from "@agent-state/client";
export {
  type UseConversation,
  type UseOrchestrator,
  type UseSession,
  useAgents,
  useConversation,
  useGlobalSession,
  useOrchestrator,
  useSession,
  useTask,
} from "./hooks.js";
export { GlobalSessionProvider, type GlobalSessionProviderProps } from "./provider.js";
