// Attention of the chosen pair: which weights a view has, and shading by them.

const MOST = 3;  // boxes that are named while something looks at them
const SHADE = '31 111 235', VEIL = '0 0 0';

let views = [];

/** What can be looked through: each attention, and all four of a cross-modality layer as one.
 * `maps` has the layer's number by what looks and what is looked at. */
function viewsOf(layers) {
  const out = [];
  layers.forEach((layer, i) => {
    if (layer.cross && layers[i - 1]?.cross !== layer.cross) {
      const maps = { words: {}, objects: {} };
      layers.forEach((l, n) => { if (l.cross === layer.cross) maps[l.asks][l.asked] = n; });
      out.push({ name: `cross ${layer.cross}: all four`, cross: layer.cross, maps });
    }
    const maps = { words: {}, objects: {} };
    maps[layer.asks][layer.asked] = i;
    out.push({ name: layer.name, cross: layer.cross, maps });
  });
  return out;
}

/** The weights of a map as the model sees picture n, (head, query, key) -> number; head -1 is the
 * mean of all. */
function weightsOf(number, n) {
  const of = page.layers.slice(0, number).filter(
    layer => layer.of_image === page.layers[number].of_image).length;
  const maps = (page.layers[number].of_image ? shown.block : shown.sentence).maps[n];
  const [begin, heads, queries, keys] = maps[of], { bytes } = shown.block;
  const one = (head, query, key) =>
    (bytes[begin + (head * queries + query) * keys + key] / 255) ** 2;
  return (head, query, key) => {
    if (head >= 0) return one(head, query, key);
    let sum = 0;
    for (let h = 0; h < heads; h++) sum += one(h, query, key);
    return sum / heads;
  };
}

/** Numbers of a picture's objects. */
const placesOf = part => Array.from({ length: part.objects }, (_, i) => part.first + i);

/** What a word or an object looks at in the chosen view as the model sees picture n, or where only
 * that is there, what looks at it: for words and for this picture's objects, if any,
 * { weights, by }. Nothing for an object of another picture. */
function attentionOf([side, place], n) {
  const { maps } = views[Number($('layer').value)], head = Number($('head').value);
  const part = shown.block.parts[n], at = side === 'words' ? place : place - part.first;
  const counts = { words: shown.sentence.tokens.length, objects: part.objects }, out = {};
  if (at < 0 || at >= counts[side]) return out;
  for (const other of ['words', 'objects']) {
    const places = Array.from({ length: counts[other] }, (_, i) => i);
    const [row, column] = [maps[side][other], maps[other][side]];
    if (row !== undefined) {
      const weight = weightsOf(row, n);
      out[other] = { by: row, weights: places.map(i => weight(head, at, i)) };
    } else if (column !== undefined) {
      const weight = weightsOf(column, n);
      out[other] = { by: column, back: true, weights: places.map(i => weight(head, i, at)) };
    }
  }
  return out;
}

/** Shade words and objects by the attention of one of them; null: none. */
function shade(on) {
  const { parts } = shown.block, found = parts.map((_, n) => on ? attentionOf(on, n) : {});
  for (const element of document.querySelectorAll('#detail [data-part]')) {
    const side = element.dataset.word === undefined ? 'objects' : 'words';
    const n = Number(element.dataset.part), place = Number(element.dataset[side.slice(0, -1)]);
    const weights = found[n][side]?.weights;
    element.classList.toggle('on', Boolean(on) && on[0] === side && on[1] === place);
    shadeElement(element, side, weights, side === 'words' ? place : place - parts[n].first);
  }
  document.querySelectorAll('.stage').forEach((stage, n) => {
    stage.classList.toggle('looking', Boolean(found[n].objects));
    shadeStage(stage.querySelector('canvas'), found[n].objects?.weights, parts[n]);
  });
  $('told').textContent = on ? told(on, found.find(some => Object.keys(some).length) || {})
    : 'Point at a word or a box to see what it looks at; click to keep it.';
}

/** Shade a word, a box or a row of the table, which is number `at` of those with these weights. */
function shadeElement(element, side, weights, at) {
  const weight = weights?.[at];
  if (weight === undefined) delete element.dataset.weight;
  else element.dataset.weight = weight.toFixed(4);
  if (element.classList.contains('box')) {
    const top = weights && [...weights].sort((a, b) => b - a)[Math.min(MOST, weights.length) - 1];
    element.classList.toggle('most', weight !== undefined && weight >= top);
    return;
  }
  element.lastChild.textContent = weight === undefined ? '' : chance(weight);
  if (side === 'objects') return;
  const most = Math.max(...(weights || []), 1e-6);
  const strength = weight === undefined ? '' : (0.75 * weight / most).toFixed(3);
  element.style.background = strength && `rgb(${SHADE} / ${strength})`;
}

/** Light up what is looked at: each point as the box over it that has most of the attention. A
 * picture is veiled elsewhere, an empty layout is coloured there. */
function shadeStage(canvas, weights, part) {
  const pen = canvas.getContext('2d'), { width, height } = canvas;
  pen.clearRect(0, 0, width, height);
  if (!weights?.length) return;
  const most = Math.max(...weights, 1e-6), veiled = canvas.previousSibling !== null;
  const fill = (share, ...area) => {
    const strength = veiled ? 0.8 * (1 - share) : 0.75 * share;
    pen.clearRect(...area);
    pen.fillStyle = `rgb(${veiled ? VEIL : SHADE} / ${strength})`;
    pen.fillRect(...area);
  };
  fill(0, 0, 0, width, height);
  for (const i of weights.map((_, i) => i).sort((a, b) => weights[a] - weights[b])) {
    const [x1, y1, x2, y2] = shown.block.boxes[part.first + i];
    fill(weights[i] / most, x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height);
  }
}

function told([side, place], found) {
  const name = side === 'words' ? `“${shown.sentence.tokens[place]}”` : nameOf(place);
  const parts = Object.entries(found).map(([other, { by, back }]) => back
    ? `is looked at by ${other} (${page.layers[by].name})`
    : `looks at ${other} (${page.layers[by].name})`);
  const masked = $('masked').checked ? ', with nothing masked' : '';
  return parts.length ? `${name} ${parts.join(', ')}${masked}` : `${name} has no part in this layer`;
}
