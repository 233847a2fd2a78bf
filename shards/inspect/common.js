'use strict';
// What every page begins with. Text of the data goes into a page by `textContent` alone.

const $ = id => document.getElementById(id);
const number = n => n.toLocaleString('en-US');
const counted = (n, what) => `${number(n)} ${what}${n === 1 ? '' : 's'}`;
const percent = share => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

/** An element with some properties, holding texts and elements. */
function el(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

async function inflate(element) {
  const packed = atob(element.textContent);
  const bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  element.remove();  // its memory with it
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
  return new Response(stream).arrayBuffer();
}

const utf8 = bytes => new TextDecoder().decode(bytes);

/** The header of a block, as `with_header` writes it, and where what follows begins. */
function headed(buffer) {
  const size = new DataView(buffer).getUint32(0, true);
  return [JSON.parse(utf8(new Uint8Array(buffer, 4, size))), 4 + size];
}

/** Lower case, with every letter where it was. */
function folded(text) {
  const low = text.replace(/\u0130/g, 'i').toLowerCase();
  return low.length === text.length ? low : text;
}

let words = [];  // that are searched for

/** Text with the words that are searched for marked. */
function marked(text) {
  const low = folded(text), out = [];
  for (let at = 0; at < text.length;) {
    let begin = text.length, end = begin;
    for (const word of words) {
      const i = low.indexOf(word, at);
      if (i >= 0 && i < begin) { begin = i; end = i + word.length; }
    }
    if (begin > at) out.push(text.slice(at, begin));
    if (end > begin) out.push(el('mark', {}, text.slice(begin, end)));
    at = end;
  }
  return out;
}

const color = i => `hsl(${(i * 137.5) % 360} 75% 58%)`;
