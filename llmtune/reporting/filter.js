(() => {
  const search = document.getElementById("search");
  if (!search) return;
  const rows = [...document.querySelectorAll(".case")];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const rest = document.querySelector(".examples > details");
  const update = (event) => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    if (event && rest) rest.open = true;
    rows.forEach((row, index) => { row.hidden = !words.every((word) => texts[index].includes(word)); });
    const shown = rows.filter((row) => getComputedStyle(row).display !== "none").length;
    document.getElementById("found").textContent =
      shown === rows.length ? "" : shown ? `${shown} of ${rows.length} rows` : "No row matches.";
  };
  search.hidden = false;
  search.parentElement.addEventListener("input", update);
  update();
})();
