"use strict";
// Runs model.gguf with wllama (llama.cpp in WebAssembly). All files come from this folder; text becomes text nodes only.
const at = (id) => document.getElementById(id);
const settings = JSON.parse(at("settings").textContent);
const state = { wllama: null, model: null, abort: null, messages: [] };
// wllama ends at bytes that are no UTF-8, which byte-level tokens can form: a token that would form them is not taken.
const UTF8_GRAMMAR = String.raw`root ::= [\x01-\uD7FF\uE000-\U0010FFFF]*`;

function show(text, bad = false) {
  at("status").textContent = text;
  at("status").className = bad ? "bad" : "";
}

// What this browser or this way to open the page lacks; empty where nothing is missing.
function missingPart() {
  if (location.protocol === "file:") {
    return "Opened from a file, a page may not load a model. Run `python -m http.server` in its folder and open localhost:8000.";
  }
  try {
    new WebAssembly.Memory({ initial: 1n, maximum: 1n, address: "i64" });
  } catch {
    return "This browser has no WebAssembly with 64-bit memory: take Chrome or Edge 133, Firefox 134, or later.";
  }
  return "";
}

async function fetchModel() {
  const answer = await fetch("model.gguf", { cache: "no-cache" });
  if (!answer.ok) throw new Error(`model.gguf: the server answers ${answer.status}`);
  const total = Number(answer.headers.get("Content-Length"));
  const parts = [];
  let loaded = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    loaded += value.length;
    show(`Loading the model: ${(loaded / 1e6).toFixed(1)} MB${total ? ` of ${(total / 1e6).toFixed(1)}` : ""}`);
  }
  return new Blob(parts);
}

async function loadModel() {
  const [{ Wllama, LoggerWithoutDebug }, blob] = await Promise.all([import("./index.min.js"), state.model ?? fetchModel()]);
  state.model = blob;
  show("Starting the model");
  const wllama = new Wllama({ default: "./wllama.wasm" }, { logger: LoggerWithoutDebug, suppressNativeLog: true });
  wllama.setCompat(null); // it would be fetched from another server
  // A float32 cache without flash attention computes what the model computes.
  await wllama.loadModel([blob], {
    n_ctx: settings.context, n_parallel: 1, n_gpu_layers: 0, flash_attn: false, cache_type_k: "f32", cache_type_v: "f32",
    warmup: false, jinja: true, reasoning_format: "none",
  });
  state.wllama = wllama;
  const threads = wllama.isMultithread() ? wllama.getNumThreads() : 1;
  at("generate").disabled = false;
  show(`Ready, ${threads} thread${threads > 1 ? "s" : ""}, ${(performance.now() / 1000).toFixed(2)} s after the page was opened.`);
}

function append(text, className) {
  const node = document.createElement("span");
  node.className = className;
  node.textContent = text;
  at("output").append(node);
  return node;
}

const isChat = () => document.querySelector("input[name=form]:checked")?.value === "chat";

// The request: temperature 0 is greedy; filters are those that the model's makers advise, and otherwise none.
function buildRequest(prompt) {
  const filters = { top_k: 0, top_p: 1, min_p: 0, ...settings.sampling };
  const numbers = { temperature: Number(at("temperature").value), max_tokens: Number(at("tokens").value) };
  const request = { ...filters, ...numbers, grammar: UTF8_GRAMMAR };
  return isChat() ? { ...request, messages: state.messages } : { ...request, prompt };
}

function startAnswer(prompt) {
  if (!isChat()) {
    at("output").replaceChildren();
    state.messages = [];
    append(prompt, "prompt");
    return append("", "answer");
  }
  if (!state.messages.length) at("output").replaceChildren();
  state.messages.push({ role: "user", content: prompt });
  append(prompt, "prompt turn");
  at("prompt").value = "";
  return append("", "answer turn");
}

async function generate() {
  const node = startAnswer(at("prompt").value);
  const request = buildRequest(at("prompt").value);
  const begin = performance.now();
  const seen = { tokens: 0, first: 0 };
  const take = (chunk) => {
    const choice = chunk.choices?.[0];
    node.textContent += choice?.text ?? choice?.delta?.content ?? "";
    seen.tokens = chunk.timings?.predicted_n ?? seen.tokens + 1;
    seen.first ||= performance.now();
    showSpeed(seen, begin);
  };
  const options = { ...request, stream: true, timings_per_token: true, abortSignal: state.abort.signal, onData: take };
  try {
    await (request.messages ? state.wllama.createChatCompletion(options) : state.wllama.createCompletion(options));
  } finally {
    if (request.messages) state.messages.push({ role: "assistant", content: node.textContent });
  }
}

function showSpeed({ tokens, first }, begin) {
  const seconds = (performance.now() - first) / 1000;
  const rate = tokens > 1 && seconds > 0 ? `, ${((tokens - 1) / seconds).toFixed(1)} tokens per second` : "";
  at("speed").textContent = `${tokens} tokens, the first after ${((first - begin) / 1000).toFixed(2)} s${rate}`;
}

// What wllama refuses (a prompt beyond the context) has a type; after any other error its program has ended.
async function explain(error) {
  if (error.type) return show(`No text: ${error.message}`, true);
  const reason = `The text ended early: wllama stopped (${error.message}), as it does at bytes that are no UTF-8.`;
  show(`${reason} Starting the model again.`, true);
  try {
    await state.wllama.exit().catch(() => {});
    await loadModel();
    show(`${reason} The model was started again.`, true);
  } catch {
    show(`${reason} Load this page again.`, true);
  }
}

async function run() {
  if (!state.wllama || state.abort || !at("ask").reportValidity()) return;
  if (!at("prompt").value) return show("No text: write a prompt first.", true);
  state.abort = new AbortController();
  at("generate").disabled = true;
  at("stop").disabled = false;
  show("Writing");
  try {
    await generate();
    show("Done.");
  } catch (error) {
    if (state.abort.signal.aborted) show("Stopped.");
    else await explain(error);
  }
  state.abort = null;
  at("generate").disabled = false;
  at("stop").disabled = true;
}

const stop = () => state.abort?.abort();

function clear() {
  if (state.abort) return;
  state.messages = [];
  at("output").replaceChildren();
  at("speed").textContent = "";
}

at("ask").addEventListener("submit", (event) => { event.preventDefault(); run(); });
at("stop").addEventListener("click", stop);
at("clear")?.addEventListener("click", clear);
addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(); }
});
const missing = missingPart();
if (missing) show(missing, true);
else loadModel().catch((error) => show(`The model did not start: ${error.message}`, true));
