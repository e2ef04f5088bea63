/** A real agent-state server for a test, in a process of its own and on files of its own. */

import { type ChildProcess, spawn } from "node:child_process";
import { mkdir, mkdtemp, rm, writeFile } from "node:fs/promises";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import type { paths } from "@agent-state/client";

const ROOT = fileURLToPath(new URL("../../..", import.meta.url));
const PYTHON = process.env.AGENT_STATE_PYTHON ?? join(ROOT, ".venv/bin/python");

export const OPERATOR = "operators-only-0123456789";

type Created =
  paths["/api/global/session"]["post"]["responses"][201]["content"]["application/json"];

/** A server that can be killed, and started again at the same address. */
export class Server {
  private process: ChildProcess | undefined;

  private constructor(
    readonly folder: string,
    readonly port: number,
    private readonly options: string[],
  ) {}

  /** Start one; `options` are further options of `agent-state serve`. */
  static async start(...options: string[]): Promise<Server> {
    const folder = await mkdtemp(join(tmpdir(), "agent-state-ts-"));
    await writeFile(join(folder, "tokens"), `${OPERATOR}\n`, { mode: 0o600 });
    const server = new Server(folder, await freePort(), options);
    await server.start();
    return server;
  }

  get url(): string {
    return `http://127.0.0.1:${this.port}`;
  }

  /** Start the process, and wait until it listens. */
  async start(): Promise<void> {
    const { folder, port, options } = this;
    await mkdir(join(folder, "state"), { recursive: true });
    const args = ["-m", "agent_state", "serve", join(folder, "state"), "--port", `${port}`];
    args.push("--token-file", join(folder, "tokens"), ...options);
    const child = spawn(PYTHON, args, { cwd: ROOT, stdio: ["ignore", "pipe", "pipe"] });
    this.process = child;
    let told = "";
    await new Promise<void>((resolve, reject) => {
      child.stderr?.on("data", (chunk) => {
        told += chunk;
      });
      child.stdout?.on("data", (chunk) => {
        told += chunk;
        if (told.includes("http://")) resolve();
      });
      child.on("error", reject);
      child.on("exit", (code) => reject(new Error(`the server ended with ${code}: ${told}`)));
    });
  }

  /** End the process at once, as a crash does. */
  async kill(): Promise<void> {
    const child = this.process;
    if (child === undefined || child.exitCode !== null || child.signalCode !== null) return;
    const ended = new Promise((resolve) => child.once("exit", resolve));
    child.kill("SIGKILL");
    await ended;
  }

  /** End the process, and remove its files. */
  async remove(): Promise<void> {
    await this.kill();
    await rm(this.folder, { recursive: true, force: true });
  }

  /** Call an operation as an operator. Fails on an error. */
  async call<T = unknown>(method: string, path: string, body?: unknown): Promise<T> {
    const response = await fetch(`${this.url}${path}`, {
      method,
      headers: { Authorization: `Bearer ${OPERATOR}`, "Content-Type": "application/json" },
      body: body === undefined ? null : JSON.stringify(body),
    });
    const text = await response.text();
    if (!response.ok) throw new Error(`${method} ${path}: ${response.status} ${text}`);
    return (text ? JSON.parse(text) : undefined) as T;
  }

  /** A new session, and its token. */
  async session(user?: string): Promise<{ id: string; token: string }> {
    const created = await this.call<Created>(
      "POST",
      "/api/global/session",
      user ? { user_id: user } : {},
    );
    return { id: created.session_id, token: created.session_token as string };
  }

  /** Let an agent say something in a session. */
  async say(session: string, agent: string, content: string): Promise<void> {
    await this.call("POST", `/api/global/session/${session}/conversations/${agent}/messages`, {
      role: "assistant",
      content,
    });
  }

  /** The contents of a conversation, as they are stored. */
  async said(session: string, agent: string): Promise<unknown[]> {
    const path = `/api/global/session/${session}/conversations/${agent}/messages?limit=1000`;
    const page = await this.call<{ messages: { content: unknown }[] }>("GET", path);
    return page.messages.map((message) => message.content);
  }
}

async function freePort(): Promise<number> {
  const listening = createServer();
  await new Promise<void>((resolve) => listening.listen(0, "127.0.0.1", resolve));
  const address = listening.address();
  await new Promise((resolve) => listening.close(resolve));
  if (address === null || typeof address === "string") throw new Error("no port");
  return address.port;
}
