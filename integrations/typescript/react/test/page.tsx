/** A page in a browser's document, with React as users run it: no test renderer, and no `act`. */

import { JSDOM } from "jsdom";
import { type ReactNode, StrictMode } from "react";
import { createRoot, type Root } from "react-dom/client";
import { afterEach, beforeEach, expect, vi } from "vitest";

const open: Page[] = [];

beforeEach(() => {
  const { window } = new JSDOM("<!doctype html><body></body>", { url: "http://localhost/" });
  // They stay after the test: React unmounts a page a little later.
  Object.assign(globalThis, { window, document: window.document });
  vi.spyOn(console, "error");
});

afterEach(() => {
  for (const page of open.splice(0)) page.close();
  // React warns by console.error; a warning is an error.
  expect(vi.mocked(console.error).mock.calls).toEqual([]);
  vi.restoreAllMocks();
});

export class Page {
  private readonly root: Root;
  readonly body = document.createElement("div");

  constructor(private readonly isStrict = false) {
    document.body.append(this.body);
    this.root = createRoot(this.body);
    open.push(this);
  }

  /** What the page shows, in development mode with each effect run twice if it is strict. */
  show(children: ReactNode): this {
    this.root.render(this.isStrict ? <StrictMode>{children}</StrictMode> : children);
    return this;
  }

  get text(): string {
    return this.body.textContent ?? "";
  }

  close(): void {
    this.root.unmount();
  }
}

/** What a hook returned last, and each time. */
export interface Seen<T> {
  value: T;
  all: T[];
}

/** A component that reads a hook, and where to see what it returned. */
export function reading<T>(hook: () => T): [seen: Seen<T>, Reader: () => ReactNode] {
  const seen: Seen<T> = { value: undefined as T, all: [] };
  const Reader = () => {
    seen.value = hook();
    seen.all.push(seen.value);
    return null;
  };
  return [seen, Reader];
}
