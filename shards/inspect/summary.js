// The page's second view: what is in the data set, as bars.

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
  const [noun, one, many] = page.parts > 1 ? ['record', 'a record', 'records of two pictures']
    : ['image', 'an image', 'images'];
  const section = (title, ...figures) =>
    [el('h2', {}, title), el('div', { className: 'figures' }, ...figures)];
  const sources = tables.sources.map(s => [s.source, s.sentences]);
  const all = section(`All ${number(summary.images)} ${many} and ${number(summary.pairs)} sentences`,
    bars('sentences by source', `pairs of ${noun} and sentence`, sources),
    histogram(`objects of ${one}`, tables.objects),
    histogram(`sentences of ${one}`, tables.sentences),
    histogram('tokens of a sentence', tables.tokens));
  const each = tables.sources.flatMap(s => section(s.source,
    ...(s.answers ? [bars('best answers',
      `${percent(s.answered / s.sentences)} of the sentences have one in the table; ten answers ` +
      `are ${percent(s.answers.coverage[10])} of these`, s.answers.top)] : []),
    histogram(`sentences of ${one}`, s.per_image),
    histogram('tokens of a sentence', s.tokens)));
  const values = sampled.features.values, powers = values.edges;
  const power = v => Math.abs(v) < 1e-9 ? '0' : Number(v.toPrecision(3)).toString();
  const drawn = section(`${sampled.seed === null ? 'All' : 'Of'} ${number(sampled.records)} records` +
    (sampled.seed === null ? '' : ` from ${number(sampled.shards)} of ${number(summary.shards)} ` +
      `shards, drawn with seed ${sampled.seed}`),
  bars('splits', `${noun}s`, sampled.splits.map(([split, n]) => [split || '(none)', n])),
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
