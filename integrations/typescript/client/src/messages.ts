/** The messages of a conversation, by their numbers: each once, and without holes. */

import type { components } from "./schema.js";

export type SessionMessage = components["schemas"]["SessionMessage"];

const number = (message: SessionMessage | undefined) => message?.seq ?? 0;

/** The number of the last message; 0 without one. */
export const lastNumber = (messages: readonly SessionMessage[]) => number(messages.at(-1));

/** The number of the first message; 0 without one. */
export const firstNumber = (messages: readonly SessionMessage[]) => number(messages[0]);

/** Both lists in the order of their numbers; of two messages of one number, the newer list's. */
export function merged(
  known: readonly SessionMessage[],
  newer: readonly SessionMessage[],
): readonly SessionMessage[] {
  if (!newer.length || !known.length) return known.length ? known : newer;
  const numbers = new Map([...known, ...newer].map((message) => [number(message), message]));
  return [...numbers.values()].sort((one, other) => number(one) - number(other));
}
