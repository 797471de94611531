"use strict";
// The page of /inside: everything comes from this server, and model text becomes text nodes only.
const at = (id) => document.getElementById(id);
const state = { text: null, view: null, token: 0, matrix: null, size: 0, lens: null, routing: null, cycles: [] };

async function ask(path, body) {
  const headers = at("key").value ? { Authorization: `Bearer ${at("key").value}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { headers, method: body ? "POST" : "GET", body: body && JSON.stringify(body) });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  return answer;
}

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// A cell of several short texts, which go to the next line one by one.
function listCell(texts) {
  const cell = element("td", "", { class: "wrap" });
  cell.append(...texts.map((text) => element("span", text)));
  return cell;
}

function fillTable(table, head, rows) {
  table.replaceChildren();
  const line = table.createTHead().insertRow();
  for (const cell of head) line.append(element("th", cell, { scope: "col" }));
  const body = table.createTBody();
  for (const { cells, drawn } of rows) {
    const row = body.insertRow();
    if (drawn) row.className = "drawn";
    for (const cell of cells) row.append(Array.isArray(cell) ? listCell(cell) : element("td", cell));
  }
}

function fillSelect(select, options) {
  const before = select.value;
  select.replaceChildren(...options.map(([value, text]) => element("option", text, { value })));
  if (options.some(([value]) => String(value) === before)) select.value = before;
}

// Spaces and line ends of a token, so that they can be seen.
const spell = (text) => text.replaceAll("\n", "\u21b5").replaceAll(" ", "\u00b7") || "\u2205";
const share = (p) => (p >= 0.0005 || p === 0 ? `${(100 * p).toFixed(1)} %` : "< 0.1 %");

async function guard(work) {
  try {
    at("status").textContent = "\u2026";
    await work();
    at("status").textContent = "";
  } catch (error) {
    at("status").textContent = error.message;
  }
}

async function listModels() {
  const { data } = await (await ask("/v1/models")).json();
  fillSelect(at("model"), data.map((one) => [one.id, one.id]));
}

async function listTexts() {
  const { texts } = await (await ask("/inside/texts")).json();
  fillSelect(at("texts"), texts.map((one) => [`${one.id}/${one.choice}`, `${one.model}, ${one.tokens} tokens, ${one.id.slice(-6)}`]));
  return texts;
}

async function write() {
  const body = { model: at("model").value, max_tokens: Number(at("max").value), temperature: Number(at("temperature").value) };
  for (const name of ["top_k", "top_p", "min_p"]) if (at(name).value) body[name] = Number(at(name).value);
  const chat = at("chat").checked;
  const path = chat ? "/v1/chat/completions" : "/v1/completions";
  if (chat) body.messages = [{ role: "user", content: at("prompt").value }];
  else body.prompt = at("prompt").value;
  const { id } = await (await ask(path, body)).json();
  await listTexts();
  at("texts").value = `${id}/0`;
  await showText();
}

async function showText() {
  state.text = `/inside/texts/${at("texts").value}`;
  [state.view, state.lens, state.routing] = await Promise.all(
    ["?top=8", "/lens?top=4", "/routing"].map(async (path) => (await ask(state.text + path)).json()));
  const { view } = state;
  state.cycles = view.has_draft ? (await (await ask(`${state.text}/drafts`)).json()).cycles : [];
  at("drafts").hidden = !view.has_draft;
  fillSelect(at("layer"), view.heads.map((count, layer) => [layer, count]).filter(([, count]) => count).map(([layer]) => [layer, layer]));
  at("experts").hidden = !state.routing.layers.length;
  at("tokens").replaceChildren(...view.tokens.map(tokenButton));
  markAccepted();
  at("before").textContent = view.prompt.join("");
  at("views").hidden = false;
  await showAttention();
  choose(0);
}

function tokenButton(token, place) {
  const button = element("button", spell(token.text), { type: "button", role: "option", "data-place": place });
  button.append(element("small", token.surprise.toFixed(1)));
  button.style.background = `rgba(var(--mark), calc(var(--shade) * ${Math.min(token.surprise / 12, 1)}))`;
  button.addEventListener("click", () => choose(place));
  return button;
}

// Underlines the tokens that the draft had proposed, and counts.
function markAccepted() {
  const proposals = state.cycles.flatMap((cycle) => cycle.proposals.map((one, number) => ({ ...one, place: cycle.place + number })));
  const accepted = proposals.filter((one) => one.is_accepted), { length } = state.view.tokens;
  for (const { place } of accepted) at("tokens").children[place].className = "accepted";
  at("drafted").textContent = `${accepted.length} of ${proposals.length} proposals are accepted; ` +
    `${length} tokens in ${state.cycles.length} passes of the model`;
}

// The cycle that a token belongs to: its proposals, with the probability of each under draft and model.
function showProposals(place) {
  const cycle = state.cycles.find((one) => place < one.place + one.num_taken);
  const judged = (p) => (p === null ? "not judged" : share(p));
  fillTable(at("proposals"), ["for token", "proposed", "draft", "model", "chance", "accepted"], (cycle ? cycle.proposals : []).map((one, number) => (
    { cells: [cycle.place + number, spell(one.text), share(one.q), judged(one.p), judged(one.chance), one.is_accepted ? "yes" : "no"],
      drawn: one.is_accepted })));
}

function choose(place) {
  const { view, lens, routing } = state;
  if (!view || !view.tokens.length) return;
  state.token = Math.max(0, Math.min(place, view.tokens.length - 1));
  for (const button of at("tokens").querySelectorAll("button")) {
    const chosen = Number(button.dataset.place) === state.token;
    button.setAttribute("aria-selected", chosen);
    button.tabIndex = chosen ? 0 : -1;
  }
  const token = view.tokens[state.token];
  at("about").textContent = `${spell(token.text)}: rank ${token.rank}, surprise ${token.surprise.toFixed(2)} bits, ` +
    `log-probability ${token.logprob.toFixed(3)}, entropy ${token.entropy.toFixed(2)} bits`;
  fillTable(at("alternatives"), ["token", ...token.steps], token.alternatives.map((one) => (
    { cells: [spell(one.text), ...one.probabilities.map(share)], drawn: one.token === token.token })));
  fillTable(at("lens"), ["behind layer", "most probable"], lens.layers.map((layer, number) => (
    { cells: [number, layer[state.token].map((one) => `${spell(one.token)} ${share(one.p)}`)] })));
  const row = view.prompt.length + state.token - 1;
  fillTable(at("routing"), ["layer", "expert and weight"], routing.layers.flatMap((layer, number) => (
    layer.length ? { cells: [number, layer[row].map((one) => `${one.expert}: ${one.weight.toFixed(3)}`)] } : [])));
  showProposals(state.token);
  showLooks(row);
}

function float16(bits) {
  const exponent = (bits >> 10) & 31, fraction = bits & 1023;
  return exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024);
}

async function showAttention() {
  if (!at("layer").options.length) { state.matrix = null; return; }
  const layer = Number(at("layer").value);
  fillSelect(at("head"), Array.from({ length: state.view.heads[layer] }, (_, head) => [head, head]));
  const answer = await ask(`${state.text}/attention?layer=${layer}&head=${at("head").value}`);
  state.size = Number(answer.headers.get("x-shape").split(",")[0]);
  state.matrix = Float32Array.from(new Uint16Array(await answer.arrayBuffer()), float16);
  const canvas = at("matrix");
  canvas.width = canvas.height = state.size;
  const image = new ImageData(state.size, state.size);
  const [red, green, blue] = getComputedStyle(document.documentElement).getPropertyValue("--mark").split(",").map(Number);
  state.matrix.forEach((weight, place) => image.data.set([red, green, blue, 255 * Math.sqrt(weight)], 4 * place));
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function showLooks(row) {
  if (!state.matrix) { fillTable(at("looks"), ["this model has no attention weights"], []); return; }
  const texts = [...state.view.prompt, ...state.view.tokens.map((one) => one.text)];
  const weights = Array.from(state.matrix.subarray(row * state.size, (row + 1) * state.size), (weight, place) => [weight, place]);
  const most = weights.sort((a, b) => b[0] - a[0]).slice(0, 8);
  fillTable(at("looks"), ["looks at", "position", "weight"], most.map(([weight, place]) => (
    { cells: [spell(texts[place]), place, weight.toFixed(4)] })));
}

at("ask").addEventListener("submit", (event) => { event.preventDefault(); guard(write); });
at("texts").addEventListener("change", () => guard(showText));
for (const id of ["layer", "head"]) {
  at(id).addEventListener("change", () => guard(async () => { await showAttention(); choose(state.token); }));
}
at("key").addEventListener("change", () => guard(listModels));
at("tokens").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  choose(state.token + step);
  at("tokens").querySelector("[aria-selected=true]").focus();
});
guard(async () => { await listModels(); if ((await listTexts()).length) await showText(); });
