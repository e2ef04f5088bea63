/** The schemas of the API by their names, for the scripts of the dashboard. */

type Api = import("../client/src/schema.js").components["schemas"];

/** What swagger-ui-bundle.js defines. */
declare function SwaggerUIBundle(settings: Record<string, unknown>): unknown;
