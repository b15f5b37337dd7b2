// Light or dark as the system says, until the button is pressed.
const drawings = [];
const byId = (id) => document.getElementById(id);
(() => {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  let chosen = null;
  const apply = () => {
    root.dataset.theme = chosen ?? (system.matches ? "dark" : "light");
    for (const drawing of drawings) drawing();
  };
  system.addEventListener("change", apply);
  byId("theme").onclick = () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    apply();
  };
  apply();
  const copy = byId("copy");
  if (copy) {
    copy.onclick = async () => {
      try {
        await navigator.clipboard.writeText(byId("command").textContent);
        copy.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(byId("command"));
        copy.textContent = "selected";
      }
    };
  }
})();
