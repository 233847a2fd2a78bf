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
  const sentence = starts(column.sentences), piece = starts(column.sentences, 2);
  const count = piece[piece.length - 1];
  const place = new Uint32Array(count + 1);  // of each piece in the text
  for (let i = 1; i < count; i++) place[i] = text.indexOf(PIECE, place[i - 1]) + 1;
  place[count] = text.length + 1;
  return {
    first, column, text, low: folded(text), sentence, piece, place,
    records: column.shard.length,
    object: starts(column.objects),
    picture: starts(column.picture),
  };
}

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
    const [text, ...answers] = pieceOf(block, begin + 2 + j).split(ANSWER);
    sentences.push({
      text, source: page.sources[c.source[block.sentence[i] + j]],
      answers: answers.map(a => a.split(SCORE)),
    });
  }
  const total = block.object[block.records], objects = [];
  for (let o = block.object[i]; o < block.object[i + 1]; o++) {
    const box = [0, 1, 2, 3].map(side => c.boxes[side * total + o] / BOX);
    objects.push(c.object_id ? {
      box, sure: c.object_conf[o] / SURE, attributeSure: c.attribute_conf[o] / SURE,
      name: nameOf(page.objects, c.object_id[o]),
      attribute: nameOf(page.attributes, c.attribute_id[o]),
    } : { box });
  }
  return {
    n, sentences, objects, image: pieceOf(block, begin), split: pieceOf(block, begin + 1),
    width: c.width[i], height: c.height[i],
    place: `${page.shards[c.shard[i]]} · ${c.shard[i]}:${c.index[i]}`,
    picture: c.pictures.subarray(block.picture[i], block.picture[i + 1]),
  };
}

const nameOf = (names, id) => names[id] || `#${id}`;

// --- search -------------------------------------------------------------------------------------

/** Marks the records of a block with the word in an id, split, sentence or answer; of sentences,
 * in those of the source, if one is given. */
function markText(block, word, source, marks) {
  const { low, place, piece, sentence, column } = block;
  for (let at = low.indexOf(word); at >= 0;) {
    const p = placeOf(place, at), i = placeOf(piece, p), s = p - piece[i] - 2;
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
    for (let o = block.object[i]; o < block.object[i + 1] && !marks[i]; o++) {
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

function pictureOf(record) {
  const url = URL.createObjectURL(new Blob([record.picture], { type: 'image/jpeg' }));
  urls.push(url);
  return el('img', { src: url, alt: '' });
}

/** The boxes of a record without a picture. */
function layout(record, width, height) {
  const scale = Math.min(width / record.width, height / record.height);
  const canvas = el('canvas', {
    width: Math.max(record.width * scale, 1), height: Math.max(record.height * scale, 1),
  });
  const pen = canvas.getContext('2d');
  pen.globalAlpha = 0.8;
  record.objects.forEach(({ box: [x1, y1, x2, y2] }, i) => {
    pen.strokeStyle = color(i);
    pen.strokeRect(x1 * canvas.width, y1 * canvas.height,
      (x2 - x1) * canvas.width, (y2 - y1) * canvas.height);
  });
  return canvas;
}

function card(record) {
  const isFound = s => words.some(word => folded(s.text).includes(word));
  const sentence = record.sentences.find(isFound) || record.sentences[0];
  const view = el('div', { className: 'view' },
    record.picture.length ? pictureOf(record) : layout(record, 240, 130));
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
  const facts = [record.place, `${number(record.width)} × ${number(record.height)}`];
  if (record.split) facts.push(record.split);
  $('detail').replaceChildren(
    el('h2', {}, ...marked(record.image)), el('p', {}, facts.join(' · ')),
    ...[objectsOf(record)].flatMap(([stage, table]) => [stage, sentencesOf(record), table]));
}

/** The stage with the boxes, and the table of what they are of; each shows the other's. */
function objectsOf(record) {
  const stage = el('div', { className: 'stage' });
  stage.style.aspectRatio = `${record.width} / ${record.height}`;
  if (record.picture.length) stage.append(pictureOf(record));
  const labelled = record.objects.length > 0 && 'name' in record.objects[0];
  const order = record.objects.map((_, i) => i);
  if (labelled) order.sort((a, b) => record.objects[b].sure - record.objects[a].sure);
  const head = labelled ? ['', 'object', '', 'attribute', ''] : ['', 'x1', 'y1', 'x2', 'y2'];
  const table = el('table', { className: 'objects' },
    el('tr', {}, ...head.map(name => el('th', {}, name))));
  order.forEach((i, rank) => {
    const object = record.objects[i], [x1, y1, x2, y2] = object.box;
    const cells = labelled
      ? [marked(object.name), object.sure.toFixed(2),
        marked(object.attribute), object.attributeSure.toFixed(2)]
      : [x1 * record.width, y1 * record.height, x2 * record.width, y2 * record.height]
        .map(v => v.toFixed(0));
    const swatch = el('span', { className: 'swatch' });
    swatch.style.background = color(i);
    const row = el('tr', {}, el('td', {}, swatch), ...cells.map(
      cell => el('td', { className: Array.isArray(cell) ? '' : 'number' }, ...[cell].flat())));
    const name = labelled ? `${object.name} ${object.sure.toFixed(2)}` : `object ${i}`;
    const label = el('i', {}, name);
    const box = el('div', {
      className: labelled && rank < NAMED ? 'box named' : 'box',
      title: labelled ? `${name}, ${object.attribute} ${object.attributeSure.toFixed(2)}` : name,
    }, label);
    Object.assign(box.style, {
      left: `${100 * x1}%`, top: `${100 * y1}%`, width: `${100 * (x2 - x1)}%`,
      height: `${100 * (y2 - y1)}%`, borderColor: color(i),
    });
    label.style.background = color(i);
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

// --- distributions ------------------------------------------------------------------------------

/** Bars of [label, value] with a caption. */
function bars(title, note, rows) {
  const most = Math.max(...rows.map(row => row[1]), 1);
  const total = rows.reduce((sum, row) => sum + row[1], 0) || 1;
  return el('figure', {}, el('figcaption', {}, title, el('small', {}, note)),
    ...rows.map(([label, value, text]) => {
      const bar = el('div');
      bar.style.width = `${100 * value / most}%`;
      if (!value) bar.style.minWidth = '0';
      return el('div', { className: 'row' }, el('span', { title: label }, label),
        el('div', { className: 'bar' }, bar),
        el('span', {}, text || `${number(value)} · ${percent(value / total)}`));
    }));
}

function histogram(title, h, { scale = 1, unit = '', spans } = {}) {
  const round = v => Number((v * scale).toPrecision(3)).toLocaleString('en-US');
  const span = i => {
    const [a, b] = [h.edges[i], h.edges[i + 1]];
    if (h.whole) return b - a <= 1 ? number(a) : `${number(a)}–${number(b - 1)}`;
    return `${round(a)}–${round(b)}${unit}`;
  };
  const median = h.median === null ? '' : `median ${number(h.median)}, `;
  return bars(title,
    `${round(h.least)} to ${round(h.most)}${unit}, ${median}mean ${round(h.mean)}${unit}`,
    h.counts.map((count, i) => [(spans || span)(i), count]));
}

function labelBars(title, labels) {
  return bars(title, `${number(labels.distinct)} in these records; mean confidence behind`,
    labels.top.map(([, name, count, sure]) => [name, count, `${number(count)} · ${sure.toFixed(2)}`]));
}

function showSummary() {
  const { summary } = page, { sampled } = summary, tables = summary.counted;
  const section = (title, ...figures) =>
    [el('h2', {}, title), el('div', { className: 'figures' }, ...figures)];
  const sources = tables.sources.map(s => [s.source, s.sentences]);
  const all = section(`All ${number(summary.images)} images and ${number(summary.pairs)} sentences`,
    bars('sentences by source', 'pairs of image and sentence', sources),
    histogram('objects of an image', tables.objects),
    histogram('sentences of an image', tables.sentences),
    histogram('tokens of a sentence', tables.tokens));
  const each = tables.sources.flatMap(s => section(s.source,
    ...(s.answers ? [bars('best answers',
      `${percent(s.answered / s.sentences)} of the sentences have one in the table; ten answers ` +
      `are ${percent(s.answers.coverage[10])} of these`, s.answers.top)] : []),
    histogram('sentences of an image', s.per_image),
    histogram('tokens of a sentence', s.tokens)));
  const values = sampled.features.values, powers = values.edges;
  const power = v => Math.abs(v) < 1e-9 ? '0' : Number(v.toPrecision(3)).toString();
  const drawn = section(`${sampled.seed === null ? 'All' : 'Of'} ${number(sampled.records)} records` +
    (sampled.seed === null ? '' : ` from ${number(sampled.shards)} of ${number(summary.shards)} ` +
      `shards, drawn with seed ${sampled.seed}`),
  bars('splits', 'images', sampled.splits.map(([split, n]) => [split || '(none)', n])),
  histogram('area of boxes', sampled.box_area, { scale: 100, unit: ' %' }),
  ...(sampled.objects ? [
    labelBars('objects', sampled.objects), labelBars('attributes', sampled.attributes),
    histogram('confidence in objects', sampled.objects.confidence),
    histogram('confidence in attributes', sampled.attributes.confidence)] : []),
  histogram(`features of ${number(sampled.features.records)} records`, values, {
    spans: i => powers[i] < 0 && powers[i + 1] > 0 ? '0'
      : `${power(powers[i])} to ${power(powers[i + 1])}`,
  }));
  $('summary').replaceChildren(...all, ...drawn, ...each);
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
  const facts = [counted(summary.images, 'image'), counted(summary.pairs, 'pair'),
    counted(summary.shards, 'shard'), `${(summary.bytes / 1e6).toFixed(1)} MB`];
  facts.push(sampled.seed === null ? 'all records are here'
    : `${number(page.records)} records are here, drawn with seed ${sampled.seed}`);
  if (page.pictures) facts.push(`${number(page.pictures)} with their picture`);
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
