/* Sphinx' search, but a title that holds the query comes before a page that has it somewhere, the
   glossary's entry first and then the section that it names; and every hit opens a section.
   Above this text pages.py writes TAUGHT: for each term of the glossary that section's page and
   title. */

const stems = (text) => {
  const stemmer = new Stemmer();
  return splitQuery(text.toLowerCase().replaceAll("_", " ")).map((word) => stemmer.stemWord(word));
};

const performPlainSearch = Search._performSearch;
Search._performSearch = (query, ...rest) => {
  const index = Search._index, asked = stems(query), hits = new Map();
  const add = (doc, anchor, title, score) => {
    const file = index.docnames.indexOf(doc);
    const hit = [doc, title, anchor, null, score, index.filenames[file], SearchResultKind.title];
    if (!hits.has(doc + anchor) || hits.get(doc + anchor)[4] < score) hits.set(doc + anchor, hit);
  };
  for (const [title, places] of Object.entries(index.alltitles)) {
    const words = stems(title.replace(/^[\d.· ]+/, ""));
    if (!asked.length || !asked.every((word) => words.includes(word))) continue;
    const isExact = asked.join(" ") === words.join(" ");
    for (const [file, id] of places) {
      const doc = index.docnames[file], page = index.titles[file];
      const isLesson = doc.startsWith("nbs/"), isGlossary = doc === "docs/glossary";
      add(doc, id === null ? "" : `#${id}`, page === title ? title : `${page} > ${title}`,
          100 + 50 * (asked.length / words.length) + 100 * (isExact && isGlossary) + 60 * isLesson);
      if (!(isExact && isGlossary && TAUGHT[title])) continue;
      const [lesson, section] = TAUGHT[title];
      for (const [file, id] of index.alltitles[section] ?? [])
        if (index.docnames[file] === lesson)
          add(lesson, `#${id}`, `${index.titles[file]} > ${section}`, 240);
    }
  }
  const found = performPlainSearch(query, ...rest).filter((hit) => !hits.has(hit[0] + hit[2]));
  return [...found, ...[...hits.values()].sort((a, b) => a[4] - b[4])];  // the last is shown first
};

/* A hit without a place gets that of the section which has the words most often, and all of them. */
const makePlainSummary = Search.makeSearchSummary;
Search.makeSearchSummary = (html, keywords, anchor) => {
  const page = new DOMParser().parseFromString(html, "text/html");
  let section = anchor && page.getElementById(anchor.slice(1))?.closest("section");
  if (!anchor) {
    const count = (part, word) => part.textContent.toLowerCase().split(word).length - 1;
    const sections = [...page.querySelectorAll("[role=main] section[id]")]
      .filter((part) => [...keywords].every((word) => count(part, word)));
    const often = (part) => Math.min(...[...keywords].map((word) => count(part, word)));
    section = sections.filter((part) => !sections.some((x) => x !== part && part.contains(x)))
      .sort((a, b) => often(b) - often(a))[0];
  }
  const summary = makePlainSummary(html, keywords, section ? `#${CSS.escape(section.id)}` : "");
  if (!anchor && section && summary)
    queueMicrotask(() => { summary.parentElement.querySelector("a").hash = section.id; });
  return summary;
};
