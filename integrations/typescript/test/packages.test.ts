/** The packages as their users have them: packed, installed, imported, compiled and bundled. */

import { execFile } from "node:child_process";
import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { gzipSync } from "node:zlib";
import { build } from "vite";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { OPERATOR, Server } from "./server.js";

const HERE = fileURLToPath(new URL("..", import.meta.url));
const PACKAGES = ["client", "react"] as const;

/** Run a program; its output. Fails with all that it said. */
async function run(folder: string, program: string, ...args: string[]): Promise<string> {
  try {
    return (await promisify(execFile)(program, args, { cwd: folder })).stdout;
  } catch (error) {
    const { stdout, stderr } = error as { stdout: string; stderr: string };
    throw new Error(`${program} ${args.join(" ")}: ${stdout}${stderr}`, { cause: error });
  }
}

let temporary: string;

beforeAll(async () => {
  temporary = await mkdtemp(join(tmpdir(), "agent-state-packages-"));
  await run(HERE, "npm", "run", "pack");
});

afterAll(() => rm(temporary, { recursive: true, force: true }));

const manifest = async (folder: string) =>
  JSON.parse(await readFile(join(folder, "package.json"), "utf8"));

/** The installed packages in an application with that version of React. */
async function application(react: number): Promise<string> {
  const folder = join(temporary, `react${react}`);
  await mkdir(folder);
  const tarballs = PACKAGES.map((name) => [
    `@agent-state/${name}`,
    `file:${join(HERE, "packed", `agent-state-${name}-0.2.0.tgz`)}`,
  ]);
  const dependencies = {
    ...Object.fromEntries(tarballs),
    react: `^${react}`,
    "react-dom": `^${react}`,
  };
  const devDependencies = { "@types/react": `^${react}`, "@types/node": "^20" };
  const text = JSON.stringify({ name: "app", type: "module", dependencies, devDependencies });
  await writeFile(join(folder, "package.json"), text);
  await run(folder, "npm", "install", "--no-audit", "--no-fund", "--prefer-offline");
  return folder;
}

/** The blocks of TypeScript in a package's page. */
async function examples(name: string): Promise<{ type: string; text: string }[]> {
  const page = await readFile(join(HERE, name, "README.md"), "utf8");
  return [...page.matchAll(/^```(tsx?)\n(.*?)^```/gms)].map(([, type = "", text = ""]) => ({
    type,
    text,
  }));
}

describe.each([18, 19])("with React %i", (react) => {
  let app: string;

  beforeAll(async () => {
    app = await application(react);
  });

  test("the types are right, and the examples of the pages compile", async () => {
    let count = 0;
    for (const name of PACKAGES) {
      for (const { type, text } of await examples(name)) {
        await writeFile(join(app, `${name}-${++count}.${type}`), text);
      }
    }
    const settings = [
      "--strict",
      "--noEmit",
      "--target",
      "es2022",
      "--jsx",
      "react-jsx",
      "--skipLibCheck",
    ];
    const libraries = ["--lib", "es2023,dom,dom.iterable"];
    const files = (await readdir(app)).filter((file) => /\.tsx?$/.test(file));

    expect(files).toHaveLength(count);
    expect(count).toBeGreaterThan(4);
    // One way of finding modules with each version: bundlers' and Node.js's.
    const module = react === 18 ? ["esnext", "bundler"] : ["nodenext", "nodenext"];
    await run(
      HERE,
      join(HERE, "node_modules/.bin/tsc"),
      ...settings,
      ...libraries,
      ...["--module", module[0] as string, "--moduleResolution", module[1] as string],
      ...files.map((file) => join(app, file)),
    );
  });

  test("Node.js imports them, and talks to a server", async () => {
    const server = await Server.start();
    try {
      const program = `
        import { createClient, unwrap } from "@agent-state/client";
        import { GlobalSessionProvider, useSession } from "@agent-state/react";
        import { createElement } from "react";
        import { renderToString } from "react-dom/server";
        const Status = () => useSession().sessionStatus;
        const page = createElement(GlobalSessionProvider, { token: null }, createElement(Status));
        const client = createClient({ baseUrl: ${JSON.stringify(server.url)}, token: "${OPERATOR}" });
        const { items } = await unwrap(client.GET("/api/agents"));
        console.log(renderToString(page), items.length);
      `;
      await server.call("POST", "/api/agents", { agent_id: "ada", agent_type: "poet" });

      const told = await run(app, "node", "--input-type=module", "--eval", program);

      expect(told.trim()).toBe("no_session 1");
    } finally {
      await server.remove();
    }
  });

  /** A page's script, bundled and minified without React. */
  async function bundled(program: string, without = /^react($|\/)/): Promise<string> {
    const entry = join(app, "entry.js");
    await writeFile(entry, program);
    const result = await build({
      root: app,
      logLevel: "silent",
      configFile: false,
      build: {
        write: false,
        target: "es2022",
        modulePreload: false,
        rolldownOptions: {
          input: entry,
          external: [without],
          preserveEntrySignatures: "strict",
        },
      },
    });
    if (Array.isArray(result) || !("output" in result)) throw new Error("one bundle is expected");
    return result.output[0].code;
  }

  const size = (text: string) => gzipSync(text, { level: 9 }).length;

  test("the script of a page is small", async () => {
    const all = 'export * from "@agent-state/react";';
    const page = await bundled(all);
    const hooks = size(await bundled(all, /^(react($|\/)|@agent-state\/client)/));
    console.info(`gzipped, without React: ${size(page)} bytes; the hooks alone: ${hooks}`);

    expect(hooks).toBeLessThan(1500);
    expect(size(page)).toBeLessThan(6000);
    expect(page).not.toContain("querySerializer"); // openapi-fetch is for who calls more
  });

  test("what a page does not use is left out", async () => {
    const error = await bundled('export { AgentStateError } from "@agent-state/client";');
    const calls = await bundled('export { createClient } from "@agent-state/client";');

    expect(size(error)).toBeLessThan(1000);
    expect(calls).not.toContain("BroadcastChannel");
  });
});

test.each(PACKAGES)("%s has what its users need, and nothing else", async (name) => {
  const tarball = join(HERE, "packed", `agent-state-${name}-0.2.0.tgz`);
  const files = (await run(HERE, "tar", "tzf", tarball)).trim().split("\n").sort();
  const modules = (await readdir(join(HERE, name, "src"))).map((file) => file.split(".")[0]);
  const built = modules.flatMap((module) =>
    [".js", ".js.map", ".d.ts", ".d.ts.map"].map((end) => `package/dist/${module}${end}`),
  );
  const sources = (await readdir(join(HERE, name, "src"))).map((file) => `package/src/${file}`);
  const others = ["LICENSE", "README.md", "package.json"].map((file) => `package/${file}`);

  expect(files).toEqual([...built, ...sources, ...others].sort());
  for (const file of files.filter((file) => file.endsWith(".map"))) {
    const map = JSON.parse(await run(HERE, "tar", "xzOf", tarball, file));
    expect(files).toContain(join("package/dist", map.sources[0]));
  }
});

test("they need each other, openapi-fetch and React, and nothing else", async () => {
  const [client, react] = await Promise.all(PACKAGES.map((name) => manifest(join(HERE, name))));

  expect(Object.keys(client.dependencies)).toEqual(["openapi-fetch"]);
  expect(client.peerDependencies).toBeUndefined();
  expect(react.dependencies).toEqual({ "@agent-state/client": client.version });
  expect(react.peerDependencies).toEqual({ react: "^18.0.0 || ^19.0.0" });
});
