"use strict";
// What makes a page readable and usable by keyboard, asked of the page itself by tests/browser.py.
globalThis.readable = (() => {
  const parse = (text) => {
    const found = text.match(/[\d.]+/g).map(Number);
    return [found[0], found[1], found[2], found[3] ?? 1];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const linear = (value) => (value <= 0.04045 * 255 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  // WCAG 2.2: (lighter + 0.05) / (darker + 0.05).
  const ratio = (a, b) => {
    const [dark, pale] = [luminance(a), luminance(b)].sort((one, two) => one - two);
    return (pale + 0.05) / (dark + 0.05);
  };
  const backdrop = (node) => {
    const above = node.parentElement ? backdrop(node.parentElement) : [255, 255, 255];
    return over(parse(getComputedStyle(node).backgroundColor), above);
  };
  const opacity = (node) => (node ? Number(getComputedStyle(node).opacity) * opacity(node.parentElement) : 1);
  const describe = (node) =>
    `${node.tagName.toLowerCase()}${node.id ? `#${node.id}` : ""} ${node.textContent.trim().slice(0, 20)}`;
  const outline = (node) => {
    const { outlineStyle, outlineWidth, outlineColor } = getComputedStyle(node);
    return `${outlineStyle} ${outlineWidth} ${outlineColor}`;
  };
  // Every control that has a place in the order of Tab; of radio buttons the one that is set.
  const controls = () =>
    [...document.querySelectorAll("a[href], button, input, select, textarea, [tabindex]")].filter(
      (one) => one.tabIndex >= 0 && !one.disabled && one.checkVisibility() && !(one.type === "radio" && !one.checked));
  const visited = new Set(), before = new Map();

  // The visible texts with less contrast than this, and how many were looked at. Disabled controls are exempt, as in WCAG.
  function contrast(least) {
    const found = [];
    let count = 0;
    for (const node of document.body.querySelectorAll("*")) {
      const own = [...node.childNodes].some((one) => one.nodeType === Node.TEXT_NODE && one.data.trim());
      const field = node.matches("input:not([type=checkbox], [type=radio]), textarea, select");
      if ((!own && !field) || node.matches("option, script, :disabled") || !node.checkVisibility()) continue;
      const hint = field && node.placeholder && !node.value ? "::placeholder" : null;
      const behind = backdrop(node), ink = parse(getComputedStyle(node, hint).color);
      ink[3] *= opacity(node) * (hint ? Number(getComputedStyle(node, hint).opacity) : 1);
      const value = ratio(over(ink, behind), behind);
      if (!(value >= least)) found.push(`contrast ${value.toFixed(2)}: ${describe(node)}`);
      count += 1;
    }
    return { found, count };
  }

  function startTabs() {
    document.activeElement.blur();
    getSelection().empty();
    visited.clear();
    for (const one of document.querySelectorAll("*")) before.set(one, outline(one));
    return controls().length;
  }

  // What is wrong with the look of the focused element: a ring of two pixels that it does not have without the focus.
  function focus(least) {
    const node = document.activeElement, found = [];
    if (node === document.body) return found;
    visited.add(node);
    const style = getComputedStyle(node), box = node.getBoundingClientRect();
    if (style.outlineStyle === "none" || parseFloat(style.outlineWidth) < 2) found.push("no ring around");
    else if (ratio(parse(style.outlineColor), backdrop(node.parentElement)) < least) found.push("a pale ring around");
    if (outline(node) === before.get(node)) found.push("the focus changes nothing at");
    if (box.bottom <= 0 || box.top >= innerHeight || box.right <= 0 || box.left >= innerWidth) found.push("out of sight:");
    return found.map((problem) => `${problem} ${describe(node)}`);
  }

  const unvisited = () => controls().filter((one) => !visited.has(one)).map(describe);
  return { contrast, startTabs, focus, unvisited };
})();
