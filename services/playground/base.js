// What all parts of the page share: elements, numbers, and the theme.
const $ = (id) => document.getElementById(id);

function element(name, { text, class: classes, ...more } = {}, ...children) {
  const made = document.createElement(name);
  if (classes) made.className = classes;
  if (text !== undefined) made.textContent = text;
  Object.assign(made, more);
  made.append(...children);
  return made;
}

const count = (number) => number.toLocaleString("en");
const mib = (bytes) =>
  bytes < 2 ** 20 / 10
    ? `${(bytes / 2 ** 10).toFixed(1)} KiB`
    : `${(bytes / 2 ** 20).toFixed(bytes < 2 ** 24 ? 2 : 1)} MiB`;
const seconds = (s) =>
  s < 0.0995 ? `${(s * 1000).toFixed(s < 0.00995 ? 1 : 0)} ms` : `${s.toFixed(s < 9.95 ? 2 : 1)} s`;
const percent = (share) => `${(share * 100).toFixed(share < 0.0995 && share > 0 ? 1 : 0)}%`;
const readable = (text) => text.replaceAll("\0", "\ufffd"); // HTML has no NUL

const darkness = matchMedia("(prefers-color-scheme: dark)");
const setTheme = (dark) => {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
};
setTheme(darkness.matches);
darkness.addEventListener("change", () => setTheme(darkness.matches));
$("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme !== "dark"));
