/** The provider: one session for all components below it. */

import { OperatorFeed, type SessionOptions, SessionStore } from "@agent-state/client";
import { createContext, type ReactNode, useContext, useEffect, useState } from "react";

export interface GlobalSessionProviderProps extends SessionOptions {
  children?: ReactNode;
}

interface Stores {
  readonly session: SessionStore;
  /** The changes of agents and tasks; undefined without live changes. */
  readonly feed: OperatorFeed | undefined;
}

const StoresContext = createContext<Stores | null>(null);

/**
 * Loads the session of a token, follows it, and gives it to `useSession` below.
 *
 * The token is kept in memory only. Another `token`, or another `live`, takes effect at once;
 * `baseUrl`, `fetch`, `getToken` and `messages` are read when the provider is mounted.
 */
export function GlobalSessionProvider({
  children,
  token,
  live = true,
  ...options
}: GlobalSessionProviderProps) {
  const [stores] = useState<Stores>(() => {
    const session = new SessionStore({ ...options, token, live });
    const name = `agent-state ${options.baseUrl ?? ""} agents and tasks`;
    return { session, feed: live ? new OperatorFeed(session.client, name) : undefined };
  });
  useEffect(() => {
    stores.session.start({ token, live });
    return () => stores.session.stop();
  }, [stores, token, live]);
  return <StoresContext.Provider value={stores}>{children}</StoresContext.Provider>;
}

/** The stores of the provider above; throws without one. */
export function useStores(hook: string): Stores {
  const stores = useContext(StoresContext);
  if (!stores) throw new Error(`${hook} is used outside of <GlobalSessionProvider>`);
  return stores;
}
