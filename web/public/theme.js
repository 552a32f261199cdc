// Before the first paint: the theme that was chosen, else the system's.
try {
  const theme = localStorage.getItem("moe-theme");
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is off: the system's theme it is.
}
