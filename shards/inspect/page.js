// Reads what page.py writes.

const PAGE = 60;  // records that are shown at a time
const BUSY_MS = 30;  // after which a search lets the page breathe
const PIECE = '\x1f', ANSWER = '\x1e', SCORE = '\x1d';
const BOX = 4095, SURE = 255;  // what 1 stands as
const NAMED = 8;  // boxes that show their label without being looked at

const pause = () => new Promise(done => setTimeout(done));

// --- data ---------------------------------------------------------------------------------------

/** Where each range begins whose lengths are given, and where the last one ends. */
function starts(lengths, extra = 0) {
  const out = new Uint32Array(lengths.length + 1);
  lengths.forEach((n, i) => { out[i + 1] = out[i] + n + extra; });
  return out;
}

/** A block of records; `first` is the number of its first one in the page. */
function parseBlock(buffer, first) {
  const [header, begin] = headed(buffer);
  const kinds = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, text: Uint8Array };
  const column = {};
  for (const [name, [kind, at, length]] of Object.entries(header)) {
    const type = kinds[kind];
    column[name] = new type(buffer, begin + at, length / type.BYTES_PER_ELEMENT);
  }
  const text = utf8(column.text);
  delete column.text;
  const sentence = starts(column.sentences), piece = starts(column.sentences, before());
  const count = piece[piece.length - 1];
  const place = new Uint32Array(count + 1);  // of each piece in the text
  for (let i = 1; i < count; i++) place[i] = text.indexOf(PIECE, place[i - 1]) + 1;
  place[count] = text.length + 1;
  return {
    first, column, text, low: folded(text), sentence, piece, place,
    records: column.shard.length,
    object: starts(column.objects),  // of each picture of a record
    picture: starts(column.picture),
  };
}

/** Pieces of a record's text before its sentences: id, split, and of two pictures theirs. */
const before = () => page.parts > 1 ? 2 + page.parts : 2;

/** The last i with sorted[i] <= value. */
function placeOf(sorted, value) {
  let low = 0, high = sorted.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= value) low = middle; else high = middle;
  }
  return low;
}

const pieceOf = (block, i) => block.text.slice(block.place[i], block.place[i + 1] - 1);

/** A record for showing it. */
function recordAt(n) {
  const block = blocks[placeOf(firsts, n)], i = n - block.first, c = block.column;
  const begin = block.piece[i];
  const sentences = [];
  for (let j = 0; j < c.sentences[i]; j++) {
    const [text, ...answers] = pieceOf(block, begin + before() + j).split(ANSWER);
    sentences.push({
      text, source: page.sources[c.source[block.sentence[i] + j]],
      answers: answers.map(a => a.split(SCORE)),
    });
  }
  const image = pieceOf(block, begin), parts = [];
  for (let k = 0; k < page.parts; k++) {
    const part = i * page.parts + k, objects = [];
    for (let o = block.object[part]; o < block.object[part + 1]; o++) {
      objects.push(objectAt(block, o, o - block.object[i * page.parts]));
    }
    parts.push({
      image: page.parts > 1 ? pieceOf(block, begin + 2 + k) : image, objects,
      width: c.width[part], height: c.height[part],
      picture: c.pictures.subarray(block.picture[part], block.picture[part + 1]),
    });
  }
  return {
    n, sentences, parts, image, split: pieceOf(block, begin + 1),
    place: `${page.shards[c.shard[i]]} · ${c.shard[i]}:${c.index[i]}`,
  };
}

/** Object o of a block, which is number n of its record. */
function objectAt(block, o, n) {
  const c = block.column, total = block.object[block.object.length - 1];
  const box = [0, 1, 2, 3].map(side => c.boxes[side * total + o] / BOX);
  return c.object_id ? {
    n, box, sure: c.object_conf[o] / SURE, attributeSure: c.attribute_conf[o] / SURE,
    name: nameOf(page.objects, c.object_id[o]),
    attribute: nameOf(page.attributes, c.attribute_id[o]),
  } : { n, box };
}

const nameOf = (names, id) => names[id] || `#${id}`;

// --- search -------------------------------------------------------------------------------------

/** Marks the records of a block with the word in an id, split, sentence or answer; of sentences,
 * in those of the source, if one is given. */
function markText(block, word, source, marks) {
  const { low, place, piece, sentence, column } = block;
  for (let at = low.indexOf(word); at >= 0;) {
    const p = placeOf(place, at), i = placeOf(piece, p), s = p - piece[i] - before();
    const good = s < 0 || source < 0 || column.source[sentence[i] + s] === source;
    marks[i] |= good;
    at = low.indexOf(word, place[good ? piece[i + 1] : p + 1]);
  }
}

/** Marks the records of a block with a label that has the word in its name, or is the word (#12)
 * where it has none. */
function markLabels(block, names, ids, word, marks) {
  if (!ids) return;
  const wanted = names.map(name => folded(name).includes(word));
  const id = /^#\d{1,6}$/.test(word) ? Number(word.slice(1)) : -1;
  if (id >= 0 && !names[id]) wanted[id] = true;
  if (!wanted.includes(true)) return;
  for (let i = 0; i < block.records; i++) {
    const end = block.object[(i + 1) * page.parts];
    for (let o = block.object[i * page.parts]; o < end && !marks[i]; o++) {
      if (wanted[ids[o]]) marks[i] = 1;
    }
  }
}

/** The records of a block with all words, and a sentence of the source, as numbers in the page. */
function matches(block, words, source) {
  const { column, sentence, records } = block;
  const good = new Uint8Array(records).fill(1);
  if (source >= 0) {
    for (let i = 0; i < records; i++) {
      good[i] = column.source.subarray(sentence[i], sentence[i + 1]).includes(source);
    }
  }
  for (const word of words) {
    const marks = new Uint8Array(records);
    markText(block, word, source, marks);
    markLabels(block, page.objects, column.object_id, word, marks);
    markLabels(block, page.attributes, column.attribute_id, word, marks);
    for (let i = 0; i < records; i++) good[i] &= marks[i];
  }
  const out = [];
  good.forEach((is, i) => { if (is) out.push(block.first + i); });
  return out;
}

let page, blocks = [], firsts = [], ready = [];
let hits = [], shown = 0, chosen = -1;  // shown: the page; chosen: a record
let searches = 0;

async function search() {
  const mine = ++searches;
  words = [...new Set(folded($('query').value).split(/\s+/).filter(Boolean))];
  const source = Number($('source').value), began = performance.now();
  hits = [];
  let rest = began, drawn = false;
  for (let b = 0; b < page.blocks; b++) {
    const block = await ready[b];
    if (mine !== searches) return;
    for (const hit of matches(block, words, source)) hits.push(hit);
    if (!drawn && hits.length >= (shown + 1) * PAGE) { drawn = true; showList(); }
    if (performance.now() - rest > BUSY_MS) {
      $('found').textContent = `${number(hits.length)} so far …`;
      await pause();
      if (mine !== searches) return;
      rest = performance.now();
    }
  }
  shown = Math.max(Math.min(shown, Math.ceil(hits.length / PAGE) - 1), 0);
  const ms = Math.round(performance.now() - began);
  $('found').textContent = `${number(hits.length)} of ${number(page.records)} records`;
  $('found').title = `${ms} ms`;
  showList();
}

// --- records ------------------------------------------------------------------------------------

let urls = [];  // of the pictures that are shown

function pictureOf(part) {
  const url = URL.createObjectURL(new Blob([part.picture], { type: 'image/jpeg' }));
  urls.push(url);
  return el('img', { src: url, alt: '' });
}

/** The boxes of a part of which there is no picture. */
function layout(part, width, height) {
  const scale = Math.min(width / part.width, height / part.height);
  const canvas = el('canvas', {
    width: Math.max(part.width * scale, 1), height: Math.max(part.height * scale, 1),
  });
  const pen = canvas.getContext('2d');
  pen.globalAlpha = 0.8;
  part.objects.forEach(({ n, box: [x1, y1, x2, y2] }) => {
    pen.strokeStyle = color(n);
    pen.strokeRect(x1 * canvas.width, y1 * canvas.height,
      (x2 - x1) * canvas.width, (y2 - y1) * canvas.height);
  });
  return canvas;
}

function card(record) {
  const isFound = s => words.some(word => folded(s.text).includes(word));
  const sentence = record.sentences.find(isFound) || record.sentences[0];
  const view = el('div', { className: 'view' }, ...record.parts.map(
    part => part.picture.length ? pictureOf(part) : layout(part, 240 / page.parts, 130)));
  const button = el('button', {
    className: record.n === chosen ? 'card chosen' : 'card', onclick: () => choose(record.n),
  }, view, el('b', { title: record.image }, ...marked(record.image)),
    el('span', {}, ...marked(sentence ? sentence.text : '')));
  button.dataset.record = record.n;
  return button;
}

function showList() {
  urls.forEach(url => URL.revokeObjectURL(url));
  urls = [];
  const some = hits.slice(shown * PAGE, (shown + 1) * PAGE);
  $('list').replaceChildren(...some.map(n => card(recordAt(n))));
  const pages = Math.max(Math.ceil(hits.length / PAGE), 1);
  $('page').textContent = `${number(shown + 1)} / ${number(pages)}`;
  $('back').disabled = shown === 0;
  $('on').disabled = shown + 1 >= pages;
  showDetail();
}

function turn(by) {
  shown += by;
  showList();
  $('list').scrollTop = 0;
  keep();
}

function choose(n) {
  chosen = n === chosen ? -1 : n;
  for (const button of $('list').children) {
    button.classList.toggle('chosen', Number(button.dataset.record) === chosen);
  }
  showDetail();
  keep();
}

function showDetail() {
  const last = blocks[blocks.length - 1];
  const there = chosen >= 0 && last && chosen < last.first + last.records;
  $('detail').hidden = !there;
  if (!there) return;
  const record = recordAt(chosen);
  const size = part => `${number(part.width)} × ${number(part.height)}`;
  const facts = [record.place, ...record.parts.map(size)];
  if (record.split) facts.push(record.split);
  const title = part => page.parts > 1 ? [el('h3', {}, ...marked(part.image))] : [];
  const views = record.parts.map(part => [part, ...objectsOf(part)]);
  $('detail').replaceChildren(
    el('h2', {}, ...marked(record.image)), el('p', {}, facts.join(' · ')),
    el('div', { className: 'stages' },
      ...views.map(([part, stage]) => el('div', {}, ...title(part), stage))),
    sentencesOf(record), ...views.flatMap(([part, , table]) => [...title(part), table]));
}

/** The stage with the boxes, and the table of what they are of; each shows the other's. */
function objectsOf(part) {
  const stage = el('div', { className: 'stage' });
  stage.style.aspectRatio = `${part.width} / ${part.height}`;
  if (part.picture.length) stage.append(pictureOf(part));
  const labelled = part.objects.length > 0 && 'name' in part.objects[0];
  const order = part.objects.map((_, i) => i);
  if (labelled) order.sort((a, b) => part.objects[b].sure - part.objects[a].sure);
  const head = labelled ? ['', 'object', '', 'attribute', ''] : ['', 'x1', 'y1', 'x2', 'y2'];
  const table = el('table', { className: 'objects' },
    el('tr', {}, ...head.map(name => el('th', {}, name))));
  order.forEach((i, rank) => {
    const object = part.objects[i], [x1, y1, x2, y2] = object.box;
    const cells = labelled
      ? [marked(object.name), object.sure.toFixed(2),
        marked(object.attribute), object.attributeSure.toFixed(2)]
      : [x1 * part.width, y1 * part.height, x2 * part.width, y2 * part.height]
        .map(v => v.toFixed(0));
    const swatch = el('span', { className: 'swatch' });
    swatch.style.background = color(object.n);
    const row = el('tr', {}, el('td', {}, swatch), ...cells.map(
      cell => el('td', { className: Array.isArray(cell) ? '' : 'number' }, ...[cell].flat())));
    const name = labelled ? `${object.name} ${object.sure.toFixed(2)}` : `object ${object.n}`;
    const label = el('i', {}, name);
    const box = el('div', {
      className: labelled && rank < NAMED ? 'box named' : 'box',
      title: labelled ? `${name}, ${object.attribute} ${object.attributeSure.toFixed(2)}` : name,
    }, label);
    Object.assign(box.style, {
      left: `${100 * x1}%`, top: `${100 * y1}%`, width: `${100 * (x2 - x1)}%`,
      height: `${100 * (y2 - y1)}%`, borderColor: color(object.n),
    });
    label.style.background = color(object.n);
    const look = is => {
      stage.classList.toggle('looking', is);
      box.classList.toggle('looked', is);
      row.classList.toggle('looked', is);
    };
    for (const element of [box, row]) {
      element.onmouseenter = () => look(true);
      element.onmouseleave = () => look(false);
    }
    stage.append(box);
    table.append(row);
  });
  // Small boxes lie above large ones, where the mouse finds them.
  const area = box => parseFloat(box.style.width) * parseFloat(box.style.height);
  [...stage.querySelectorAll('.box')].sort((a, b) => area(b) - area(a))
    .forEach(box => stage.append(box));
  return [stage, table];
}

function sentencesOf(record) {
  return el('table', {}, ...record.sentences.map(s => el('tr', {},
    el('td', {}, el('span', { className: 'tag' }, s.source)),
    el('td', {}, ...marked(s.text), ...(s.answers.length ? [el('br')] : []),
      ...s.answers.map(([answer, score]) =>
        el('span', { className: 'answer' }, ...marked(answer), score === '1' ? '' : ` ${score}`))))));
}

// --- the page -----------------------------------------------------------------------------------

/** The state in the address: it can be kept and sent. */
function keep() {
  const state = new URLSearchParams();
  if ($('query').value) state.set('q', $('query').value);
  if ($('source').value !== '-1') state.set('source', page.sources[$('source').value]);
  if (shown) state.set('page', shown + 1);
  if (chosen >= 0) state.set('r', chosen);
  if (!$('summary').hidden) state.set('view', 'summary');
  history.replaceState(null, '', `#${state}`);
}

function restore() {
  const state = new URLSearchParams(location.hash.slice(1));
  $('query').value = state.get('q') || '';
  $('source').value = page.sources.indexOf(state.get('source'));
  shown = Math.max((parseInt(state.get('page'), 10) || 1) - 1, 0);
  chosen = /^\d+$/.test(state.get('r')) ? Number(state.get('r')) : -1;
  view(state.get('view') === 'summary');
  search();
}

function view(summary) {
  $('summary').hidden = !summary;
  $('records').hidden = summary;
  $('show-summary').classList.toggle('chosen', summary);
  $('show-records').classList.toggle('chosen', !summary);
}

function showHead() {
  const { summary } = page, { sampled } = summary;
  $('name').textContent = summary.name;
  const facts = [counted(summary.images, page.parts > 1 ? 'record' : 'image'),
    ...(page.parts > 1 ? ['two pictures a record'] : []), counted(summary.pairs, 'pair'),
    counted(summary.shards, 'shard'), `${(summary.bytes / 1e6).toFixed(1)} MB`];
  facts.push(sampled.seed === null ? 'all records are here'
    : `${number(page.records)} records are here, drawn with seed ${sampled.seed}`);
  if (page.pictures) facts.push(counted(page.pictures, 'picture'));
  $('facts').textContent = facts.join(' · ');
  $('source').append(el('option', { value: -1 }, 'all sources'),
    ...page.sources.map((name, i) => el('option', { value: i }, name)));
}

async function load() {
  const elements = [...document.querySelectorAll('script.block')];
  const done = [];
  ready = elements.map((_, i) => new Promise(resolve => { done[i] = resolve; }));
  page = JSON.parse(utf8(await inflate(document.querySelector('script.summary'))));
  showHead();
  showSummary();
  restore();
  for (const [i, element] of elements.entries()) {
    const first = i ? firsts[i - 1] + blocks[i - 1].records : 0;
    blocks[i] = parseBlock(await inflate(element), first);
    firsts[i] = first;
    done[i](blocks[i]);
  }
}

let typing;
$('query').oninput = $('source').oninput = () => {
  clearTimeout(typing);
  typing = setTimeout(() => { shown = 0; keep(); search(); }, 120);
};
$('bar').onsubmit = event => event.preventDefault();
$('back').onclick = () => turn(-1);
$('on').onclick = () => turn(1);
$('show-records').onclick = () => { view(false); keep(); };
$('show-summary').onclick = () => { view(true); keep(); };
window.onhashchange = restore;

load().catch(error => { $('found').textContent = `This page cannot be shown: ${error}`; });
