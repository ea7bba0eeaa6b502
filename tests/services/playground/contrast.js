// The lowest contrast (WCAG 2.2, 1.4.3) of any text on the page, and where it is.
() => {
  const parse = (text) => (text.match(/[\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
  const over = ([r, g, b, a = 1], below) =>
    [r, g, b].map((c, i) => c * a + below[i] * (1 - a));
  const background = (element) => element
    ? over(parse(getComputedStyle(element).backgroundColor), background(element.parentElement))
    : [255, 255, 255];
  const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = (color) => {
    const [r, g, b] = color.map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const worst = { ratio: 21, where: "" };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    const isText = walker.currentNode.data.trim() && !parent.closest("script, option");
    if (!isText || !parent.checkVisibility()) continue;
    const style = getComputedStyle(parent), behind = background(parent);
    const color = parse(parent.closest("svg") ? style.fill : style.color);
    const ratio = contrast(over(color, behind), behind);
    if (ratio < worst.ratio) Object.assign(worst, { ratio, where: parent.outerHTML.slice(0, 120) });
  }
  return worst;
}
