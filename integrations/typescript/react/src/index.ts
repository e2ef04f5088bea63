/** React hooks for the sessions of an agent_state server. */

export { AgentStateError } from "@agent-state/client";
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
export {
  useAgents,
  useConversation,
  type UseConversation,
  useGlobalSession,
  useOrchestrator,
  type UseOrchestrator,
  useSession,
  type UseSession,
  useTask,
} from "./hooks.js";
export { GlobalSessionProvider, type GlobalSessionProviderProps } from "./provider.js";
