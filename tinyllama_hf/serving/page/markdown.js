// A part of Markdown as nodes, made through textContent alone: HTML in it stays text.

export function make(tag, properties = {}, children = []) {
  const element = Object.assign(document.createElement(tag), properties);
  for (const child of children) element.append(child);
  return element;
}

// Every alternative ends at the next delimiter of its kind, so that matching takes linear time on any text.
const INLINE = new RegExp([
  /`([^`\n]+)`/, // code
  /\*\*(?=\S)((?:[^*]|\*(?!\*))+)\*\*/, // bold
  /(?<![*\w])\*(?=\S)([^*\n]*[^*\s])\*/, /(?<!\w)_(?=\S)([^_\n]*[^_\s])_(?!\w)/, // italic
  /\[([^[\]\n]+)\]\((https?:\/\/(?:[^()\s]|\([^()\s]*\))+)\)/, // link
  /(?<!\w)(https?:\/\/[^\s<>()"'`*]*[^\s<>()"'`*.,;:!?])/, // address
].map((part) => part.source).join("|"), "gi");
const FENCE = /^(\s*)(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}#{1,6}\s+(.*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

function inline(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    const [whole, code, bold, star, underscore, label, target, address] = match;
    nodes.push(text.slice(end, match.index));
    end = match.index + whole.length;
    if (code) nodes.push(make("code", {}, [code]));
    else if (bold) nodes.push(make("strong", {}, inline(bold)));
    else if (star ?? underscore) nodes.push(make("em", {}, inline(star ?? underscore)));
    else {
      const href = target ?? address;
      nodes.push(make("a", { href, title: href, target: "_blank", rel: "noopener noreferrer" }, [label ?? address]));
    }
  }
  return [...nodes, text.slice(end)];
}

function splitBlocks(text) {
  const blocks = [];
  let open = null; // the block that the next line may continue
  for (const line of text.split("\n")) {
    const fence = line.match(FENCE);
    if (open?.kind === "code") {
      if (fence?.[2].startsWith(open.fence) && !fence[3].trim()) open = null;
      else open.lines.push(line.startsWith(open.indent) ? line.slice(open.indent.length) : line);
      continue;
    }
    const isIndented = /^\s{2,}\S/.test(line);
    if (fence) open = { kind: "code", indent: fence[1], fence: fence[2], language: fence[3].trim(), lines: [] };
    else if (!line.trim()) { if (open?.kind !== "list") open = null; continue; }
    else if (HEADING.test(line)) open = { kind: "heading", lines: [line.match(HEADING)[1]] };
    else if (open?.kind === "list" && (ITEM.test(line) || isIndented)) { open.lines.push(line); continue; }
    else if (ITEM.test(line)) open = { kind: "list", lines: [line] };
    else if (open?.kind === "paragraph") { open.lines.push(line); continue; }
    else open = { kind: "paragraph", lines: [line] };
    blocks.push(open);
  }
  return blocks;
}

function list(lines) {
  const root = make("div"), levels = []; // the open lists, outermost first, with their indentation
  for (const line of lines) {
    const [, space, mark, text] = line.match(ITEM) ?? [];
    if (mark === undefined) { levels.at(-1).element.lastChild.append("\n", ...inline(line.trim())); continue; }
    const tag = /\d/.test(mark) ? "ol" : "ul";
    while (levels.length > 1 && space.length < levels.at(-1).indent) levels.pop();
    let level = levels.at(-1);
    const deeper = level && space.length > level.indent + 1 && levels.length < 8;
    if (!level || deeper || level.element.localName !== tag) {
      if (level && !deeper) levels.pop();
      const parent = levels.at(-1)?.element.lastChild ?? root;
      level = { indent: space.length, element: make(tag, tag === "ol" ? { start: parseInt(mark) } : {}) };
      parent.append(level.element);
      levels.push(level);
    }
    level.element.append(make("li", {}, inline(text)));
  }
  return root;
}

function code(block, copy) {
  const text = block.lines.join("\n");
  const copyButton = make("button", { type: "button", textContent: "Copy", ariaLabel: "Copy code" });
  copyButton.onclick = () => copy(text, copyButton);
  return make("div", { className: "code" }, [
    make("div", {}, [make("span", {}, [block.language || "text"]), copyButton]),
    make("pre", { tabIndex: 0 }, [make("code", {}, [text])]),
  ]);
}

// Renders a text. Of a reply under way only the last block is built again: blocks that did not change since the last
// call stay. `copy` is called with the text of a code block and its button.
export function renderMarkdown(element, text, copy) {
  const blocks = splitBlocks(text);
  blocks.forEach((block, i) => {
    const source = JSON.stringify(block), old = element.children[i];
    if (old?.source === source) return;
    const lines = block.lines.join("\n");
    const made = block.kind === "code" ? code(block, copy) : block.kind === "list" ? list(block.lines)
      : make(block.kind === "heading" ? "h4" : "p", {}, inline(lines));
    made.source = source;
    if (old) old.replaceWith(made);
    else element.append(made);
  });
  while (element.children.length > blocks.length) element.lastChild.remove();
}
