/** The messages of a conversation, by their numbers: each once, and without holes. */

import type { components } from "./schema.js";

export type SessionMessage = components["schemas"]["SessionMessage"];

const number = (message: SessionMessage | undefined) => message?.seq ?? 0;

/** The number of the last message; 0 without one. */
export const lastNumber = (messages: readonly SessionMessage[]) => number(messages.at(-1));

/** The number of the first message; 0 without one. */
export const firstNumber = (messages: readonly SessionMessage[]) => number(messages[0]);

/**
 * Both lists in the order of their numbers; of two messages of one number, the newer list's. It is
 * `known` itself if it says the same.
 */
export function merged(
  known: readonly SessionMessage[],
  newer: readonly SessionMessage[],
): readonly SessionMessage[] {
  const numbers = new Map(known.map((message) => [number(message), message]));
  const changed = newer.filter((message) => !isSame(numbers.get(number(message)), message));
  if (!changed.length) return known;
  for (const message of changed) numbers.set(number(message), message);
  return [...numbers.values()].sort((one, other) => number(one) - number(other));
}

/** Whether both are the same JSON. */
export const isSame = (one: unknown, other: unknown): boolean =>
  JSON.stringify(one) === JSON.stringify(other);

/** `before` if `now` says the same, so that what shows it need not be rendered again. */
export const kept = <T>(before: T, now: T): T => (isSame(before, now) ? before : now);
