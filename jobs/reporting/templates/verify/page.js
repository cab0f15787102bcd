// What the reader sees. Everything is derived in a worker made from the text of #mathematics; texts of
// the certificate reach the page as text nodes alone.
"use strict";

const element = (id) => document.getElementById(id);
const data = JSON.parse(element("data").textContent);
const certificate = JSON.parse(data.certificate.text);
const source = URL.createObjectURL(new Blob([element("mathematics").textContent], { type: "text/javascript" }));
const STEPS = ["digests", "table", "bounds", "samples", "errors"];
const WEIGHTS = { digests: 3, table: 1, bounds: 16, samples: 79, errors: 1 }; // of the progress bar, in per cent
const CAUGHT_BY = {
  digests: "a digest", table: "the table, counted again", bounds: "the mathematics: bounds of the weights",
  samples: "the mathematics: logits and radii", errors: "the mathematics: rounding errors",
};
const COLUMNS = ["sound", "deployed", "nominal"];
const MOST_PICTURES = 600;
const carried = data.images.rows.length, stated = data.rows.key.length;
let worker = null, selected = 0;

// Data that cannot even be shown: the page says so, and never stays as it was.
addEventListener("error", (event) => fail("This page cannot be read", [["error", event.message]]));

function make(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

const percent = (share) => `${(100 * share).toFixed(2)} %`;

/** 95 % Wilson interval of a share: what another test set of this size may show. */
function wilson(count, number) {
  const z = 1.959963984540054, share = count / number;
  const middle = share + (z * z) / (2 * number), scale = 1 + (z * z) / number;
  const half = z * Math.sqrt((share * (1 - share)) / number + (z * z) / (4 * number * number));
  return [Math.max(0, (middle - half) / scale), Math.min(1, (middle + half) / scale)];
}

/** Derive everything, after a forgery or without one. */
function run(forgery = null) {
  if (worker) worker.terminate();
  worker = new Worker(source);
  document.body.dataset.state = "running";
  element("verdict").textContent = forgery ? "Checking the forged certificate ..." : "Checking the certificate ...";
  element("detail").replaceChildren();
  for (const step of STEPS) element(`step-${step}`).className = "";
  worker.onmessage = ({ data: message }) => (message.result ? show(message.result, forgery) : progress(message));
  worker.onerror = (event) => {
    event.preventDefault();
    fail("This browser could not run the check", [["error", event.message ?? "the worker did not start"]]);
  };
  worker.postMessage({ data, forgery });
}

function progress({ step, done, of }) {
  const before = STEPS.slice(0, STEPS.indexOf(step)).reduce((sum, name) => sum + WEIGHTS[name], 0);
  element("progress").value = before + (WEIGHTS[step] * done) / of;
  element(`step-${step}`).className = done === of ? "done" : "current";
  element("detail").textContent = of > 1 ? `${step}: ${done} of ${of}` : step;
}

function show(found, forgery) {
  const { holds, disagreement, bound, seconds } = found;
  showTable(found);
  showSamples(found);
  if (holds) {
    document.body.dataset.state = "holds";
    element("verdict").textContent = `Certificate holds: ${carried} of ${stated} samples`;
    element("detail").textContent =
      `${certificate.layers.length} matrices bounded again, network bound ${bound.L.toFixed(9)}, `
      + `largest head factor ${bound.D.toFixed(6)}; ${2 * carried} radii proved, none stated above its proof. `
      + `Derived in this browser in ${seconds.toFixed(1)} s.`;
    return;
  }
  element(`step-${found.step}`).className = "failed";
  const facts = [["place", disagreement.place], ["stated", disagreement.stated], ["derived", disagreement.derived]];
  if (found.told) {
    facts.unshift(["forgery", found.told]);
    facts.push(["caught by", CAUGHT_BY[found.step] + (forgery.redo ? "; digests and table fit, for the forger had redone them" : "")]);
  }
  fail("Certificate fails", facts);
}

function fail(title, facts) {
  document.body.dataset.state = "fails";
  element("verdict").textContent = title;
  const list = make("dl");
  for (const [name, text] of facts) list.append(make("dt", name), make("dd", text));
  element("detail").replaceChildren(list);
}

/** The table, derived beside stated; derived numbers are of the images of this page. */
function showTable({ holds, table, stated: columns }) {
  const body = element("table");
  body.replaceChildren();
  const row = (name, derived, claimed) => {
    const line = make("tr");
    line.append(make("th", name));
    for (const column of COLUMNS) {
      const count = holds ? derived(table[column]) : 0;
      const own = make("td", holds ? percent(count / carried) : "–", "own");
      line.append(own);
      if (column === "sound") {
        const [low, high] = wilson(count, carried).map((share) => (100 * share).toFixed(1));
        if (holds) own.append(make("small", `${count} of ${carried}`));
        line.append(make("td", holds ? `${low} to ${high} %` : "–", "interval"));
      }
      line.append(make("td", percent(claimed(columns[column])), "stated"));
    }
    body.append(line);
  };
  row("clean", (column) => column.clean, (column) => column.clean);
  for (const eps of certificate.eps) row(`eps ${eps}`, (column) => column.certified[eps], (column) => column.cra[eps]);
}

/** Pictures of the samples with what was derived of each; a click selects one. */
function showSamples({ holds, samples }) {
  const byPlace = new Map(samples.map((sample) => [sample.at, sample]));
  const smallest = certificate.eps.reduce((least, text) => {
    const [p, q = 1] = text.split("/").map(Number);
    return Math.min(least, p / q);
  }, Infinity);
  [...element("samples").children].forEach((picture, at) => {
    const sample = byPlace.get(at), row = data.images.rows[at];
    const name = `sample ${row} (${data.rows.key[row]}), label ${data.rows.label[row]}`;
    picture.className = "picture";
    picture.title = name;
    if (sample && holds) {
      const { prediction, stated: claimed, radius, proved } = sample.columns.sound;
      picture.title = `${name}, predicted ${prediction}, radius stated ${claimed}, proved up to ${proved}`;
      picture.classList.add(prediction !== sample.label ? "wrong" : radius > smallest ? "certified" : "right");
    }
    picture.classList.toggle("selected", at === selected);
  });
}

/** Draw the pixels of every image (up to a number), channels x height x width of bytes. */
function drawSamples() {
  const [channels, height, width] = certificate.native_shape, size = channels * height * width;
  const pixels = atob(data.images.pixels);
  for (let at = 0; at < Math.min(carried, MOST_PICTURES); at++) {
    const button = make("button", undefined, "picture"), canvas = make("canvas");
    button.type = "button";
    Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d"), image = context.createImageData(width, height);
    for (let i = 0; i < width * height; i++) {
      for (let channel = 0; channel < 3; channel++) {
        const plane = channels === 1 ? 0 : channel;
        image.data[4 * i + channel] = pixels.charCodeAt(at * size + plane * width * height + i);
      }
      image.data[4 * i + 3] = 255;
    }
    context.putImageData(image, 0, 0);
    button.append(canvas);
    button.addEventListener("click", () => select(at));
    element("samples").append(button);
  }
}

function select(at) {
  selected = at;
  element("selected").textContent = `sample ${data.images.rows[at]} (${data.rows.key[data.images.rows[at]]})`;
  [...element("samples").children].forEach((picture, place) => picture.classList.toggle("selected", place === at));
}

drawSamples();
element("code").textContent = element("mathematics").textContent;
for (const what of ["weight", "pixel", "radius"])
  element(`forge-${what}`).addEventListener("click", () => run({ what, at: selected, redo: element("redo").checked }));
element("restore").addEventListener("click", () => run());
const { label, sound_prediction: predicted, sound_radius: radius } = data.rows;
select(Math.max(0, data.images.rows.findIndex((row) => predicted[row] === label[row] && radius[row] > 0)));
showTable({ holds: false, stated: certificate.columns });
run();
