/** A reverse proxy in front of a real server, which fails in the ways that real ones do. */

import http from "node:http";
import type { AddressInfo } from "node:net";

/**
 * What happens to a request: it is refused with a status, its answer is lost after the server has
 * carried it out, or it is passed on (also the value undefined).
 */
export type Fault =
  | { status: number; headers?: Record<string, string> }
  | "lose the answer"
  | undefined;

export class FaultyProxy {
  /** Method, path and headers of every request, in order. */
  readonly requests: { method: string; path: string; headers: http.IncomingHttpHeaders }[] = [];
  /** Decides about each request. */
  fault: (method: string, path: string) => Fault = () => undefined;
  /** Answers of its own, by path: pages and their scripts. */
  readonly pages: Record<string, { type: string; text: string }> = {};
  private readonly answers = new Map<http.ServerResponse, string>();

  private constructor(
    private readonly server: http.Server,
    readonly url: string,
  ) {}

  static async before(target: string): Promise<FaultyProxy> {
    const server = http.createServer();
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    const { port } = server.address() as AddressInfo;
    const proxy = new FaultyProxy(server, `http://127.0.0.1:${port}`);
    server.on("request", (request, response) => proxy.pass(target, request, response));
    return proxy;
  }

  private pass(target: string, request: http.IncomingMessage, response: http.ServerResponse): void {
    const method = request.method ?? "";
    const path = request.url ?? "";
    const page = this.pages[path];
    if (page) {
      response.writeHead(200, { "Content-Type": page.type }).end(page.text);
      return;
    }
    this.requests.push({ method, path, headers: request.headers });
    const fault = this.fault(method, path);
    if (typeof fault === "object") {
      response.writeHead(fault.status, fault.headers).end("<h1>an error page</h1>");
      return;
    }
    this.answers.set(response, path);
    response.on("close", () => this.answers.delete(response));
    // The page's own Host, as a proxy has to pass it on: the server compares it with the Origin.
    const { headers } = request;
    const passed = http.request(`${target}${path}`, { method, headers }, (answer) => {
      if (fault === "lose the answer") {
        answer.resume().on("end", () => response.destroy());
        return;
      }
      response.writeHead(answer.statusCode ?? 502, answer.headers);
      answer.on("data", (chunk) => response.write(chunk));
      answer.on("end", () => response.end());
      answer.on("error", () => response.destroy());
    });
    passed.on("error", () => response.destroy());
    response.on("close", () => passed.destroy());
    request.pipe(passed);
  }

  /** The number of requests of that method whose path has the text. */
  count(method: string, text: string): number {
    return this.requests.filter((one) => one.method === method && one.path.includes(text)).length;
  }

  /** The number of answers that are still open: event streams. */
  get openAnswers(): number {
    return this.answers.size;
  }

  /** The number of answers that are still open whose request's path has the text. */
  open(text: string): number {
    return [...this.answers.values()].filter((path) => path.includes(text)).length;
  }

  /** Cut every open connection. */
  cut(): void {
    for (const response of this.answers.keys()) response.destroy();
  }

  async close(): Promise<void> {
    this.cut();
    this.server.closeAllConnections();
    await new Promise((resolve) => this.server.close(resolve));
  }
}

/** Wait until a condition holds; only a hang reaches the deadline. */
export async function until(
  condition: () => boolean | Promise<boolean>,
  what = String(condition),
): Promise<void> {
  const deadline = Date.now() + 60_000;
  while (!(await condition())) {
    if (Date.now() > deadline) throw new Error(`it did not come to pass: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}
