// The page for people: conversations with the server's model, kept in the browser.
// Messages become nodes through textContent alone. Nothing that a model writes is parsed as HTML.

import { make, renderMarkdown } from "./markdown.js";

const STORE = "tinyllama_hf.v1."; // the number changes with the format of what is stored
const WARN_AT = 0.85; // share of the context
const NO_STORAGE = { getItem: () => null, removeItem: () => {}, setItem: () => { throw new Error("no storage"); } };
const SETTINGS = ["temperature", "top_p", "max_tokens", "seed", "stop"];
const EXAMPLES = {
  chat: ["Why is the sky blue? Answer in two sentences.", "Write a Python function that counts the words of a text.",
    "Suggest three names for a small tea shop."],
  text: ["Once upon a time", "def fibonacci(n):", "The three largest cities of France are"],
};

const $ = (selector, within = document) => within.querySelector(selector);
const clone = (id) => $(id).content.firstElementChild.cloneNode(true);
const count = (number) => number.toLocaleString("en");

// ---- What is stored ----

function storage(kind) {
  try { return window[kind]; } catch { return NO_STORAGE; }
}
const local = storage("localStorage"), session = storage("sessionStorage");

function store(name, value) {
  try {
    local.setItem(STORE + name, JSON.stringify(value));
  } catch {
    notify("The browser's storage is full or switched off, so this conversation is not saved. " +
      "Export your conversations, then delete some.");
  }
}

function stored(name) {
  try { return JSON.parse(local.getItem(name)); } catch { return undefined; }
}

const isMessage = (it) => typeof it?.content === "string" && ["user", "assistant"].includes(it.role);
const isConversation = (it) => typeof it?.id === "string" && typeof it.title === "string" &&
  Array.isArray(it.messages) && it.messages.every(isMessage);

function loadConversations() {
  const names = Object.keys(local).filter((name) => name.startsWith(STORE + "conversation."));
  const all = names.map(stored), sound = all.filter(isConversation);
  if (sound.length < all.length)
    notify(`${all.length - sound.length} saved conversations could not be read. They are left unchanged.`);
  // Replies under way exist only in this tab.
  return sound.map((one) => running.has(one.id) ? conversations.find(({ id }) => id === one.id) : one);
}

function save(conversation) {
  conversation.updated = Date.now();
  if (!conversations.includes(conversation)) conversations.push(conversation);
  store("conversation." + conversation.id, conversation);
}

function newConversation() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  const kind = model?.is_chat === false ? "text" : "chat";
  return { id, title: "", kind, system: settings.system ?? "", messages: [] };
}

// ---- The server ----

// Sends a request, and asks for the key as long as the server wants another one.
async function call(path, options = {}) {
  for (;;) {
    const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
    const sent = key;
    const response = await fetch(path, { ...options, headers }).catch((error) => {
      throw error.name === "AbortError" ? error : new Error("The server does not answer. Is it still running?");
    });
    if (response.ok) return response;
    const error = (await response.json().catch(() => null))?.error;
    if (response.status === 401 && (key !== sent || await askForKey(Boolean(sent)))) continue;
    const wait = response.headers.get("Retry-After");
    throw new Error((error?.message ?? `The server answered with status ${response.status}`).replace(/\.?$/, ".") +
      (error?.code === "context_length_exceeded" ? " Start a new conversation, or edit the message." : "") +
      (wait ? ` Try again in ${wait} s.` : ""));
  }
}

async function askForKey(refused) {
  const text = refused ? "The server refused this key."
    : "This server asks for a key. It is kept until you close this tab.";
  asked ??= ask({ title: "API key", action: "Continue", type: "password", text }); // once for all requests
  const given = await asked;
  asked = null;
  if (!given) return false;
  key = given;
  try { session.setItem(STORE + "key", key); } catch { /* kept in memory */ }
  return true;
}

async function* events(response) {
  const decoder = new TextDecoder();
  let rest = "";
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new Error("The connection to the server ended before the reply was complete.");
    const lines = (rest + decoder.decode(value, { stream: true })).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines.filter((line) => line.startsWith("data:"))) {
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function requestBody(conversation) {
  const messages = conversation.messages.slice(0, -1).map(({ role, content }) => ({ role, content }));
  if (conversation.system) messages.unshift({ role: "system", content: conversation.system });
  const chosen = SETTINGS.filter((name) => settings[name] !== undefined).map((name) => [name, settings[name]]);
  const prompt = messages.map((message) => message.content).join("");
  return JSON.stringify({ model: model.id, stream: true, stream_options: { include_usage: true },
    ...Object.fromEntries(chosen), ...(conversation.kind === "text" ? { prompt } : { messages }) });
}

// Generates the reply to the last message. `old` is the reply that it replaces, unless there is no new one.
async function reply(conversation, old = null) {
  const message = { role: "assistant", content: "" }, controller = new AbortController(), begin = performance.now();
  running.set(conversation.id, controller);
  conversation.messages.push(message);
  delete conversation.problem;
  show();
  announce("The model is replying.");
  let first, usage, problem, isStopped = false;
  try {
    const path = conversation.kind === "text" ? "v1/completions" : "v1/chat/completions";
    const response = await call(path, { method: "POST", body: requestBody(conversation), signal: controller.signal });
    for await (const event of events(response)) {
      const choice = event.choices[0], piece = choice?.delta?.content ?? choice?.text ?? "";
      if (piece) first ??= performance.now();
      message.content += piece;
      if (choice?.finish_reason === "length") message.note = "cut off at the limit of tokens";
      usage = event.usage ?? usage;
      if (piece) drawSoon();
    }
    if (!message.content) problem = "The model ended its reply without a word.";
  } catch (error) {
    isStopped = error.name === "AbortError";
    problem = isStopped ? "Stopped." : error.message;
  }
  const end = performance.now();
  running.delete(conversation.id);
  if (message.content) {
    const details = usage?.completion_tokens_details ?? {};
    message.stats = { seconds: (end - begin) / 1000, first: (first - begin) / 1000, tokens: usage?.completion_tokens,
      prompt: usage?.prompt_tokens, accepted: details.accepted_prediction_tokens,
      rejected: details.rejected_prediction_tokens };
    if (problem) message.note = problem;
  } else {
    conversation.messages.pop();
    if (old) conversation.messages.push(old);
    if (!old) conversation.problem = problem;
    else if (!isStopped) notify(problem);
  }
  if (conversations.includes(conversation)) save(conversation); // it may have been deleted meanwhile
  show();
  announce(problem ? `${message.content} ${problem}` : message.content);
}

function describe({ note, stats }) {
  if (!stats) return note ?? "";
  const { seconds, first, tokens, accepted, rejected } = stats, drafted = accepted + rejected;
  const rate = (tokens - 1) / (seconds - first); // while it was generated, so without reading the prompt
  return [
    note?.replace(/\.$/, ""), tokens && `${count(tokens)} tokens`, `${seconds.toFixed(1)} s`,
    tokens > 1 && `${rate.toFixed(1)} tokens/s`, `first token ${first.toFixed(2)} s`,
    drafted > 0 && `${Math.round((100 * accepted) / drafted)}% of ${count(drafted)} drafted tokens accepted`,
  ].filter(Boolean).join(" · ");
}

// ---- What is shown ----

const running = new Map(); // id of a conversation -> AbortController of its reply
const views = new WeakMap(); // message -> its element
let model = null, key = session.getItem(STORE + "key"), settings = stored(STORE + "settings") ?? {};
let conversations = [], current = null, frame = null, asked = null;
let editing = null; // while the last message is edited, what the box held before
conversations = loadConversations();

function notify(text) {
  $("#notice p").textContent = text;
  $("#notice").hidden = !text;
}
$("#notice button").onclick = () => notify("");

function announce(text) { $("#announcement").textContent = text; }

function viewOf(message, isText) {
  if (!views.has(message)) {
    const view = clone("#message");
    view.classList.add(message.role);
    view.classList.toggle("text", isText);
    $("h3", view).textContent = message.role === "user" ? "You" : "Model";
    const copyButton = $(".copy", view);
    copyButton.onclick = () => copy(message.content, copyButton);
    $(".edit", view).onclick = startEditing;
    $(".retry", view).onclick = () => { reply(current, current.messages.pop()); $("#text").focus(); };
    views.set(message, view);
  }
  return views.get(message);
}

function draw(message, conversation) {
  const view = viewOf(message, conversation.kind === "text");
  const isOpen = running.has(conversation.id) && message === conversation.messages.at(-1);
  view.classList.toggle("open", isOpen);
  view.classList.toggle("waiting", isOpen && !message.content);
  const content = $(".content", view);
  if (message.role === "assistant" && conversation.kind !== "text") renderMarkdown(content, message.content, copy);
  else content.textContent = message.content;
  $(".stats", view).textContent = describe(message);
  return view;
}

// Draws the reply under way at most once per frame, and follows it unless the reader scrolled up.
function drawSoon() {
  frame ??= requestAnimationFrame(() => {
    const follow = isAtEnd();
    frame = null;
    if (running.has(current.id)) draw(current.messages.at(-1), current);
    if (follow) scrollToEnd();
  });
}

const isAtEnd = () => $("#scroll").scrollHeight - $("#scroll").scrollTop - $("#scroll").clientHeight < 60;
function scrollToEnd() { $("#scroll").scrollTop = $("#scroll").scrollHeight; }

function show() {
  const log = $("#log"), follow = isAtEnd(), isBusy = running.has(current.id), isText = current.kind === "text";
  current.messages.forEach((message, i) => {
    const view = draw(message, current);
    if (log.children[i] !== view) log.insertBefore(view, log.children[i] ?? null);
  });
  while (log.children.length > current.messages.length) log.lastChild.remove();
  log.classList.toggle("busy", isBusy);
  const unanswered = !isBusy && current.messages.at(-1)?.role === "user";
  $("#problem").hidden = !unanswered && !current.problem;
  $("#problem p").textContent = current.problem ?? "This message has no reply.";
  $("#send").textContent = isBusy ? "Stop" : isText ? "Continue" : "Send";
  $("#send").disabled = !model && !isBusy;
  $("#editing").hidden = editing === null;
  $("#text").placeholder = isText ? "Text to continue" : "Message";
  $("#empty").hidden = !model || current.messages.length > 0;
  showList();
  showContext();
  if (follow) scrollToEnd();
}

function showContext() {
  const { prompt, tokens } = current.messages.findLast((message) => message.stats?.tokens)?.stats ?? {};
  const share = (prompt + tokens) / model?.max_model_len, isFull = share > WARN_AT;
  $("#used").textContent = !share ? "" : isFull
    ? `${Math.min(100, Math.round(100 * share))}% of the context is used. Start a new conversation soon.`
    : `${count(prompt + tokens)} of ${count(model.max_model_len)} tokens used`;
  $("#used").classList.toggle("warning", isFull);
}

function showList() {
  conversations.sort((a, b) => b.updated - a.updated);
  const focused = document.activeElement, id = focused?.closest("#list li")?.dataset.id;
  $("#list").replaceChildren(...conversations.map((conversation) => {
    const item = clone("#item");
    item.dataset.id = conversation.id;
    item.ariaCurrent = conversation === current ? "true" : null;
    Object.assign($(".title", item), { textContent: conversation.title, onclick: () => open(conversation) });
    $(".rename", item).onclick = () => rename(conversation);
    $(".delete", item).onclick = () => remove(conversation);
    return item;
  }));
  if (id) $(`#list [data-id="${id}"] .${focused.className}`)?.focus();
  $("#export").disabled = !conversations.length;
}

function showModel() {
  const { id, dtype, quantization, draft, max_model_len, is_chat, defaults } = model;
  document.title = $("#name").textContent = id;
  $("#details").textContent = [dtype, quantization === "none" ? "not quantized" : quantization,
    draft && `draft ${draft}`, `context of ${count(max_model_len)} tokens`].filter(Boolean).join(" · ");
  $("#empty h2").textContent = is_chat ? `Chat with ${id}` : `Continue a text with ${id}`;
  $("#empty p").replaceChildren(...(is_chat ? ["Conversations stay in this browser."] : [
    "This is a base model: it continues texts and does not answer. To chat, restart the server with a template: ",
    make("code", {}, ["tinyllama-hf serve MODEL --template llama2"])]));
  $("#examples").replaceChildren(...EXAMPLES[is_chat ? "chat" : "text"].map((text) =>
    make("button", { type: "button", textContent: text, onclick: () => send(text) })));
  for (const name of ["temperature", "top_p", "max_tokens"])
    fields[name].placeholder = defaults[name];
  fields.max_tokens.max = max_model_len;
}

// ---- What people do ----

function open(conversation) {
  if (editing !== null) stopEditing();
  current = conversation;
  history.replaceState(null, "", "#" + current.id);
  setMenu(false);
  show();
  scrollToEnd();
  if (!matchMedia("(pointer: coarse)").matches) $("#text").focus(); // would open the keyboard of a phone
}

function send(text) {
  const { messages } = current, isText = current.kind === "text";
  if (!model || running.has(current.id) || (!text.trim() && !(isText && messages.length))) return false;
  if (editing !== null) {
    messages.splice(messages.findLastIndex((message) => message.role === "user"));
    stopEditing();
  }
  const last = messages.at(-1);
  if (last?.role === "user") messages.splice(-1, 1, { role: "user", content: `${last.content}\n\n${text}` });
  else if (text) messages.push({ role: "user", content: text });
  current.title ||= text.trim().split("\n")[0].slice(0, 60);
  save(current);
  reply(current);
  scrollToEnd();
  return true;
}

function startEditing() {
  editing = $("#text").value;
  $("#text").value = current.messages.findLast((message) => message.role === "user").content;
  $("#text").focus();
  show();
}

function stopEditing() {
  $("#text").value = editing;
  editing = null;
  show();
}

async function copy(text, button) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else { // on http, other than on this machine
    const area = document.body.appendChild(make("textarea", { value: text, className: "unseen" }));
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = "Copied";
  announce("Copied");
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

// Shows a question, and returns the text that was typed (`true` if no text is asked for), or null.
function ask({ title, text = "", value = null, action, type = "text" }) {
  const dialog = $("#ask"), input = $("input", dialog), hasInput = value !== null || type === "password";
  $("h2", dialog).textContent = title;
  $("p", dialog).textContent = text;
  $("p", dialog).hidden = !text;
  $("[type=submit]", dialog).textContent = action;
  Object.assign(input, { type, value: value ?? "", hidden: !hasInput, disabled: !hasInput });
  return new Promise((resolve) => {
    let answer = null;
    $("form", dialog).onsubmit = (event) => {
      event.preventDefault();
      answer = hasInput ? input.value.trim() : true;
      dialog.close();
    };
    $(".buttons button", dialog).onclick = () => dialog.close();
    dialog.onclose = () => { input.value = ""; resolve(answer); };
    dialog.showModal();
  });
}

async function rename(conversation) {
  const title = await ask({ title: "Rename conversation", value: conversation.title, action: "Rename" });
  if (!title) return;
  conversation.title = title;
  save(conversation);
  showList();
}

async function remove(conversation) {
  const text = `“${conversation.title}” will be deleted from this browser.`;
  if (!await ask({ title: "Delete conversation?", text, action: "Delete" })) return;
  running.get(conversation.id)?.abort();
  local.removeItem(STORE + "conversation." + conversation.id);
  conversations = conversations.filter((one) => one !== conversation);
  if (conversation === current) open(newConversation());
  else {
    showList();
    $("#new").focus();
  }
}

// JSON lines that fine-tuning reads (`messages`), and those that pretraining reads (`text`) for a base model.
function exportAll() {
  const rows = conversations.map(({ kind, system, messages }) => {
    if (kind === "text") return { text: messages.map((message) => message.content).join("") };
    const answered = messages.slice(0, messages.findLastIndex((message) => message.role === "assistant") + 1);
    const all = [...(system ? [{ role: "system", content: system }] : []), ...answered];
    return answered.length ? { messages: all.map(({ role, content }) => ({ role, content })) } : null;
  });
  const text = rows.filter(Boolean).map((row) => JSON.stringify(row) + "\n").join("");
  const href = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  make("a", { href, download: "conversations.jsonl" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60000);
}

const fields = $("#settings form").elements;

function showSettings() {
  for (const name of SETTINGS) fields[name].value = settings[name] ?? "";
  fields.stop.value = (settings.stop ?? []).join("\n");
  fields.system.value = current.system;
  fields.system.closest("label").hidden = current.kind === "text";
  $("#settings").showModal();
}

$("#settings form").onsubmit = (event) => {
  event.preventDefault();
  const numbers = SETTINGS.filter((name) => name !== "stop" && fields[name].value);
  const stop = fields.stop.value.split("\n").filter(Boolean);
  settings = { ...Object.fromEntries(numbers.map((name) => [name, fields[name].valueAsNumber])),
    ...(stop.length && { stop }), system: fields.system.value };
  store("settings", settings);
  current.system = fields.system.value;
  if (conversations.includes(current)) save(current);
  $("#settings").close();
};
$("#reset").onclick = () => { for (const name of SETTINGS) fields[name].value = ""; };

function setMenu(isOpen) {
  $("#sidebar").classList.toggle("open", isOpen);
  $("#menu").ariaExpanded = String(isOpen);
  if (isOpen) $("#new").focus();
}

$("#composer").onsubmit = (event) => {
  event.preventDefault();
  if (running.has(current.id)) return running.get(current.id).abort();
  const text = $("#text").value;
  if (send(text) && $("#text").value === text) $("#text").value = "";
};
$("#text").onkeydown = (event) => {
  // 229: Safari ends the composition before the event of its Enter
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  if (!running.has(current.id)) $("#composer").requestSubmit();
};
document.onkeydown = (event) => {
  if (event.key !== "Escape" || event.isComposing || $("dialog[open]")) return;
  if ($("#sidebar").classList.contains("open")) { setMenu(false); $("#menu").focus(); }
  else if (running.has(current.id)) running.get(current.id).abort();
  else if (editing !== null) stopEditing();
};
$("#new").onclick = () => open(newConversation());
$("#menu").onclick = () => setMenu(!$("#sidebar").classList.contains("open"));
$("#shade").onclick = () => setMenu(false);
$("#export").onclick = exportAll;
$("#open-settings").onclick = showSettings;
$("#editing button").onclick = stopEditing;
$("#problem button").onclick = () => (model ? reply(current) : start());
window.onpagehide = () => { for (const one of conversations) if (running.has(one.id)) save(one); };
window.onstorage = () => { // another tab saved or deleted a conversation
  conversations = loadConversations();
  const same = conversations.find(({ id }) => id === current.id);
  if (same && same !== current) current = same;
  show();
};

async function start() {
  current ??= conversations.find(({ id }) => "#" + id === location.hash) ?? newConversation();
  delete current.problem;
  $("#name").textContent = "Connecting…";
  show();
  try {
    [model] = (await (await call("v1/models")).json()).data;
    if (!current.messages.length) current = newConversation();
    showModel();
    open(current);
  } catch (error) {
    $("#name").textContent = "No connection";
    current.problem = error.message;
    show();
  }
}
start();
