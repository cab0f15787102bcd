// What is stated, compared with what is derived: sections 7 and 8 of docs/explanation/certificate.md.
//
// `verify` stops at the first disagreement. Relative tolerances are for numbers that are stated to
// be read. A radius has none: it must not be larger than the one that is proved here.
"use strict";

const SAME_LOGITS = { float64: 1e-8, float32: 1e-4, bfloat16: 0.5 }; // two programs' logits
const LARGEST_DIFFERENCE = 0.5;
const SAME_ERROR = 1e-3;
const COLUMNS = { sound: ["float64"], deployed: ["float32", "bfloat16"], nominal: ["float32"] };
const STORED = ["prediction", "rival", "margin", "radius"]; // of every column, in samples.parquet
const FIELDS = [
  "schema", "norm", "pixel_unit", "perturbation", "native_shape", "network_shape", "model", "shards",
  "eps", "slack", "layers", "parts", "network_bound", "head", "observed_lipschitz", "columns",
  "samples_sha256", "code_version",
];
const BATCH = 8; // images of one forward pass

/**
 * Derive a certificate again.
 *
 * claim: what unpack() returns. report(step, done, of): called while it runs.
 * Returns { holds, step, disagreement, network, table, samples }.
 */
function verify(claim, report = () => {}) {
  const found = { holds: false, samples: [] };
  const steps = { digests: checkDigests, table: checkTable, bounds: checkBounds, samples: checkSamples, errors: checkErrors };
  try {
    for (const [name, step] of Object.entries(steps)) {
      found.step = name;
      report(name, 0, 1);
      step(claim, found, report);
      report(name, 1, 1);
    }
    found.holds = true;
  } catch (error) {
    const { place = "the data of the page", stated = "unusable", derived = String(error) } = error;
    found.disagreement = { place, stated, derived };
  }
  found.table = tableOf(claim, found.samples);
  return found;
}

/** Section 8.1 and 8.2: fixed fields, and the sha256 of all that is carried. */
function checkDigests(claim, found, report) {
  const { body, rows } = claim;
  agree(claim.digest, sha256OfText(claim.text), "digest of the certificate");
  agree(Object.keys(body).sort(), [...FIELDS].sort(), "certificate (fields)");
  const fixed = {
    schema: "certified-radius/2", norm: "l2", pixel_unit: "[0, 1], 0.5 subtracted inside",
    perturbation: "exact real norm, any real vector", slack: SLACK,
    native_shape: body.model.network.input_shape, network_shape: body.model.network.input_shape,
  };
  for (const name in fixed) agree(body[name], fixed[name], name);
  checkConfig(body.model.network);
  const identity = { network: body.model.network, weights_sha256: sha256(claim.weights) };
  agree(JSON.parse(claim.identity), identity, "identity of the model");
  agree(body.model, { ...identity, digest: sha256OfText(claim.identity), weight_dtype: "float32" }, "model");
  found.tensors = readTensors(claim.weights, shapesOf(body.model.network));
  const programs = Object.fromEntries(Object.keys(COLUMNS).map((name) => [name, body.columns[name]?.program]));
  agree(Object.keys(body.columns).sort(), Object.keys(COLUMNS).sort(), "columns (names)");
  for (const [name, allowed] of Object.entries(COLUMNS))
    if (!allowed.includes(programs[name])) throw new Disagreement(`columns.${name}.program`, programs[name], allowed);
  const count = body.shards.samples, size = product(body.native_shape);
  const stored = Object.keys(COLUMNS).flatMap((name) => STORED.map((key) => `${name}_${key}`));
  agree(Object.keys(rows).sort(), ["shard", "key", "pixels_sha256", "label", ...stored].sort(), "samples (columns)");
  for (const name in rows) agree(rows[name].length, count, `samples.${name} (rows)`);
  agree(new Set(rows.key.map((key, row) => JSON.stringify([rows.shard[row], key]))).size, count, "number of different samples");
  agree(new Set(claim.imageRows).size, claim.imageRows.length, "number of different images");
  agree(claim.pixels.length, claim.imageRows.length * size, "number of pixels");
  claim.imageRows.forEach((row, at) => {
    agree(rows.pixels_sha256[row], sha256(imageOf(claim, at)), `${rowName(claim, row)} pixels_sha256`);
    if (at % 64 === 0) report("digests", at, claim.imageRows.length);
  });
}

/** Pixels of the image at a place of the page. */
function imageOf(claim, at) {
  const size = product(claim.body.native_shape);
  return claim.pixels.subarray(at * size, (at + 1) * size);
}

function rowName(claim, row) {
  return `sample ${row} (${shown(claim.rows.key[row])})`;
}

/** The tensors of a safetensors file: sha256 of their bytes, and their float32 values as float64. */
function readTensors(bytes, shapes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const start = 8 + Number(view.getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
  delete header.__metadata__;
  agree(Object.keys(header).sort(), Object.keys(shapes).sort(), "names of the tensors");
  const tensors = { values: {}, sha256: {} };
  let end = 0;
  for (const name of Object.keys(header).sort((a, b) => header[a].data_offsets[0] - header[b].data_offsets[0])) {
    const count = product(shapes[name]), place = [end, end + 4 * count];
    agree(header[name], { dtype: "F32", shape: shapes[name], data_offsets: place }, `tensor ${name}`);
    tensors.sha256[name] = sha256(bytes.subarray(start + place[0], start + place[1]));
    tensors.values[name] = Float64Array.from({ length: count }, (_, i) => view.getFloat32(start + end + 4 * i, true));
    if (!tensors.values[name].every(Number.isFinite)) throw new Disagreement(`tensor ${name}`, "not finite", "finite");
    end += 4 * count;
  }
  agree(bytes.length, start + end, "length of the weights");
  return tensors;
}

/** Section 8.3: layers, parts, network bound and head from the weights. */
function checkBounds(claim, found, report) {
  const { body } = claim, config = body.model.network, { values, sha256 } = found.tensors;
  const names = boundedMatrices(config), bounds = {};
  const layers = names.map((name, done) => {
    report("bounds", done, names.length);
    bounds[name] = boundsOfMatrix(matrixOf(config.width, config.width, values[name]));
    const near = Object.fromEntries(Object.entries(bounds[name]).map(([key, value]) => [key, new Near(value)]));
    if (bounds[name].lower === 0) near.lower = new Within(0, bounds[name].upper);
    return { name, shape: [config.width, config.width], sha256: sha256[name], ...near };
  });
  agree(body.layers, layers, "layers");
  const network = (found.network = new LipNeXt(config, values, bounds));
  const parts = Object.fromEntries(Object.entries(network.parts()).map(([name, value]) => [name, new Near(value)]));
  agree(body.parts, parts, "parts");
  agree(body.network_bound, new Near(network.L), "network_bound");
  if (!(network.L > 0 && network.L < Infinity)) throw new Disagreement("network_bound", network.L, "a positive number");
  agree(body.head, { kind: config.head, largest_factor: new Near(network.head.largestFactor) }, "head");
  if (!(body.observed_lipschitz > 0 && body.observed_lipschitz <= network.L))
    throw new Disagreement("observed_lipschitz", body.observed_lipschitz, `at most ${network.L}`);
}

/** Section 8.5: every image of the page. */
function checkSamples(claim, found, report) {
  const places = claim.imageRows.map((_, at) => at);
  for (let start = 0; start < places.length; start += BATCH) {
    report("samples", start, places.length);
    const batch = places.slice(start, start + BATCH);
    const logits = found.network.logits(batch.map((at) => imageOf(claim, at)));
    batch.forEach((at, i) => found.samples.push(checkSample(claim, found.network, at, logits[i])));
  }
}

/** Compare all columns of one sample; returns what was derived of it. */
function checkSample(claim, network, at, y) {
  const row = claim.imageRows[at], N = imageNorm(imageOf(claim, at));
  const sample = { row, at, label: claim.rows.label[row], columns: {} };
  if (!y.every(Number.isFinite)) throw new Disagreement(`${rowName(claim, row)} logits`, y, "finite numbers");
  for (const name in COLUMNS) {
    const program = PROGRAMS[claim.body.columns[name].program];
    const stated = {};
    for (const key of STORED) stated[key] = orInfinity(claim.rows[`${name}_${key}`][row]);
    for (const key of ["prediction", "rival"])
      if (!whole(0, y.length - 1)(stated[key])) throw new Disagreement(`${rowName(claim, row)} ${name}_${key}`, stated[key], "a class");
    const c = stated.prediction;
    const due = name === "nominal" ? nominalRadii(network, y, c) : provedRadii(network, program, y, c, N);
    // Bounds of rounding are seldom approached: a sixteenth of one is no disagreement, up to half of
    // the logits. Where there is no bound, the program may return anything.
    const largest = Math.max(1, largestEntry(y)), error = network.marginError(N, program);
    const close = Math.min(Math.max(error / 16 / largest, SAME_LOGITS[program.name]), LARGEST_DIFFERENCE);
    const tolerance = Number.isFinite(error) ? close : Infinity;
    compareColumn(`${rowName(claim, row)} ${name}_`, stated, due, argmax(y), tolerance, tolerance * largest, network);
    // The radius of section 6, derived here; a little more may be proved.
    const radius = Math.max(0, Math.min(...due.radii, due.proved));
    sample.columns[name] = { prediction: c, stated: stated.radius, radius, proved: due.proved, error: due.error, ball: due.ball };
  }
  return sample;
}

/**
 * Prediction, radius, rival and margin of one column of one sample.
 *
 * A stated radius must not be larger than the proved one. Everything else is compared within the
 * difference of two programs' logits, `scale`; the rival is one that limits the radius.
 */
function compareColumn(place, stated, due, prediction, tolerance, scale, network) {
  const { prediction: c, rival, margin, radius } = stated;
  const insist = (holds, key, derived) => {
    if (!holds) throw new Disagreement(place + key, stated[key], derived);
  };
  insist(c === prediction || Math.min(...due.margins) >= -scale, "prediction", prediction);
  if (!(radius <= due.proved))
    throw new Disagreement(`${place}radius`, radius, `at most ${due.proved}, which is proved here`);
  const smallest = Math.min(...due.radii), least = Math.max(0, smallest);
  const reach = tolerance * Math.max(1, Math.abs(smallest));
  const limits = due.radii[rival] <= smallest + reach || (radius === 0 && due.radii[rival] <= reach);
  insist(rival !== c && limits, "rival", argmin(due.radii));
  insist(Math.abs(margin - due.margins[rival]) <= 2 * scale, "margin", due.margins[rival]);
  const widest = Math.sqrt(product(network.config.input_shape)); // no two images are further apart
  const alike = Math.abs(Math.min(radius, widest) - Math.min(least, widest)) <= tolerance * Math.max(1, least);
  const without = due.proved === Infinity && margin <= scale && due.margins[rival] <= scale; // 0 / 0
  insist(radius === least || alike || without, "radius", least);
}

/** The largest error terms; a part of the samples bounds them from below. */
function checkErrors(claim, found) {
  const complete = claim.imageRows.length === claim.rows.key.length;
  for (const name in COLUMNS) {
    const columns = found.samples.map((sample) => sample.columns[name]);
    const largest = (value) => columns.reduce((most, column) => Math.max(most, value(column)), 0);
    const limits = (least, most) => new Within(least * (1 - SAME_ERROR), complete ? most * (1 + SAME_ERROR) : Infinity);
    const error = largest((column) => column.error);
    const { largest_error, largest_error_ball } = claim.body.columns[name];
    agree(largest_error, limits(error, error), `columns.${name}.largest_error`);
    const ball = limits(largest((column) => column.ball[0]), largest((column) => column.ball[1]));
    agree(largest_error_ball, ball, `columns.${name}.largest_error_ball`);
  }
}

/** The data of the page, decoded. */
function unpack(data) {
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const { text, digest } = data.certificate;
  return {
    text, digest, body: JSON.parse(text), identity: data.identity, weights: bytes(data.weights),
    rows: data.rows, imageRows: data.images.rows, pixels: bytes(data.images.pixels),
  };
}
