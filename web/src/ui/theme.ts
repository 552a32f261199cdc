import { useEffect, useState } from "react";
import type { Theme } from "../model/scale";
import { type ThemeChoice, useApp } from "../store";

const KEY = "moe-theme";

export function storedTheme(): ThemeChoice {
  try {
    const value = localStorage.getItem(KEY);
    return value === "dark" || value === "light" ? value : "system";
  } catch {
    return "system";
  }
}

export function setTheme(theme: ThemeChoice): void {
  useApp.setState({ theme });
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    if (theme === "system") localStorage.removeItem(KEY);
    else localStorage.setItem(KEY, theme);
  } catch {
    // Without storage the choice lasts as long as the page.
  }
}

/** The theme in effect: the choice, else the system's. */
export function useTheme(): Theme {
  const choice = useApp((state) => state.theme);
  const [isSystemLight, setSystemLight] = useState(() => matchMedia("(prefers-color-scheme: light)").matches);
  useEffect(() => {
    const query = matchMedia("(prefers-color-scheme: light)");
    const listener = () => setSystemLight(query.matches);
    query.addEventListener("change", listener);
    return () => query.removeEventListener("change", listener);
  }, []);
  if (choice !== "system") return choice;
  return isSystemLight ? "light" : "dark";
}
