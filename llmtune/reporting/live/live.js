(() => {
  const version = document.documentElement.dataset.version;
  const kept = sessionStorage.getItem("llmtune-scroll");
  if (kept !== null) {
    sessionStorage.removeItem("llmtune-scroll");
    addEventListener("load", () => setTimeout(() => scrollTo(0, Number(kept)), 100));
  }
  const searching = () => Boolean(document.getElementById("search")?.value);
  const look = async () => {
    try {
      const answer = await fetch("version", { cache: "no-store" });
      if (answer.ok && (await answer.text()) !== version && !searching()) {
        sessionStorage.setItem("llmtune-scroll", String(scrollY));
        location.reload();
        return;
      }
    } catch { /* the command has ended; the page stays as it is */ }
    setTimeout(look, 2000);
  };
  setTimeout(look, 2000);
})();
