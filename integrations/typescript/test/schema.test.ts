import openapiTS, { astToString } from "openapi-typescript";
import { expect, test } from "vitest";
import { Server } from "./server.js";

// `npm run types` writes the file anew.
test("the types are those of the server's own openapi.json", async () => {
  const server = await Server.start();
  try {
    const document = await (await fetch(`${server.url}/openapi.json`)).json();
    const types = astToString(
      await openapiTS(document, { alphabetize: true, defaultNonNullable: false }),
    );

    const heading = "// Written by `npm run types` from the server's openapi.json.\n\n";
    await expect(heading + types).toMatchFileSnapshot("../client/src/schema.ts");
  } finally {
    await server.remove();
  }
});
