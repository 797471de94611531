// Search over the pages of window.PAGES: every word must begin a word of a page; titles count most.
const box = document.getElementById("the-search"), found = document.getElementById("the-found");
function score(page, words) {
  let total = 0;
  for (const word of words) {
    const title = page[0].toLowerCase(), near = " " + page[4];
    if (title === word) total += 20;
    else if (title.includes(word)) total += 10;
    else if (near.includes(" " + word)) total += 3;
    else if (page[3].toLowerCase().includes(word)) total += 1;
    else return 0;
  }
  return total;
}
function show() {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  found.replaceChildren();
  if (!words.length) return;
  const hits = window.PAGES.map(page => [score(page, words), page]).filter(hit => hit[0]).sort((a, b) => b[0] - a[0]);
  for (const [, page] of hits.slice(0, 12)) {
    const link = document.createElement("a"), note = document.createElement("small"), item = document.createElement("li");
    link.href = box.dataset.root + page[1];
    link.textContent = page[0];
    note.textContent = page[2] + ": " + page[3].slice(0, 110);
    link.append(note);
    item.append(link);
    found.append(item);
  }
  if (!hits.length) { const item = document.createElement("li"); item.textContent = "Nothing found."; found.append(item); }
}
box.addEventListener("input", show);
box.addEventListener("keydown", event => { if (event.key === "Escape") { box.value = ""; show(); } });
document.addEventListener("keydown", event => {
  if (event.key === "/" && document.activeElement !== box) { event.preventDefault(); box.focus(); }
});
if (window.matchMedia("(max-width: 52rem)").matches) document.querySelector("nav details").open = false;
