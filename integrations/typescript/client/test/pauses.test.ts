/** Pauses between attempts, and streams on which nothing comes any more. */

import { AgentStateError, follow, type LiveEvent } from "@agent-state/client";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { delayAfter, pause } from "../src/pause.js";

beforeEach(() => {
  vi.useFakeTimers();
});

afterEach(() => {
  vi.useRealTimers();
  vi.unstubAllGlobals();
});

test("each pause is at most twice as long as the one before, and 15 seconds at most", () => {
  const longest = [250, 500, 1000, 2000, 4000, 8000, 15_000, 15_000];

  for (const [failures, most] of longest.entries()) {
    const delays = Array.from({ length: 100 }, () => delayAfter(failures));
    expect(Math.max(...delays)).toBeLessThanOrEqual(most);
    expect(Math.min(...delays)).toBeGreaterThanOrEqual(most / 2);
    expect(new Set(delays).size).toBeGreaterThan(1); // clients do not come back all at once
  }
});

test("the server's word goes before", () => {
  const error = new AgentStateError("overloaded" as never, "later", {
    status: 503,
    retryAfter: 90,
  });

  expect(delayAfter(0, error)).toBe(90_000);
});

test("a pause ends when the browser is online again", async () => {
  const page = new EventTarget();
  vi.stubGlobal("addEventListener", page.addEventListener.bind(page));
  vi.stubGlobal("removeEventListener", page.removeEventListener.bind(page));
  const paused = pause(3_600_000, new AbortController().signal);

  page.dispatchEvent(new Event("online"));

  await paused;
  expect(vi.getTimerCount()).toBe(0);
});

/** A stream that sends `texts`, and then nothing; and how often it was opened. */
function quiet(...texts: string[]) {
  const events: LiveEvent[] = [];
  const opened: (string | undefined)[] = [];
  const open = async (last: string | undefined, signal: AbortSignal) => {
    opened.push(last);
    return new ReadableStream<Uint8Array>({
      start(controller) {
        for (const text of texts) controller.enqueue(new TextEncoder().encode(text));
        signal.addEventListener("abort", () => controller.error(signal.reason));
      },
    });
  };
  return { open, opened, events, onEvent: (event: LiveEvent) => void events.push(event) };
}

test("a stream on which nothing comes any more is opened again where it was", async () => {
  const stream = quiet('event: change\nid: s-7\ndata: {"kind":"agents"}\n\n');
  const end = new AbortController();
  const followed = follow(stream, end.signal);

  await vi.advanceTimersByTimeAsync(39_000);
  expect(stream.opened).toEqual([undefined]);
  await vi.advanceTimersByTimeAsync(2_000);
  expect(stream.opened).toEqual([undefined, "s-7"]);

  end.abort();
  await followed;
  expect(vi.getTimerCount()).toBe(0);
});

test("a stream that is alive stays open", async () => {
  const end = new AbortController();
  let opened = 0;
  const followed = follow(
    {
      open: async (_, signal) => {
        opened += 1;
        return new ReadableStream<Uint8Array>({
          start(controller) {
            const timer = setInterval(() => controller.enqueue(Uint8Array.of(58, 10, 10)), 15_000);
            signal.addEventListener("abort", () => {
              clearInterval(timer);
              controller.error(signal.reason);
            });
          },
        });
      },
      onEvent: () => expect.unreachable(),
    },
    end.signal,
  );

  await vi.advanceTimersByTimeAsync(600_000);
  expect(opened).toBe(1);

  end.abort();
  await followed;
});
