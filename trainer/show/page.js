// Reads what page.py and show.py write.

const LISTED = 500;  // rows of the list
const KINDS = 12, BINS = 6;  // rows of a table of the summary
const NAMED = 8;  // boxes that show their label without being looked at
const DRAWN = 600;  // points that a picture is wide

let page, elements = [], blocks = [];
let hits = [], chosen = -1, shown = null;  // shown: what of the chosen pair is on the page
let pinned = null, looks = 0;  // pinned: ['words' or 'objects', place]

// --- data ---------------------------------------------------------------------------------------

/** The block of an image record, unpacked when it is first asked for. */
function blockOf(image) {
  blocks[image] ??= inflate(elements[image]).then(buffer => {
    const [header, begin] = headed(buffer);
    return { ...header, bytes: new Uint8Array(buffer, begin) };
  });
  return blocks[image];
}

// --- the list and the summary -------------------------------------------------------------------

const resultOf = e => e.score === null ? 'open' : e.score > 0 ? 'right' : 'wrong';
const textOf = e => folded([e.text, e.answer || '', e.image_id, e.id ?? '', e.kind,
  ...e.truth.map(t => t[0])].join('\n'));

function search() {
  words = [...new Set(folded($('query').value).split(/\s+/).filter(Boolean))];
  const result = $('result').value, kind = $('kind').value;
  hits = page.examples.map((_, i) => i).filter(i => {
    const e = page.examples[i];
    return (!result || resultOf(e) === result) && (!kind || e.kind === kind) &&
      words.every(word => textOf(e).includes(word));
  });
  $('found').textContent = `${number(hits.length)} of ${number(page.examples.length)} pairs` +
    (hits.length > LISTED ? `, the first ${LISTED} of them below` : '');
  $('list').replaceChildren(...hits.slice(0, LISTED).map(row));
  showSummary();
}

function row(i) {
  const e = page.examples[i], result = resultOf(e);
  const sign = { right: '✓', wrong: '✗', open: '·' }[result];
  const truth = e.truth.length ? e.truth[0][0] : null;
  const said = e.answer === null ? [e.source]
    : [...marked(e.answer), ...(result === 'wrong' ? [' · right: ', ...marked(truth)] : [])];
  const button = el('button', {
    type: 'button', className: i === chosen ? 'chosen' : '', onclick: () => choose(i),
  }, el('b', { className: result }, sign), el('span', {}, ...marked(e.text)),
  el('small', {}, ...said));
  button.dataset.example = i;
  return button;
}

function showSummary() {
  const scored = hits.map(i => page.examples[i]).filter(e => e.score !== null);
  const mean = some => some.reduce((sum, e) => sum + e.score, 0) / some.length;
  $('accuracy').textContent = scored.length
    ? `accuracy ${(100 * mean(scored)).toFixed(1)} % of ${counted(scored.length, 'question')} shown`
    : 'no question shown has a known answer';
  const table = (title, name, most) => {
    const groups = new Map();
    for (const e of scored) {
      const key = name(e);
      groups.set(key, [...(groups.get(key) || []), e]);
    }
    let rows = [...groups];
    if (most) {
      rows.sort((a, b) => b[1].length - a[1].length);
      const rest = rows.splice(most).flatMap(r => r[1]);
      if (rest.length) rows.push(['others', rest]);
    } else rows.sort((a, b) => String(a[0]).localeCompare(b[0], 'en', { numeric: true }));
    return el('table', {}, el('tr', {}, el('th', {}, title), el('th', {}, 'questions'),
      el('th', {}, 'accuracy'), el('th')), ...rows.map(([key, some]) => {
      const bar = el('div', { className: 'share' });
      bar.style.width = `${100 * mean(some)}%`;
      return el('tr', {}, el('td', {}, key), el('td', { className: 'number' }, number(some.length)),
        el('td', { className: 'number' }, `${(100 * mean(some)).toFixed(1)} %`), el('td', {}, bar));
    }));
  };
  const sizes = page.examples.map(e => e.objects), least = Math.min(...sizes);
  const wide = Math.ceil((Math.max(...sizes) - least + 1) / BINS);
  const span = e => {
    const a = least + wide * Math.floor((e.objects - least) / wide);
    return wide > 1 ? `${a} to ${a + wide - 1}` : `${a}`;
  };
  $('tables').replaceChildren(...(scored.length ? [
    table('kind', e => e.kind, KINDS), table('answer', e => e.type || 'other'),
    table('objects', span)] : []));
}

// --- a pair -------------------------------------------------------------------------------------

async function choose(i, keepPin = false) {
  const mine = ++looks, e = page.examples[i];
  const block = await blockOf(e.image);
  if (mine !== looks) return;
  chosen = i;
  if (!keepPin) pinned = null;
  shown = { e, block, sentence: block.sentences[e.sentence] };
  for (const button of $('list').children) {
    button.classList.toggle('chosen', Number(button.dataset.example) === i);
  }
  $('detail').hidden = false;
  showPair();
  keep();
}

/** An element that looks when the mouse is on it, and goes on when it is clicked. part: number of
 * the picture that it goes with. */
function looking(element, side, place, part) {
  element.onmouseenter = () => shade([side, place]);
  element.onmouseleave = () => shade(pinned);
  element.onclick = () => {
    const same = pinned && pinned[0] === side && pinned[1] === place;
    pinned = same ? null : [side, place];
    shade(pinned);
    keep();
  };
  element.dataset[side === 'words' ? 'word' : 'object'] = place;
  element.dataset.part = part;
  return element;
}

let urls = [];  // of the pictures that are shown

function showPair() {
  const { e, block, sentence } = shown, covered = $('masked').checked ? sentence.masked : null;
  urls.forEach(url => URL.revokeObjectURL(url));
  urls = [];
  $('words').replaceChildren(...block.parts.map((_, n) => wordsOf(n, covered)));
  $('stages').replaceChildren(...block.parts.map((_, n) => stageOf(n, covered)));
  $('says').replaceChildren(...(covered ? filledIn(covered) : answersOf(e, sentence)));
  $('objects').replaceChildren(objectsOf(block));
  shade(pinned);
}

/** The name of a picture, where a record is of two. */
const titleOf = n => shown.block.parts.length > 1
  ? [el('small', { className: 'title' }, ...marked(shown.block.parts[n].image))] : [];

/** The words, as the model reads them with picture n. */
function wordsOf(n, covered) {
  const { sentence } = shown;
  return el('div', { className: 'words' }, ...titleOf(n), ...sentence.tokens.map((token, i) => {
    const hidden = covered && covered.words.includes(i);
    return looking(el('button', { className: hidden ? 'word covered' : 'word', type: 'button' },
      el('span', {}, hidden ? '[MASK]' : token), el('small')), 'words', i, n);
  }), sentence.cut ? '… cut' : '');
}

const nameOf = o => shown.block.labels ? shown.block.labels[o][0] : `object ${o}`;

function stageOf(n, covered) {
  const { block } = shown, part = block.parts[n], stage = el('div', { className: 'stage' });
  stage.style.aspectRatio = `${part.width} / ${part.height}`;
  const [at, length] = part.picture;
  if (length) {
    const url = URL.createObjectURL(
      new Blob([block.bytes.subarray(at, at + length)], { type: 'image/jpeg' }));
    urls.push(url);
    stage.append(el('img', { src: url, alt: '' }));
  }
  stage.append(el('canvas', {
    width: DRAWN, height: Math.max(Math.round(DRAWN * part.height / part.width), 1),
  }));
  const places = placesOf(part);
  const sure = o => block.labels ? block.labels[o][1] : 0;
  const named = block.labels ? [...places].sort((a, b) => sure(b) - sure(a)).slice(0, NAMED) : [];
  const area = o => { const [x1, y1, x2, y2] = block.boxes[o]; return (x2 - x1) * (y2 - y1); };
  // Small boxes lie above large ones, where the mouse finds them.
  for (const o of places.sort((a, b) => area(b) - area(a))) {
    const [x1, y1, x2, y2] = block.boxes[o], label = el('i', {}, nameOf(o));
    const box = looking(
      el('div', { className: 'box', title: nameOf(o) }, label), 'objects', o, n);
    Object.assign(box.style, {
      left: `${100 * x1}%`, top: `${100 * y1}%`, width: `${100 * (x2 - x1)}%`,
      height: `${100 * (y2 - y1)}%`, borderColor: color(o),
    });
    label.style.background = color(o);
    box.classList.toggle('named', !covered && named.includes(o));
    const hidden = covered ? covered.objects.indexOf(o) : -1;
    if (hidden >= 0) {
      box.classList.add('covered');
      label.textContent = covered.object ? covered.object[hidden][0][0] : 'masked';
    }
    stage.append(box);
  }
  return el('div', {}, stage, ...titleOf(n));
}

const chance = p => p < 0.001 ? '< 0.1 %' : `${(100 * p).toFixed(1)} %`;
const guesses = tops => tops.map(([name, p]) => `${name} ${chance(p)}`).join(', ');

function answersOf(e, sentence) {
  const out = [el('h2', {}, ...marked(e.text)), el('p', {}, [shown.block.image, shown.block.place,
    e.source, e.id === null ? '' : `question ${e.id}`, e.kind].filter(Boolean).join(' · '))];
  if (e.truth.length) {
    out.push(el('table', {}, el('tr', {}, el('th', {}, 'right answer'), el('th', {}, 'score')),
      ...e.truth.map(([answer, score, known]) => el('tr', {}, el('td', {}, ...marked(answer)),
        el('td', { className: 'number' }, String(Number(score.toFixed(3)))),
        el('td', {}, known === null ? 'not in the answer table' : '')))));
  }
  if (sentence.answers && e.answer !== null) {
    const good = answer => e.truth.some(([, , known]) => known === answer);
    out.push(el('table', { id: 'answers' },
      el('tr', {}, el('th', {}, 'the model'), el('th', {}, 'probability')),
      ...sentence.answers.map(([answer, p], i) => {
        const right = i === 0 && e.score !== null ? resultOf(e) : good(answer) ? 'right' : '';
        return el('tr', {}, el('td', { className: right }, answer),
          el('td', { className: 'number' }, chance(p)));
      })));
  }
  if (sentence.matching !== null) {
    out.push(el('p', { id: 'matching' },
      `sentence and picture belong together: ${chance(sentence.matching)}`));
  }
  return out;
}

/** What the model fills in at what is masked. */
function filledIn(covered) {
  const { e, block, sentence } = shown, out = [el('h2', {}, ...marked(e.text))];
  if (covered.says) {
    out.push(el('table', { id: 'filled' },
      el('tr', {}, ...['masked word', 'the model'].map(t => el('th', {}, t))),
      ...covered.words.map((place, i) => {
        const word = sentence.tokens[place], right = covered.says[i][0][0] === word;
        return el('tr', {}, el('td', {}, word),
          el('td', { className: right ? 'right' : 'wrong' }, guesses(covered.says[i])));
      })));
  }
  if (covered.object) {
    out.push(el('table', {},
      el('tr', {}, ...['masked object', 'the model'].map(t => el('th', {}, t))),
      ...covered.objects.flatMap((place, i) => [['', 0, covered.object[i]],
        ['attribute ', 2, covered.attribute[i]]].map(([what, column, tops]) => {
        const label = block.labels[place][column];
        return el('tr', {}, el('td', {}, `${what}${label}`),
          el('td', { className: tops[0][0] === label ? 'right' : 'wrong' }, guesses(tops)));
      }))));
  }
  if (out.length === 1) out.push(el('p', {}, 'This model was trained on no masked words or labels.'));
  return out;
}

function objectsOf(block) {
  const head = block.labels ? ['', '', 'object', '', 'attribute', '', 'attention']
    : ['', '', 'x1', 'y1', 'x2', 'y2', 'attention'];
  const row = (part, n, o) => {
    const swatch = el('span', { className: 'swatch' }), size = [part.width, part.height];
    swatch.style.background = color(o);
    const cells = block.labels
      ? block.labels[o].map(x => typeof x === 'number' ? x.toFixed(2) : x)
      : block.boxes[o].map((x, i) => (x * size[i % 2]).toFixed(0));
    return looking(el('tr', {}, el('td', {}, swatch), el('td', { className: 'number' }, `${o}`),
      ...cells.map(cell => el('td', {}, cell)), el('td', { className: 'weight number' })),
    'objects', o, n);
  };
  return el('table', {}, el('tr', {}, ...head.map(name => el('th', {}, name))),
    ...block.parts.flatMap((part, n) => [
      ...titleOf(n).map(title => el('tr', {}, el('th', { colSpan: head.length }, title))),
      ...placesOf(part).map(o => row(part, n, o))]));
}

// --- the page -----------------------------------------------------------------------------------

/** The state in the address: it can be kept and sent. */
function keep() {
  const state = new URLSearchParams();
  for (const [key, id] of [['q', 'query'], ['result', 'result'], ['kind', 'kind']]) {
    if ($(id).value) state.set(key, $(id).value);
  }
  if (chosen >= 0) state.set('pair', chosen);
  state.set('layer', views[Number($('layer').value)].name);
  if ($('head').value !== '-1') state.set('head', Number($('head').value) + 1);
  if ($('masked').checked) state.set('masked', 1);
  if (pinned) state.set('on', `${pinned[0]}${pinned[1]}`);
  history.replaceState(null, '', `#${state}`);
}

async function restore() {
  const state = new URLSearchParams(location.hash.slice(1));
  $('query').value = state.get('q') || '';
  for (const id of ['result', 'kind']) {
    const value = state.get(id) || '';
    $(id).value = [...$(id).options].some(o => o.value === value) ? value : '';
  }
  const layer = views.findIndex(view => view.name === state.get('layer'));
  const last = views.findLastIndex(view => view.name.endsWith('all four'));
  $('layer').value = layer < 0 ? last : layer;
  const head = /^\d+$/.test(state.get('head')) ? Number(state.get('head')) - 1 : -1;
  $('head').value = head < $('head').options.length - 1 ? head : -1;
  $('masked').checked = state.get('masked') === '1';
  search();
  const pair = /^\d+$/.test(state.get('pair')) ? Number(state.get('pair')) : hits[0];
  if (!page.examples[pair]) return;
  pinned = null;
  const on = /^(words|objects)(\d+)$/.exec(state.get('on') || '');
  const block = await blockOf(page.examples[pair].image);
  const counts = {
    words: block.sentences[page.examples[pair].sentence].tokens.length,
    objects: block.boxes.length,
  };
  if (on && Number(on[2]) < counts[on[1]]) pinned = [on[1], Number(on[2])];
  await choose(pair, true);
}

function showHead() {
  $('name').textContent = `${page.run}, step ${number(page.step)}`;
  const { heads } = page;
  const absent = [['answers', 'answers'], ['matching', 'matching'], ['words', 'masked words'],
    ['objects', 'object labels']].filter(([key]) => !heads[key]).map(([, name]) => name);
  $('facts').textContent = [
    `${page.data}: ${counted(page.examples.length, 'pair')} of ${number(page.of[1])}`,
    page.checkpoint, `trained on ${page.objectives.join(', ')}`,
    ...(absent.length ? [`without ${absent.join(', ')}`] : []),
  ].join(' · ');
  const kinds = new Map();
  page.examples.forEach(e => kinds.set(e.kind, (kinds.get(e.kind) || 0) + 1));
  $('kind').append(el('option', { value: '' }, 'all kinds'), ...[...kinds]
    .sort((a, b) => b[1] - a[1]).map(([kind, n]) => el('option', { value: kind }, `${kind} (${n})`)));
  views = viewsOf(page.layers);
  let group = null, of;
  views.forEach((view, i) => {
    const title = view.cross ? `cross-modality layer ${view.cross}` : view.name.replace(/ \d+$/, '');
    if (title !== of) {
      group = el('optgroup', { label: title });
      $('layer').append(group);
      of = title;
    }
    group.append(el('option', { value: i }, view.name));
  });
  $('head').append(el('option', { value: -1 }, 'mean of all'),
    ...Array.from({ length: page.attention_heads }, (_, h) => el('option', { value: h }, h + 1)));
}

async function load() {
  elements = [...document.querySelectorAll('script.image')];
  page = JSON.parse(utf8(await inflate(document.querySelector('script.index'))));
  showHead();
  await restore();
}

let typing;
$('query').oninput = $('result').oninput = $('kind').oninput = () => {
  clearTimeout(typing);
  typing = setTimeout(() => { search(); keep(); }, 120);
};
$('layer').oninput = $('head').oninput = () => { shade(pinned); keep(); };
$('masked').oninput = () => { showPair(); keep(); };
$('bar').onsubmit = $('controls').onsubmit = event => event.preventDefault();
window.onhashchange = restore;

load().catch(error => { $('accuracy').textContent = `This page cannot be shown: ${error}`; });
