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

// Starts a job of a section. Messages of the section's jobs before are ignored from now on.
function start(section, request, onMessage, transfer = []) {
  const job = ++jobCount;
  jobs.delete(section.job);
  section.job = job;
  jobs.set(job, (message) => {
    if (message.kind === "progress") return showProgress(section.result, message);
    find("progress", section.result).hidden = true;
    if (message.kind === "error") {
      jobs.delete(job); // other files may still report progress
      return say(section.result, message.message, true);
    }
    onMessage(message);
  });
  worker.postMessage({ job, ...request }, transfer);
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
  const section = { result: find("#drawing-result"), job: 0 };
  const panel = new IdsPanel(find("#drawing .ids"), model);
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
    find("#objects").textContent = `${model.objects.join(", ")}.`;
    find("#limits").hidden = false;
  }
  find("#another").addEventListener("click", () => {
    find("#seed").value = Number(find("#seed").value) + 1;
    draw();
  });
  find("#ask").addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
  say(section.result, "Press Draw. The model is loaded once.");

  function draw() {
    const seed = Number(find("#seed").value);
    if (!find("#seed").reportValidity()) return;
    if (!caption.value.trim()) return say(section.result, "Type what to draw, or press an example.", true);
    const request = {
      kind: "draw",
      caption: caption.value,
      seed,
      guidance: Number(find("#guidance").value),
      temperature: Number(find("#temperature").value),
    };
    say(section.result, "Starting …");
    start(section, request, (message) => show(message, request));
  }

  function show({ kind, image, ids, rows, columns, unknown, seconds }, request) {
    const picture = find(".picture", section.result);
    if (rows === 1) {
      picture.hidden = false;
      picture.width = columns * model.f;
      picture.height = model.rows * model.f;
      picture.style.aspectRatio = `${columns} / ${model.rows}`;
    }
    picture.getContext("2d").putImageData(image, 0, 0);
    picture.setAttribute("aria-label", `Picture of ${request.caption}`);
    const leftOut = unknown.length ? ` The model does not know ${quoted(unknown)}, and left that out.` : "";
    const progress = kind === "done" ? `Drawn in ${seconds.toFixed(1)} s.` : `Row ${rows} of ${model.rows} …`;
    say(section.result, progress + leftOut);
    panel.show({ ids, rows, columns, image, allRows: model.rows, name: request.caption, isWhole: kind === "done" });
  }
}

const quoted = (words) => words.map((word) => `“${word}”`).join(", ");

// Photographs ---------------------------------------------------------------------------------------------------------

function setUpPhotographs(model) {
  const section = { result: find("#photograph-result"), job: 0 };
  const panel = new IdsPanel(find("#photographs .ids"), model);
  const compared = find(".compared", section.result);
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
    else say(section.result, "What you dropped is not a file. Save the picture first, then drop its file.", true);
  });
  addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
    if (file) read(file);
    else if (event.target.id !== "caption") say(section.result, "There is no picture in the clipboard.", true);
  });
  if (model.example) {
    find("#example").hidden = false;
    find("#example").addEventListener("click", async () => {
      const response = await fetch(model.example).catch(() => null);
      if (!response?.ok) return say(section.result, `The file “${model.example}” could not be loaded. Reload the page.`, true);
      read(new File([await response.blob()], model.example));
    });
  }

  async function read(file) {
    if (!file) return;
    const { bitmap, wrong } = await openPicture(file);
    if (wrong) return say(section.result, wrong, true);
    say(section.result, "Starting …");
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

  function showFigures(figures) {
    const list = find(".figures", section.result);
    list.replaceChildren();
    for (const [name, value] of Object.entries(figures)) {
      const figure = document.createElement("div");
      const term = document.createElement("dt");
      const description = document.createElement("dd");
      term.textContent = name;
      description.textContent = value;
      figure.append(term, description);
      list.append(figure);
    }
    list.hidden = false;
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

const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

class IdsPanel {
  constructor(place, model) {
    this.place = place;
    this.model = model;
    place.append(find("#ids-panel").content.cloneNode(true));
    this.cells = find(".cells", place);
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
    this.background = new OffscreenCanvas(this.cells.width, this.cells.height);
    for (let cell = 0; cell < this.grid.ids.length; cell++) this.paint(this.background.getContext("2d"), cell);
    this.place.hidden = false;
    for (const button of this.place.querySelectorAll("button")) button.disabled = !isWhole;
    this.choose(Math.floor(rows / 2) * columns + Math.floor(columns / 2), false);
  }

  paint(context, cell) {
    const { ids, columns } = this.grid;
    const [red, green, blue] = this.colours.get(ids[cell]);
    const left = (cell % columns) * this.side;
    const top = Math.floor(cell / columns) * this.side;
    context.fillStyle = `rgb(${red} ${green} ${blue})`;
    context.fillRect(left, top, this.side, this.side);
    if (this.side < 48) return; // a number would not be legible
    context.fillStyle = 0.3 * red + 0.6 * green + 0.1 * blue > 140 ? "black" : "white";
    context.font = `${this.side / 3}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillText(ids[cell], left + this.side / 2, top + this.side / 2);
  }

  // Names a cell's id. While it is pointed at, the cells of other ids are dimmed.
  choose(cell, isPointed) {
    const { ids, columns, image } = this.grid;
    const context = this.cells.getContext("2d");
    this.chosen = cell;
    context.clearRect(0, 0, this.cells.width, this.cells.height);
    context.drawImage(this.background, 0, 0);
    if (isPointed) {
      context.fillStyle = "rgb(0 0 0 / 0.65)";
      context.fillRect(0, 0, this.cells.width, this.cells.height);
    }
    let uses = 0;
    ids.forEach((id, place) => {
      if (id !== ids[cell]) return;
      uses += 1;
      if (isPointed) this.paint(context, place);
    });
    const row = Math.floor(cell / columns);
    const column = cell % columns;
    if (isPointed) {
      context.strokeStyle = "white";
      context.lineWidth = Math.max(2, this.side / 16);
      context.strokeRect(column * this.side, row * this.side, this.side, this.side);
    }
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
find("#loaded").textContent = `Made by svqvae-hf ${settings.version}`;
if (settings.drawing) setUpDrawing(settings.drawing);
if (settings.photographs) setUpPhotographs(settings.photographs);
