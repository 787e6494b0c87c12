// Draws the ids of one scale and names the code of the cell under the pointer. Gradio provides `element`, `props` and
// `watch`; `props.value` is `ScalePreview.code_grid`, or null before the first image.
const WIDTH = 1120; // approximate largest width of the canvas in pixels; CSS scales it
const HEIGHT = 8192; // approximate largest height
const MAX_SIDE = 16384; // largest side of a canvas, in pixels, that all browsers support
const LOOK_SIDE = 192;
const MARK = "#ffffff";
const DIMMED = "rgb(0 0 0 / 0.5)"; // over the cells of other codes

const find = (name) => element.querySelector(`.${name}`);
let grid = null;

async function show() {
  const value = props.value;
  if (!value) return;
  const tooLarge = Math.max(value.width, value.height) > MAX_SIDE;
  find("code-grid").classList.toggle("too-large", tooLarge);
  if (tooLarge) return;
  const bytes = Uint8Array.from(atob(value.cells), (character) => character.charCodeAt(0));
  const looks = new Image();
  looks.src = value.looks;
  await looks.decode();
  if (props.value !== value) return;
  const side = Math.max(1, Math.round(Math.min(32, WIDTH / value.width, HEIGHT / value.height)));
  grid = { ...value, side, looks, cells: new Uint32Array(bytes.buffer), at: 0, pointed: false, held: false };
  grid.picture = document.createElement("canvas");
  for (const canvas of [grid.picture, find("cells")]) {
    canvas.width = value.width * side;
    canvas.height = value.height * side;
  }
  const context = grid.picture.getContext("2d");
  grid.cells.forEach((codeIndex, cell) => drawLook(context, codeIndex, ...cornerOf(cell), side));
  choose(Math.floor(value.height / 2) * value.width + Math.floor(value.width / 2));
}

function cornerOf(cell) {
  return [(cell % grid.width) * grid.side, Math.floor(cell / grid.width) * grid.side];
}

function drawLook(context, codeIndex, left, top, side) {
  const { looks, columns, look_px: px } = grid;
  context.imageSmoothingEnabled = false;
  const [sheetLeft, sheetTop] = [(codeIndex % columns) * px, Math.floor(codeIndex / columns) * px];
  context.drawImage(looks, sheetLeft, sheetTop, px, px, left, top, side, side);
}

function choose(cell) {
  grid.at = cell;
  const codeIndex = grid.cells[cell];
  const context = find("cells").getContext("2d");
  context.drawImage(grid.picture, 0, 0);
  if (grid.pointed || grid.held) {
    context.fillStyle = DIMMED;
    context.fillRect(0, 0, grid.picture.width, grid.picture.height);
  }
  let uses = 0;
  grid.cells.forEach((other, index) => {
    if (other !== codeIndex) return;
    uses += 1;
    drawLook(context, codeIndex, ...cornerOf(index), grid.side);
  });
  const [left, top] = cornerOf(cell);
  context.strokeStyle = MARK;
  context.lineWidth = Math.max(3, grid.side / 8);
  context.strokeRect(left, top, grid.side, grid.side);

  const look = find("look");
  look.width = look.height = LOOK_SIDE;
  drawLook(look.getContext("2d"), codeIndex, 0, 0, LOOK_SIDE);
  find("name").textContent = `code ${grid.codes[codeIndex]}`;
  find("position").textContent = `row ${Math.floor(cell / grid.width) + 1}, column ${(cell % grid.width) + 1}`;
  find("uses").textContent = `in ${uses} of ${grid.cells.length} cells`;
}

function cellAt(event) {
  const box = find("cells").getBoundingClientRect();
  const side = Math.min(box.width / grid.width, box.height / grid.height); // page.css centres the grid in the box
  const nearest = (offset, length, count) =>
    Math.max(0, Math.min(count - 1, Math.floor((offset - (length - side * count) / 2) / side)));
  const column = nearest(event.clientX - box.left, box.width, grid.width);
  return nearest(event.clientY - box.top, box.height, grid.height) * grid.width + column;
}

const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

element.addEventListener("pointermove", (event) => {
  if (!grid || grid.held) return;
  grid.pointed = event.target === find("cells");
  choose(grid.pointed ? cellAt(event) : grid.at);
});
element.addEventListener("pointerleave", () => {
  if (!grid) return;
  grid.pointed = false;
  choose(grid.at);
});
element.addEventListener("click", (event) => {
  if (!grid || event.target !== find("cells")) return;
  grid.held = !grid.held || cellAt(event) !== grid.at;
  choose(cellAt(event));
});
element.addEventListener("keydown", (event) => {
  if (!grid || !(event.key in STEPS)) return;
  const [down, right] = STEPS[event.key];
  const row = Math.floor(grid.at / grid.width) + down;
  const column = (grid.at % grid.width) + right;
  if (row >= 0 && row < grid.height && column >= 0 && column < grid.width) choose(row * grid.width + column);
  grid.held = true;
  event.preventDefault();
});
watch("value", show);
show();
