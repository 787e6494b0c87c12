// Runs the graphs. The page stays responsive, because all of this happens in a worker.
//
// It takes { job, kind: "draw" or "photograph", ... } and posts { job, kind, ... } back: "progress" while files load,
// "row" after each row of a drawing, "done", or "error" with a sentence.
import * as ort from "./runtime/ort.wasm.bundle.min.mjs";
import { Tokenizer } from "./runtime/tokenizers.min.mjs";

const WASM = "runtime/ort-wasm-simd-threaded.wasm";
const MAX_IDS = 6144; // 768 x 512 pixels at f = 8. Attention takes 8 bytes per pair of ids.

// By these, things that the model cannot draw are told from other words, as `KnownObjects` of the library does.
const LONGEST_NAME = 4; // words
const PURPOSES = ["for", "like"]; // "three carrots for the soup", "red like wine": what follows need not be drawn
const DETERMINERS = ["a", "an", "the", "my", "our", "your", "his", "her", "their", "some"];

// Threads need memory that is shared, which browsers allow only where the host isolates the page.
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;

const newest = {}; // newest job of each kind: an older drawing stops at its next row
let queue = Promise.resolve();

onmessage = ({ data }) => {
  newest[data.kind] = data.job;
  queue = queue.then(() => work(data));
};

async function work(request) {
  if (newest[request.kind] !== request.job) return;
  const post = (message) => postMessage({ job: request.job, ...message });
  try {
    await loadSettings();
    if (request.kind === "draw") await draw(request, post);
    else await reconstruct(request, post);
  } catch (error) {
    post({ kind: "error", message: error.message ?? String(error) });
  }
}

// Files and sessions --------------------------------------------------------------------------------------------------

const files = new Map(); // path -> promise of its bytes
const sessions = new Map(); // path of a graph -> promise of its session
let settings = null;
let tokenizer = null;
let knownObjects = null;

async function loadSettings() {
  settings ??= JSON.parse(new TextDecoder().decode(await download("settings.json")));
}

async function prepare(paths, post) {
  const wanted = [WASM, ...paths];
  const total = wanted.reduce((sum, path) => sum + settings.files[path], 0);
  const received = {};
  const report = (path, bytes) => {
    received[path] = bytes;
    const loaded = Object.values(received).reduce((sum, count) => sum + count, 0);
    post({ kind: "progress", loaded, total });
  };
  await Promise.all(wanted.map((path) => fileOf(path, report)));
  ort.env.wasm.wasmBinary ??= await fileOf(WASM);
}

function fileOf(path, report) {
  if (!files.has(path)) {
    const promise = download(path, report);
    promise.catch(() => files.delete(path)); // so that another try downloads it again
    files.set(path, promise);
  }
  return files.get(path);
}

async function readJson(path) {
  return JSON.parse(new TextDecoder().decode(await fileOf(path)));
}

async function download(path, report = () => {}) {
  const response = await fetch(path).catch(() => null);
  if (!response?.ok) throw Error(`The file “${path}” could not be loaded. Reload the page, or copy the whole folder again.`);
  const chunks = [];
  let length = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    chunks.push(value);
    length += value.length;
    report(path, length);
  }
  const bytes = new Uint8Array(length);
  let start = 0;
  for (const chunk of chunks) {
    bytes.set(chunk, start);
    start += chunk.length;
  }
  return bytes;
}

async function run(path, inputs) {
  if (!sessions.has(path)) {
    const bytes = await fileOf(path);
    sessions.set(path, ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] }));
    files.set(path, Promise.resolve(null)); // the session holds the weights now
  }
  const session = await sessions.get(path);
  return session.run(inputs);
}

const integers = (values, dims) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
const floats = (values, dims) => new ort.Tensor("float32", values, dims);

// Drawing -------------------------------------------------------------------------------------------------------------

async function draw({ job, caption, seed, guidance, temperature }, post) {
  const model = settings.drawing;
  const paths = ["drawing/tokenizer.json", "drawing/tokenizer_config.json", "drawing/row.onnx", "drawing/decoder.onnx"];
  if (model.objects.length) paths.push("drawing/known_objects.json");
  await prepare(paths, post);
  const undrawable = await undrawableThings(caption, model);
  const question = model.before + caption + model.after;
  const written = model.rewrites ? await rewrite(question, model) : "";
  const withCaption = await tokensOf(question + written + model.begin_image, model.add_special_tokens);
  const noCaption = model.before + model.no_condition + model.after + model.begin_image;
  const withoutCaption = await tokensOf(noCaption, model.add_special_tokens);
  const length = Math.max(withCaption.length, withoutCaption.length);
  if (length > model.max_prompt_tokens) {
    throw Error(`This text has ${length} tokens, but at most ${model.max_prompt_tokens} fit. Shorten it.`);
  }
  const pads = [length - withCaption.length, length - withoutCaption.length];
  const padded = [withCaption, withoutCaption].map((tokens, row) => [...Array(pads[row]).fill(model.pad_token), ...tokens]);

  let tokens = integers(padded.flat(), [2, length]);
  let past = emptyPast(model);
  const random = randomNumbers(seed);
  const began = performance.now();
  const ids = [];
  for (let row = 1; row <= model.rows && newest.draw === job; row++) {
    const result = await run("drawing/row.onnx", {
      tokens,
      past,
      pads: integers(pads, [2]),
      guidance: floats([guidance], []),
      temperature: floats([temperature], []),
      top_k: integers([model.top_k], [1]),
      noise: floats(gumbelNoise(random, model.columns * model.codebook_size), [model.columns, model.codebook_size]),
    });
    tokens = result.next_tokens;
    past = result.next_past;
    ids.push(...Array.from(result.ids.data, Number));
    const image = await decode("drawing/decoder.onnx", ids, row, model);
    const seconds = (performance.now() - began) / 1000;
    post({ kind: row < model.rows ? "row" : "done", ids, rows: row, columns: model.columns, image, written, undrawable, seconds });
    await new Promise((resolve) => setTimeout(resolve)); // lets a newer request in
  }
}

// Keys and values of no tokens.
function emptyPast(model) {
  return floats(new Float32Array(0), [model.layers, 2, 2, model.heads, 0, model.head_dim]);
}

// The caption that the model writes before it draws, as `ImageChats.rewrite` does. Both rows of the graph hold the question.
async function rewrite(question, model) {
  let tokens = await tokensOf(question, model.add_special_tokens);
  let past = emptyPast(model);
  const written = [];
  while (written.length < model.max_rewritten_tokens) {
    const result = await run("drawing/row.onnx", {
      tokens: integers([...tokens, ...tokens], [2, tokens.length]),
      past,
      pads: integers([0, 0], [2]),
      guidance: floats([1], []),
      temperature: floats([0], []),
      top_k: integers([1], [1]),
      noise: floats(new Float32Array(model.codebook_size), [1, model.codebook_size]),
    });
    const token = Number(result.text_tokens.data[0]);
    if (token === model.begin_token || token === model.end_token) break;
    written.push(token);
    tokens = [token];
    past = result.next_past;
  }
  return tokenizer.decode(written, { skip_special_tokens: true }).trim();
}

async function tokensOf(text, addSpecialTokens) {
  if (!tokenizer) {
    const content = await readJson("drawing/tokenizer.json");
    tokenizer = new Tokenizer(content, await readJson("drawing/tokenizer_config.json"));
  }
  return tokenizer.encode(text, { add_special_tokens: addSpecialTokens }).ids;
}

// Words for things that the model cannot draw, in the order of the text; none if the model does not say what it knows.
async function undrawableThings(caption, model) {
  if (!model.objects.length) return [];
  if (!knownObjects) {
    const entries = await readJson("drawing/known_objects.json");
    knownObjects = { names: new Set(entries.names), things: new Set(entries.things) };
  }
  const words = caption.toLowerCase().replaceAll("’", "'").match(/[a-z]+(?:'[a-z]+)?/g) ?? [];
  const undrawable = [];
  let position = 0;
  while (position < words.length) {
    const length = knownLength(words.slice(position));
    if (length) {
      position += length;
      continue;
    }
    const word = words[position];
    const isThing = singulars(word).some((form) => knownObjects.things.has(form));
    if (isThing && !hasPurpose(words.slice(0, position)) && !undrawable.includes(word)) undrawable.push(word);
    position += 1;
  }
  return undrawable;
}

// Number of words of the longest known name with which words start, or 0.
function knownLength(words) {
  for (let length = Math.min(LONGEST_NAME, words.length); length > 0; length--) {
    const start = words.slice(0, length - 1);
    const names = singulars(words[length - 1]).map((form) => [...start, form].join(" "));
    if (names.some((name) => knownObjects.names.has(name))) return length;
  }
  return 0;
}

// A word, and nouns of which it may be the plural.
function singulars(word) {
  const forms = [word];
  if (word.endsWith("ies")) forms.push(`${word.slice(0, -3)}y`);
  if (word.endsWith("ves")) forms.push(`${word.slice(0, -3)}f`);
  if (word.endsWith("es")) forms.push(word.slice(0, -2));
  if (word.endsWith("s")) forms.push(word.slice(0, -1));
  return forms;
}

// Whether the words before a noun say that it is what the picture is for, or what something is like.
function hasPurpose(words) {
  const beforeDeterminer = DETERMINERS.includes(words.at(-1)) ? words.slice(0, -1) : words;
  return PURPOSES.includes(beforeDeterminer.at(-1));
}

// Gumbel noise in float32: adding it to logits before the argmax samples from their softmax.
function gumbelNoise(random, count) {
  const noise = new Float32Array(count);
  for (let index = 0; index < count; index++) noise[index] = -Math.log(-Math.log(random()));
  return noise;
}

// Uniform numbers in (0, 1) from a seed of 32 bits, by the generator mulberry32.
function randomNumbers(seed) {
  let state = seed | 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let value = Math.imul(state ^ (state >>> 15), state | 1);
    value ^= value + Math.imul(value ^ (value >>> 7), value | 61);
    return (((value ^ (value >>> 14)) >>> 0) + 0.5) / 4294967296;
  };
}

// Photographs ---------------------------------------------------------------------------------------------------------

async function reconstruct({ bitmap }, post) {
  await prepare(["photographs/encoder.onnx", "photographs/decoder.onnx"], post);
  const model = settings.photographs;
  const original = pixelsOf(bitmap, MAX_IDS * model.f ** 2);
  const { width, height } = original;
  post({ kind: "progress", step: `Encoding ${width} × ${height} pixels …` });
  const began = performance.now();
  const sample = floats(planesOf(original, model), [1, 3, height, width]);
  const encoded = await run("photographs/encoder.onnx", { sample });
  const encodeSeconds = (performance.now() - began) / 1000;
  const [, rows, columns] = encoded.ids.dims;
  const ids = Array.from(encoded.ids.data, Number);
  post({ kind: "progress", step: `Decoding ${rows} × ${columns} ids …` });
  const image = await decode("photographs/decoder.onnx", ids, rows, model);
  const decodeSeconds = (performance.now() - began) / 1000 - encodeSeconds;
  const shrunk = bitmap.width !== width ? [bitmap.width, bitmap.height] : null;
  bitmap.close();
  post({ kind: "done", ids, rows, columns, image, original, psnr: psnr(original, image), encodeSeconds, decodeSeconds, shrunk });
}

// Pixels of a bitmap, with transparent parts on white, made smaller if there are more than `maxPixels`.
function pixelsOf(bitmap, maxPixels) {
  const scale = Math.min(1, Math.sqrt(maxPixels / (bitmap.width * bitmap.height)));
  const width = Math.max(1, Math.floor(bitmap.width * scale));
  const height = Math.max(1, Math.floor(bitmap.height * scale));
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

// Red, green and blue as three planes in the model's range of values.
function planesOf({ data, width, height }, model) {
  const [black, white] = model.pixel_range;
  const size = width * height;
  const planes = new Float32Array(3 * size);
  for (let pixel = 0; pixel < size; pixel++) {
    for (let channel = 0; channel < 3; channel++) {
      planes[channel * size + pixel] = black + (data[4 * pixel + channel] / 255) * (white - black);
    }
  }
  return planes;
}

async function decode(path, ids, rows, model) {
  const columns = ids.length / rows;
  const { sample } = await run(path, { ids: integers(ids, [1, rows, columns]) });
  const [, , height, width] = sample.dims;
  const [black, white] = model.pixel_range;
  const size = width * height;
  const image = new ImageData(width, height);
  for (let pixel = 0; pixel < size; pixel++) {
    for (let channel = 0; channel < 3; channel++) {
      image.data[4 * pixel + channel] = ((sample.data[channel * size + pixel] - black) / (white - black)) * 255;
    }
    image.data[4 * pixel + 3] = 255;
  }
  return image;
}

// In dB, over the pixels of the original. The reconstruction may be larger, by whole ids.
function psnr(original, image) {
  let sum = 0;
  for (let y = 0; y < original.height; y++) {
    for (let x = 0; x < original.width; x++) {
      const place = 4 * (y * original.width + x);
      const decoded = 4 * (y * image.width + x);
      for (let channel = 0; channel < 3; channel++) {
        sum += (original.data[place + channel] - image.data[decoded + channel]) ** 2;
      }
    }
  }
  return 10 * Math.log10((255 ** 2 * 3 * original.width * original.height) / sum);
}
