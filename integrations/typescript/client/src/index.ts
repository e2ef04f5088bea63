/** Typed calls to an agent_state server, its live changes, and a session that survives a bad network. */

export { type Client, type ClientOptions, createClient, unwrap } from "./client.js";
export { AgentStateError, type ErrorCode, type FieldError } from "./error.js";
export { follow, type LiveEvent, type Stream } from "./events.js";
export type { SessionMessage } from "./messages.js";
export {
  type Agent,
  LiveValue,
  type Loaded,
  liveAgents,
  liveTask,
  OperatorFeed,
  type Task,
} from "./operator-store.js";
export type { components, paths } from "./schema.js";
export {
  type ConversationState,
  type JsonObject,
  type OrchestratorContext,
  type PendingMessage,
  type SendOptions,
  type Session,
  type SessionOptions,
  type SessionSnapshot,
  type SessionStatus,
  SessionStore,
  type Workflow,
} from "./session-store.js";
export { followTogether } from "./tabs.js";
