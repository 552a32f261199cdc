import { createContext, useContext } from "react";
import type { App } from "./store";
import type { Generator } from "./tokens";

export interface Services {
  app: App;
  generator: Generator;
}

export const ServicesContext = createContext<Services | null>(null);

export function useServices(): Services {
  const services = useContext(ServicesContext);
  if (!services) throw new Error("ServicesContext has no provider");
  return services;
}
