import { fileURLToPath } from "node:url";
import { defineConfig } from "vitest/config";

const here = (path: string) => fileURLToPath(new URL(path, import.meta.url));

/** The packages' sources, so that the tests need no build. */
const sources = {
  "@agent-state/client": here("client/src/index.ts"),
  "@agent-state/react": here("react/src/index.ts"),
};

/** A React package by its file, so that React 18 and 19 can be tested beside each other. */
function react(folder: string) {
  const from = (path: string) => here(`${folder}/node_modules/${path}`);
  return [
    { find: /^react$/, replacement: from("react/index.js") },
    { find: /^react\/jsx-runtime$/, replacement: from("react/jsx-runtime.js") },
    { find: /^react\/jsx-dev-runtime$/, replacement: from("react/jsx-dev-runtime.js") },
    { find: /^react-dom\/client$/, replacement: from("react-dom/client.js") },
    { find: /^react-dom\/server$/, replacement: from("react-dom/server.js") },
    ...Object.entries(sources).map(([find, replacement]) => ({ find, replacement })),
  ];
}

// Only a hang reaches the timeouts: a busy machine makes each test slower.
const shared = { testTimeout: 600_000, hookTimeout: 600_000 };

export default defineConfig({
  test: {
    maxWorkers: 2,
    projects: [
      {
        resolve: { alias: sources },
        test: {
          ...shared,
          name: "client",
          include: ["client/test/*.test.ts", "test/schema.test.ts"],
        },
      },
      { test: { ...shared, name: "packages", include: ["test/packages.test.ts"] } },
      { test: { ...shared, name: "browser", include: ["test/browser.test.ts"] } },
      {
        resolve: { alias: react(".") },
        test: { ...shared, name: "react 19", include: ["react/test/*.test.tsx"] },
      },
      {
        resolve: { alias: react("react18") },
        test: { ...shared, name: "react 18", include: ["react/test/*.test.tsx"] },
      },
    ],
  },
});
