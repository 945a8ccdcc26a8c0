// The filters above the cards. They live in the address, as in report.html#kind=look&right=no, so
// that what is seen can be passed on.
const cards = [...document.querySelectorAll(".card")];
const form = document.querySelector(".filters");
const filters = [...form.querySelectorAll("select")];
const names = {yes: "right", no: "wrong", none: "no retrieval"};

function values(card, name) {
  return name === "base" ? card.dataset.base.split(" ") : [card.dataset[name]];
}

function show() {
  const chosen = filters.filter(f => f.value);
  for (const card of cards) {
    card.hidden = !chosen.every(f => values(card, f.name).includes(f.value));
  }
  const shown = cards.filter(card => !card.hidden).length;
  form.querySelector("output").textContent = `${shown} of ${cards.length} shown`;
}

function fromAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  for (const f of filters) {
    f.value = wanted.get(f.name) ?? "";
    if (f.selectedIndex < 0) f.value = "";
  }
  show();
  if (filters.some(f => f.value)) form.scrollIntoView();
}

function toAddress() {
  const chosen = filters.filter(f => f.value).map(f => [f.name, f.value]);
  history.replaceState(null, "", "#" + new URLSearchParams(chosen));
  show();
}

for (const f of filters) {
  const counts = new Map();
  for (const value of cards.flatMap(card => values(card, f.name))) {
    if (value) counts.set(value, (counts.get(value) ?? 0) + 1);
  }
  for (const value of [...counts.keys()].sort()) {
    f.add(new Option(`${names[value] ?? value} (${counts.get(value)})`, value));
  }
}
form.addEventListener("change", toAddress);
form.addEventListener("reset", () => setTimeout(toAddress));
addEventListener("hashchange", () => { if (/=|^$/.test(location.hash)) fromAddress(); });
fromAddress();
