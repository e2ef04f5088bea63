// @ts-check
/** Who may see the dashboard, and the way out. */
import { request } from "../api.js";
import { ActionButton, Heading, Loaded, html, useData } from "../ui.js";

export function Access() {
  /** @type {import("../ui.js").Found<Api["LoginState"]>} */
  const found = useData("api/login");
  const leave = async () => {
    await request("DELETE", "api/login");
    location.replace("./"); // the stream of changes ends, too
  };
  const isLoggedIn = Boolean(found.data?.csrf_token);
  return html`<${Heading} title="Access">${isLoggedIn && html`<${ActionButton} label="Log out" done="Logged out." work=${leave} />`}<//>
    <${Loaded} found=${found}><p>${
      isLoggedIn
        ? "You are logged in as an operator, by a cookie that no script can read. It ends with the browser's session."
        : "This server asks for no token: everybody who reaches it is an operator."
    }</p><//>`;
}
