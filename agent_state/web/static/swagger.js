// @ts-check
/** Swagger UI for the server's own document; nothing is asked of another server. */
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  displayRequestDuration: true,
  docExpansion: "none",
  validatorUrl: null,
});
