// WORDS: [heading, address, text] of every section. All words of the question must occur; a word in a heading counts for ten.
const question = (new URLSearchParams(location.search).get("q") || "").normalize("NFKC").trim();
const wanted = question.toLowerCase().split(/\s+/).filter(Boolean);
document.querySelector("header input").value = question;
const times = (text, word) => text.split(word).length - 1;
const found = !wanted.length ? [] : WORDS.map(([heading, address, text]) => {
  const low = [heading.toLowerCase(), text.toLowerCase()];
  const counts = wanted.map(word => 10 * times(low[0], word) + Math.min(9, times(low[1], word)));
  return {heading, address, text, first: low[1].indexOf(wanted[0]), score: counts.every(Boolean) ? counts.reduce((a, b) => a + b) : 0};
}).filter(hit => hit.score).sort((a, b) => b.score - a.score);
if (wanted.length) document.getElementById("count").textContent = `${found.length} sections hold “${question}”${found.length > 100 ? ", the first hundred:" : ""}`;
for (const {heading, address, text, first} of found.slice(0, 100)) {
  const item = document.createElement("li"), link = document.createElement("a"), around = document.createElement("p");
  link.href = address;
  link.textContent = heading;
  const begin = Math.max(0, first - 80);
  for (const [k, piece] of text.slice(begin, begin + 240).split(new RegExp(`(${wanted.map(w => w.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})`, "i")).entries()) {
    const part = document.createElement(k % 2 ? "mark" : "span");
    part.textContent = piece;
    around.append(part);
  }
  item.append(link, around);
  document.getElementById("hits").append(item);
}
