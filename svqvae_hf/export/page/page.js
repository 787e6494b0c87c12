// What visitors see and do. `worker.js` runs the graphs.
const MAX_MEGAPIXELS = 50; // decoding a file takes 4 bytes per pixel
const NO_PICTURE = "is not a picture that this browser can read. Choose a JPEG, PNG or WebP file.";

const find = (selector, inside = document) => inside.querySelector(selector);
const worker = new Worker("worker.js", { type: "module" });
const jobs = new Map(); // number of a job -> what to do with its messages
let jobCount = 0;

worker.onmessage = ({ data }) => jobs.get(data.job)?.(data);
worker.onerror = () => {
  const message = "The page could not start. Its folder “runtime” may be missing, or this browser is too old.";
  for (const note of document.querySelectorAll(".note")) say(note.parentElement, message, true);
};

// Starts a job of a section. Messages of its jobs before are ignored from now on.
function start(section, request, onMessage, transfer = []) {
  const job = ++jobCount;
  jobs.delete(section.job);
  section.job = job;
  say(section.result, "Starting …");
  jobs.set(job, (message) => {
    if (message.kind === "progress") return showProgress(section.result, message);
    find("progress", section.result).hidden = true;
    if (message.kind === "error") return fail(section, message.message);
    onMessage(message);
  });
  worker.postMessage({ job, ...request }, transfer);
}

// Says what is wrong, instead of a result. The result before is hidden, because it would belong to another request.
function fail(section, text) {
  jobs.delete(section.job);
  say(section.result, text, true);
  for (const element of section.shown) element.hidden = true;
}

function say(result, text, isWrong = false) {
  const note = find(".note", result);
  note.textContent = text;
  note.classList.toggle("wrong", isWrong);
  if (isWrong) find("progress", result).hidden = true;
}

function showProgress(result, { loaded, total, step }) {
  const bar = find("progress", result);
  bar.hidden = false;
  if (step || loaded >= total) {
    bar.removeAttribute("value");
    say(result, step ?? "Starting …");
    return;
  }
  bar.max = total;
  bar.value = loaded;
  say(result, `Loading the model, once: ${megabytes(loaded)} of ${megabytes(total)} MB …`);
}

const megabytes = (bytes) => (bytes / 1e6).toFixed(1);

function put(canvas, image, width = image.width, height = image.height) {
  canvas.width = width; // sides of a reconstruction that are longer than the photograph's are cropped
  canvas.height = height;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// Drawing -------------------------------------------------------------------------------------------------------------

function setUpDrawing(model) {
  const panel = new IdsPanel(find("#drawing .ids"), model);
  const picture = find("#drawing .picture");
  const another = find("#another");
  const section = { result: find("#drawing-result"), job: 0, shown: [panel.place, picture, another] };
  const caption = find("#caption");
  find("#drawing").hidden = false;
  caption.value = model.examples[0] ?? "";
  for (const name of ["guidance", "temperature"]) {
    const slider = find(`#${name}`);
    slider.max = Math.max(slider.max, model[name]);
    slider.value = model[name];
    const show = () => (find(`#${name}-value`).textContent = Number(slider.value).toFixed(2).replace(/0$/, ""));
    slider.addEventListener("input", show);
    show();
  }
  for (const text of model.examples) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => {
      caption.value = text;
      draw();
    });
    find("#captions").append(button);
  }
  if (model.objects.length) {
    find("#limits summary").textContent = `The ${model.objects.length} things that it can draw`;
    find("#objects").textContent = `${model.objects.join(", ")}.`;
    find("#limits").hidden = false;
  }
  if (model.grounds.length) {
    find("#grounds").textContent = `Backgrounds: ${model.grounds.join(", ")}.`;
    find("#grounds").hidden = false;
  }
  another.addEventListener("click", () => {
    find("#seed").value = Number(find("#seed").value) + 1;
    draw();
  });
  find("#ask").addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
  say(section.result, "Press Draw. The first picture takes longer, because the page loads the model.");

  function draw() {
    const seed = Number(find("#seed").value);
    if (!find("#seed").checkValidity()) return fail(section, "The seed must be a whole number from 0 to 4,294,967,295.");
    if (!/[\p{L}\p{N}\p{S}]/u.test(caption.value)) return fail(section, "Type what to draw, or press an example.");
    const request = {
      kind: "draw",
      caption: caption.value,
      seed,
      guidance: Number(find("#guidance").value),
      temperature: Number(find("#temperature").value),
    };
    start(section, request, (message) => show(message, request));
  }

  function show({ kind, image, ids, rows, columns, written, undrawable, seconds }, request) {
    if (rows === 1) {
      picture.width = columns * model.f;
      picture.height = model.rows * model.f;
      picture.style.aspectRatio = `${columns} / ${model.rows}`;
    }
    picture.hidden = false;
    another.hidden = false;
    picture.getContext("2d").putImageData(image, 0, 0);
    picture.setAttribute("aria-label", `Picture of ${request.caption}`);
    const isDone = kind === "done";
    const progress = isDone ? `Drawn in ${seconds.toFixed(1)} s, seed ${request.seed}.` : `Row ${rows} of ${model.rows} …`;
    say(section.result, progress + understoodAs(written) + cannotDraw(undrawable));
    panel.show({ ids, rows, columns, image, allRows: model.rows, name: request.caption, isWhole: isDone });
  }
}

const quoted = (words) => words.map((word) => `“${word}”`).join(", ");

function understoodAs(written) {
  return written ? ` The model understood: “${written}”.` : "";
}

function cannotDraw(things) {
  return things.length ? ` It cannot draw ${quoted(things)}.` : "";
}

// Photographs ---------------------------------------------------------------------------------------------------------

function setUpPhotographs(model) {
  const result = find("#photograph-result");
  const panel = new IdsPanel(find("#photographs .ids"), model);
  const compared = find(".compared", result);
  const figures = find(".figures", result);
  const figuresHint = find(".figures-hint", result);
  const section = { result, job: 0, shown: [panel.place, compared, figures, figuresHint] };
  say(result, "The first photograph takes longer, because the page loads the model.");
  const share = find("input", compared);
  find("#photographs").hidden = false;
  share.addEventListener("input", slide);

  find("#photograph").addEventListener("change", (event) => {
    read(event.target.files[0]);
    event.target.value = ""; // so that the same file can be chosen again
  });
  addEventListener("dragover", (event) => {
    event.preventDefault();
    find("#drop").classList.add("over");
  });
  addEventListener("dragleave", () => find("#drop").classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    find("#drop").classList.remove("over");
    if (event.dataTransfer.files.length) read(event.dataTransfer.files[0]);
    else fail(section, "What you dropped is not a file. Save the picture first, then drop its file.");
  });
  addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
    if (file) read(file);
    else if (event.target.id !== "caption") fail(section, "There is no picture in the clipboard.");
  });
  if (model.example) {
    find("#example").hidden = false;
    find("#example").addEventListener("click", async () => {
      const response = await fetch(model.example).catch(() => null);
      if (!response?.ok) return fail(section, `The file “${model.example}” could not be loaded. Reload the page.`);
      read(new File([await response.blob()], model.example));
    });
  }

  async function read(file) {
    if (!file) return;
    const { bitmap, wrong } = await openPicture(file);
    if (wrong) return fail(section, wrong);
    start(section, { kind: "photograph", bitmap }, (message) => show(message, file.name), [bitmap]);
  }

  function show({ ids, rows, columns, image, original, psnr, encodeSeconds, decodeSeconds, shrunk }, name) {
    const { width, height } = original;
    put(find(".original", compared), original);
    put(find(".reconstruction", compared), image, width, height);
    compared.hidden = false;
    slide();
    const bits = (ids.length * Math.log2(model.codebook_size)) / (width * height);
    showFigures({
      size: `${width} × ${height} pixels`,
      ids: `${columns} × ${rows} = ${ids.length.toLocaleString("en")}`,
      PSNR: `${psnr.toFixed(2)} dB`,
      "bits per pixel": bits.toFixed(3),
      time: `${encodeSeconds.toFixed(1)} s to encode, ${decodeSeconds.toFixed(1)} s to decode`,
    });
    const made = shrunk ? ` It was made smaller, from ${shrunk.join(" × ")} pixels, so that it fits the memory of a page.` : "";
    say(section.result, `${name}: slide over the picture to compare.${made}`);
    panel.show({ ids, rows, columns, image, allRows: rows, name, isWhole: true, width, height });
  }

  function showFigures(entries) {
    figures.replaceChildren();
    for (const [name, value] of Object.entries(entries)) {
      const figure = document.createElement("div");
      const term = document.createElement("dt");
      const description = document.createElement("dd");
      term.textContent = name;
      description.textContent = value;
      figure.append(term, description);
      figures.append(figure);
    }
    figures.hidden = false;
    figuresHint.hidden = false;
  }

  function slide() {
    find(".original", compared).style.clipPath = `inset(0 ${100 - share.value}% 0 0)`;
    find(".line", compared).style.left = `${share.value}%`;
  }
}

// The bitmap of a file, upright and with the values that are stored, or a sentence about what is wrong with it.
async function openPicture(file) {
  const wrong = { wrong: `“${file.name}” ${NO_PICTURE}` };
  const element = new Image();
  element.src = URL.createObjectURL(file);
  try {
    await new Promise((resolve, reject) => {
      element.onload = resolve;
      element.onerror = reject;
    });
    const megapixels = (element.naturalWidth * element.naturalHeight) / 1e6;
    if (megapixels > MAX_MEGAPIXELS) {
      const size = `${Math.round(megapixels)} megapixels`;
      return { wrong: `“${file.name}” has ${size}, but at most ${MAX_MEGAPIXELS} fit the memory of a page. Make it smaller.` };
    }
    const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" }); // Pillow ignores profiles, too
    return { bitmap };
  } catch {
    return wrong;
  } finally {
    URL.revokeObjectURL(element.src);
  }
}

// Grid of ids ---------------------------------------------------------------------------------------------------------

const LEGIBLE_SIDE = 48; // pixels of a cell that has room for its number
const AROUND = 5; // cells in a row of the enlarged part
const DARK = 0.45; // brightness of the cells of other ids than the one that is pointed at
const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

class IdsPanel {
  constructor(place, model) {
    this.place = place;
    this.model = model;
    place.append(find("#ids-panel").content.cloneNode(true));
    this.cells = find(".cells", place);
    this.around = find(".around", place);
    const codes = model.codebook_size.toLocaleString("en");
    find(".explanation", place).textContent =
      `Each cell stands for ${model.f} × ${model.f} pixels. Its id is the number of one of ${codes} patterns that the ` +
      "tokenizer has learned. Its colour is the mean colour of that id in this picture.";
    this.cells.addEventListener("pointermove", (event) => this.choose(this.cellAt(event), true));
    this.cells.addEventListener("pointerdown", (event) => this.choose(this.cellAt(event), true));
    this.cells.addEventListener("pointerleave", () => this.choose(this.chosen, false));
    this.cells.addEventListener("keydown", (event) => this.move(event));
    this.cells.addEventListener("blur", () => this.choose(this.chosen, false));
    find(".copy", place).addEventListener("click", (event) => this.copy(event.target));
    find(".save", place).addEventListener("click", () => save(this.tokenFile(), `${fileStem(this.grid.name)}.safetensors`));
    find(".picture-file", place).addEventListener("click", () => this.savePicture());
  }

  // `width` and `height` are those of the photograph, if the grid is of one.
  show(grid) {
    const { columns, rows, allRows, isWhole } = grid;
    const { f } = this.model;
    this.grid = { width: columns * f, height: rows * f, ...grid };
    this.side = Math.max(4, Math.min(72, Math.floor(1080 / columns)));
    this.colours = meanColours(this.grid, f);
    this.cells.width = columns * this.side;
    this.cells.height = allRows * this.side;
    this.bright = new OffscreenCanvas(this.cells.width, this.cells.height);
    this.dark = new OffscreenCanvas(this.cells.width, this.cells.height);
    for (let cell = 0; cell < this.grid.ids.length; cell++) {
      this.paint(this.bright.getContext("2d"), cell, 1);
      this.paint(this.dark.getContext("2d"), cell, DARK);
    }
    this.around.hidden = this.side >= LEGIBLE_SIDE; // the grid itself has numbers
    this.place.hidden = false;
    for (const button of this.place.querySelectorAll("button")) button.disabled = !isWhole;
    this.choose(Math.floor(rows / 2) * columns + Math.floor(columns / 2), false);
  }

  // Paints a cell in its place of the grid, with its colour times `brightness`.
  paint(context, cell, brightness) {
    const { ids, columns } = this.grid;
    const left = (cell % columns) * this.side;
    const top = Math.floor(cell / columns) * this.side;
    this.paintId(context, ids[cell], left, top, this.side, brightness);
  }

  paintId(context, id, left, top, side, brightness) {
    const [red, green, blue] = this.colours.get(id).map((value) => value * brightness);
    context.fillStyle = `rgb(${red} ${green} ${blue})`;
    context.fillRect(left, top, side, side);
    if (side < LEGIBLE_SIDE) return;
    context.fillStyle = 0.3 * red + 0.6 * green + 0.1 * blue > 140 ? "black" : "white";
    const digits = String(this.model.codebook_size).length;
    context.font = `${side / Math.max(3, 0.72 * digits)}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillText(id, left + side / 2, top + side / 2);
  }

  // The cell and its neighbours, large enough for their numbers.
  paintAround(cell) {
    const { ids, columns, rows } = this.grid;
    const chosenRow = Math.floor(cell / columns);
    const chosenColumn = cell % columns;
    const reach = Math.floor(AROUND / 2);
    this.around.width = AROUND * LEGIBLE_SIDE;
    this.around.height = AROUND * LEGIBLE_SIDE;
    const context = this.around.getContext("2d");
    for (let row = chosenRow - reach; row <= chosenRow + reach; row++) {
      for (let column = chosenColumn - reach; column <= chosenColumn + reach; column++) {
        if (clamp(row, rows) !== row || clamp(column, columns) !== column) continue; // outside the picture
        const left = (column - chosenColumn + reach) * LEGIBLE_SIDE;
        const top = (row - chosenRow + reach) * LEGIBLE_SIDE;
        this.paintId(context, ids[row * columns + column], left, top, LEGIBLE_SIDE, 1);
      }
    }
    frame(context, reach * LEGIBLE_SIDE, reach * LEGIBLE_SIDE, LEGIBLE_SIDE);
  }

  // Names a cell's id. While it is pointed at, the cells of other ids are darker.
  choose(cell, isPointed) {
    const { ids, columns, image } = this.grid;
    const context = this.cells.getContext("2d");
    this.chosen = cell;
    context.clearRect(0, 0, this.cells.width, this.cells.height);
    context.drawImage(isPointed ? this.dark : this.bright, 0, 0);
    let uses = 0;
    ids.forEach((id, place) => {
      if (id !== ids[cell]) return;
      uses += 1;
      if (isPointed) this.paint(context, place, 1);
    });
    const row = Math.floor(cell / columns);
    const column = cell % columns;
    if (isPointed) frame(context, column * this.side, row * this.side, this.side);
    if (!this.around.hidden) this.paintAround(cell);
    const { f } = this.model;
    const look = find(".look", this.place);
    look.width = f;
    look.height = f;
    look.getContext("2d").putImageData(image, -column * f, -row * f);
    find(".id", this.place).textContent = `id ${ids[cell]}`;
    find(".place", this.place).textContent = `row ${row + 1}, column ${column + 1}`;
    find(".uses", this.place).textContent = `in ${uses} of ${ids.length.toLocaleString("en")} cells`;
  }

  cellAt(event) {
    const box = this.cells.getBoundingClientRect();
    const { columns, rows, allRows } = this.grid;
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * allRows);
    return clamp(row, rows) * columns + clamp(column, columns);
  }

  move(event) {
    if (!(event.key in STEPS)) return;
    event.preventDefault();
    const [down, right] = STEPS[event.key];
    const { columns, rows } = this.grid;
    const row = clamp(Math.floor(this.chosen / columns) + down, rows);
    const column = clamp((this.chosen % columns) + right, columns);
    this.choose(row * columns + column, true);
  }

  async copy(button) {
    const { ids, columns, rows } = this.grid;
    const lines = Array.from({ length: rows }, (_, row) => ids.slice(row * columns, (row + 1) * columns).join(" "));
    const isCopied = await navigator.clipboard?.writeText(lines.join("\n")).then(() => true, () => false);
    button.textContent = isCopied ? "Copied" : "This browser does not allow it";
    setTimeout(() => (button.textContent = "Copy ids"), 2000);
  }

  async savePicture() {
    const { image, width, height, name } = this.grid;
    const canvas = new OffscreenCanvas(width, height);
    canvas.getContext("2d").putImageData(image, 0, 0);
    save(await canvas.convertToBlob({ type: "image/png" }), `${fileStem(name)}.png`);
  }

  // A safetensors file, as `save_tokens` of the library writes it.
  tokenFile() {
    const { ids, rows, columns, width, height } = this.grid;
    const stored = this.model.codebook_size > 65536 ? Int32Array.from(ids) : Uint16Array.from(ids);
    const bytes = new Uint8Array(stored.buffer); // little-endian on every machine that runs browsers
    const record = this.model.token_record.replace("WIDTH", width).replace("HEIGHT", height);
    const checksum = crc32([new TextEncoder().encode(record), bytes]);
    const header = JSON.stringify({
      __metadata__: { svqvae_tokens: `${record.slice(0, -1)}, "crc32": ${checksum}}` },
      ids_0: { dtype: stored instanceof Uint16Array ? "U16" : "I32", shape: [rows, columns], data_offsets: [0, bytes.length] },
    });
    const length = 8 * Math.ceil(header.length / 8); // all characters are ASCII
    const size = new DataView(new ArrayBuffer(8));
    size.setBigUint64(0, BigInt(length), true);
    return new Blob([size.buffer, header.padEnd(length), bytes], { type: "application/octet-stream" });
  }
}

// A square that is visible on any colour.
function frame(context, left, top, side) {
  const width = Math.max(2, side / 16);
  context.lineWidth = width;
  context.strokeStyle = "black";
  context.strokeRect(left + width / 2, top + width / 2, side - width, side - width);
  context.strokeStyle = "white";
  context.strokeRect(left - width / 2, top - width / 2, side + width, side + width);
}

// The mean colour of each id over its cells in a picture.
function meanColours({ ids, columns, image }, f) {
  const sums = new Map();
  ids.forEach((id, cell) => {
    const sum = sums.get(id) ?? [0, 0, 0, 0];
    const left = (cell % columns) * f;
    const top = Math.floor(cell / columns) * f;
    for (let y = top; y < top + f; y++) {
      for (let x = left; x < left + f; x++) {
        const place = 4 * (y * image.width + x);
        sum[0] += image.data[place];
        sum[1] += image.data[place + 1];
        sum[2] += image.data[place + 2];
      }
    }
    sum[3] += f * f;
    sums.set(id, sum);
  });
  const means = new Map();
  for (const [id, [red, green, blue, count]] of sums) means.set(id, [red / count, green / count, blue / count].map(Math.round));
  return means;
}

const clamp = (index, count) => Math.max(0, Math.min(count - 1, index));
const fileStem = (name) => name.replace(/\.\w+$/, "").replace(/[^\p{L}\p{N}]+/gu, "_") || "picture";

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function crc32(parts) {
  let remainder = ~0;
  for (const part of parts) {
    for (const byte of part) {
      remainder ^= byte;
      for (let bit = 0; bit < 8; bit++) remainder = (remainder >>> 1) ^ (remainder & 1 ? 0xedb88320 : 0);
    }
  }
  return ~remainder >>> 0;
}

// Start ---------------------------------------------------------------------------------------------------------------

const settings = await fetch("settings.json").then((response) => response.json());
find("#starting").remove();
find("#version").textContent = `svqvae-hf ${settings.version}`;
find("#models").textContent = settings.models.map(({ name, license }) => `${name} (${license})`).join(", ");
if (settings.drawing) setUpDrawing(settings.drawing);
if (settings.photographs) setUpPhotographs(settings.photographs);
