// Makes elements. Text from anyone becomes text nodes: nothing here, nor elsewhere in this page, parses HTML.

/** An element with attributes, `--name` for a property of its style, and children that are elements or text. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("--")) made.style.setProperty(name, value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

/** A copy of the content of the <template> with this id. */
export function copyOf(id) {
  return document.getElementById(id).content.cloneNode(true);
}

/** Copies text, also where a page without TLS may not use the clipboard's own interface. */
export async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = element("textarea", { readonly: true, class: "visually-hidden" });
  const before = document.activeElement;
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  before?.focus();
  if (!copied) throw new Error("the browser does not let this page copy");
}
