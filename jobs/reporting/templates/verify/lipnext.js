// LipNeXt: sections 3 to 5 of docs/explanation/certificate.md for the whole network.
"use strict";

// Limits of every field of the configuration; `initial` and `fold` do not change the function.
const whole = (least, most) => (x) => Number.isInteger(x) && least <= x && x <= most;
const between = (least, most) => (x) => typeof x === "number" && least <= x && x <= most;
const oneOf = (...words) => (x) => words.includes(x);
const SETTINGS = {
  kind: oneOf("lipnext"),
  input_shape: (x) => Array.isArray(x) && x.length === 3 && x.every(whole(1, 65535)),
  num_classes: whole(2, 65536),
  patch: whole(1, 4096),
  width: whole(1, 65536),
  depth: whole(1, 10000),
  alpha: between(0, 0.25),
  beta: between(0, 1),
  position: oneOf(true, false),
  shift: oneOf("unit", "doubling"),
  pool: oneOf("l2", "grid", "flat"),
  pool_windows: whole(1, 65536),
  pool_tau: between(1e-18, 1),
  head: oneOf("unit", "linear"),
  initial: oneOf("haar", "identity_m"),
  fold: oneOf("auto", "always", "never"),
};

/** Refuse a configuration that no LipNeXt has. */
function checkConfig(config) {
  for (const name of Object.keys(config))
    if (!Object.hasOwn(SETTINGS, name)) throw new Disagreement(`model.network.${name}`, config[name], "no such field");
  for (const [name, allows] of Object.entries(SETTINGS))
    if (!allows(config[name])) throw new Disagreement(`model.network.${name}`, config[name], "a value within its limits");
  const [channels, height, width] = config.input_shape, patch = config.patch;
  const divides = height % patch === 0 && width % patch === 0;
  if (!divides || channels * patch ** 2 > config.width || 4 * shifted(config) > config.width)
    throw new Disagreement("model.network", config, "patch, width, alpha and input_shape that fit");
  const windows = config.pool_windows;
  if (gridOf(config).some((side) => side % windows) || (windows > 1 && config.pool !== "grid"))
    throw new Disagreement("model.network", config, "windows of pool=grid that divide the grid");
}

/** Height and width of the grid of tokens. */
function gridOf(config) {
  return [config.input_shape[1] / config.patch, config.input_shape[2] / config.patch];
}

/** Values that the head sees. */
function featuresOf(config) {
  return config.width * (config.pool === "flat" ? product(gridOf(config)) : config.pool_windows ** 2);
}

/** Names and shapes of all stored tensors. */
function shapesOf(config) {
  const C = config.width;
  const shapes = { "stem.weight": [C, C] };
  for (let i = 0; i < config.depth; i++) {
    shapes[`blocks.${i}.R`] = shapes[`blocks.${i}.M`] = [C, C];
    shapes[`blocks.${i}.b`] = [C];
    if (config.position) shapes[`blocks.${i}.p`] = [...gridOf(config), 1];
  }
  return { ...shapes, "head.weight": [config.num_classes, featuresOf(config)], "head.bias": [config.num_classes] };
}

/** Names of the matrices of `layers`, in order. */
function boundedMatrices(config) {
  const blocks = Array.from({ length: config.depth }, (_, i) => [`blocks.${i}.R`, `blocks.${i}.M`]);
  return ["stem.weight", ...blocks.flat()];
}

/** By how many tokens each block shifts. */
function distancesOf(config) {
  const powers = [1];
  while (config.shift === "doubling" && 4 * powers.at(-1) <= Math.min(...gridOf(config))) powers.push(2 * powers.at(-1));
  return Array.from({ length: config.depth }, (_, i) => powers[i % powers.length]);
}

/** Channels shifted in each of four directions. */
function shifted(config) {
  return roundHalfEven(config.alpha * config.width);
}

function roundHalfEven(x) {
  const floor = Math.floor(x), rest = x - floor;
  return rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor;
}

function product(values) {
  return values.reduce((x, y) => x * y, 1);
}

class LipNeXt {
  /** config; tensors: name to Float64Array; bounds: name to the numbers of section 3. */
  constructor(config, tensors, bounds) {
    Object.assign(this, { config, tensors, bounds });
    this.values = config.input_shape[0] * config.patch ** 2; // pixels of one patch
    this.grid = gridOf(config);
    this.tokens = this.grid[0] * this.grid[1]; // T
    this.head = new Head(config, tensors["head.weight"], tensors["head.bias"]);
    this.norms = {}; // of every bias b and position p
    for (const name in tensors) if (/\.[bp]$/.test(name)) this.norms[name] = normOf(tensors[name]);
    this.factors = [this.upper("stem.weight")]; // sigma of every product of the forward pass
    for (let i = 0; i < config.depth; i++)
      this.factors.push(this.upper(`blocks.${i}.R`), this.upper(`blocks.${i}.R`), this.upper(`blocks.${i}.M`));
    this.S = product(this.factors.map((sigma) => Math.max(1, sigma)));
    this.L = this.networkBound();
  }

  upper(name) {
    return this.bounds[name].upper;
  }

  matrix(name) {
    const C = this.config.width;
    return matrixOf(C, C, this.tensors[name]);
  }

  // Section 3: the Lipschitz constant of the features in the pixels

  /** upper(stem), and upper(R_i)^2 upper(M_i) of every block. */
  parts() {
    const parts = { stem: this.upper("stem.weight") };
    for (let i = 0; i < this.config.depth; i++)
      parts[`blocks.${i}`] = this.upper(`blocks.${i}.R`) ** 2 * this.upper(`blocks.${i}.M`);
    return parts;
  }

  /** L: the product of the parts, where it does not pass through subnormal numbers. */
  networkBound() {
    const s = product(this.factors.map((sigma) => Math.min(1, sigma)));
    if (!(this.S <= powerOfTwo(500) && s >= powerOfTwo(-500))) return Infinity;
    return product(Object.values(this.parts())) * (1 + powerOfTwo(-40));
  }

  // Section 5: the error of a program

  /** E(N): error of a logit difference for images of norm at most N. */
  marginError(N, program) {
    const { width: C, pool, pool_tau: tau } = this.config, windows = this.config.pool_windows ** 2;
    const state = new ErrorState(program, N, Math.sqrt(product(this.config.input_shape)) / 2);
    const stem = this.bounds["stem.weight"];
    state.multiply(stem.upper, stem.absolute, kappa(this.values, program));
    for (let i = 0; i < this.config.depth; i++) this.carryBlock(state, i);
    if (pool !== "flat") { // step 4, pool: q = sqrt((n + e)^2 + K^2 C tau^2)
      const q = Math.sqrt(state.size ** 2 + windows * C * tau ** 2);
      state.e += gamma(this.tokens / windows + 4, program.u_s) * q;
      state.n = Math.sqrt(state.n ** 2 + windows * C * tau ** 2);
      state.see(state.size);
    }
    return state.close(this.head.marginError(state), this.underflow(program));
  }

  /** Step 3. */
  carryBlock(state, i) {
    const { config, norms } = this, program = state.program, C = config.width;
    const R = this.bounds[`blocks.${i}.R`], M = this.bounds[`blocks.${i}.M`];
    if (config.position) state.translate(Math.sqrt(C) * norms[`blocks.${i}.p`]); // pi
    state.multiply(R.upper, R.absolute, kappa(C, program));
    const beta = Math.sqrt(this.tokens) * norms[`blocks.${i}.b`];
    const outer = kappa(C + 1, program, 1, 2);
    const { n, e } = state;
    // unfolded: first R^T, then M
    state.multiply(R.upper, R.absolute, kappa(C, program));
    state.multiply(M.upper, M.absolute, outer, beta);
    // folded: P = M R^T is computed first
    const psi = kappa(C, program, 2) * M.absolute * R.frobenius;
    const alpha_P = Math.sqrt(C) * (M.upper * R.upper + psi);
    const folded = M.upper * R.upper * e + psi * (n + e) + outer * (alpha_P * (n + e) + beta);
    state.see(alpha_P * (n + e) + beta);
    state.n = M.upper * R.upper * n + beta;
    state.e = Math.max(state.e, folded);
    state.see(state.size);
  }

  /** Step 6: Omega / max(1, P). */
  underflow(program) {
    const { width: C, depth, pool_tau: tau } = this.config;
    const D = this.head.largestFactor;
    return (8 * depth + 16) * this.tokens * (C + 1) ** 2 * program.eta * this.S * Math.max(1, D) * 2 / tau;
  }

  // The forward pass, in float64

  /** Logits of images (uint8, channels x height x width each): an array of K numbers per image. */
  logits(images) {
    const { config, tokens } = this, C = config.width, folded = roundHalfEven(config.beta * C);
    const distances = distancesOf(config);
    let x = this.embed(images);
    for (let i = 0; i < config.depth; i++) {
      const R = this.matrix(`blocks.${i}.R`), M = this.matrix(`blocks.${i}.M`);
      if (config.position) this.addPosition(x, this.tensors[`blocks.${i}.p`]);
      x = this.shift(timesTransposed(x, R), distances[i]); // R (x + p), then the circular shift
      x = timesTransposed(timesTransposed(x, transpose(R)), M); // M R^T
      const b = this.tensors[`blocks.${i}.b`];
      for (let at = 0; at < x.values.length; at++) {
        const channel = at % C, value = x.values[at] + b[channel];
        x.values[at] = channel < folded ? Math.abs(value) : value; // beta-Abs
      }
    }
    const values = tokens * C; // of an image
    return images.map((_, at) => this.head.logits(this.pool(x.values.subarray(at * values, (at + 1) * values))));
  }

  /** The values of an image as they are, or sqrt(sum over a window of x^2 + tau^2) of every channel. */
  pool(x) {
    const { width: C, pool, pool_windows: K, pool_tau: tau } = this.config, [height, width] = this.grid;
    if (pool === "flat") return x;
    const sums = new Float64Array(K * K * C);
    x.forEach((value, at) => {
      const channel = at % C, token = (at - channel) / C, column = token % width, row = (token - column) / width;
      const window = Math.floor((row * K) / height) * K + Math.floor((column * K) / width);
      sums[window * C + channel] += value ** 2;
    });
    return sums.map((sum) => Math.sqrt(sum + tau ** 2));
  }

  /** Patches to channels: pixels / 255 - 1/2, times the first columns of the stem. */
  embed(images) {
    const { config, grid, values, tokens } = this, { patch, width: C } = config;
    const [channels, height, width] = config.input_shape;
    const x = matrixOf(images.length * tokens, values);
    let at = 0;
    for (const pixels of images)
      for (let token = 0; token < tokens; token++)
        for (let channel = 0; channel < channels; channel++)
          for (let i = 0; i < patch; i++)
            for (let j = 0; j < patch; j++) {
              const row = Math.floor(token / grid[1]) * patch + i, column = (token % grid[1]) * patch + j;
              x.values[at++] = pixels[(channel * height + row) * width + column] / 255 - 0.5;
            }
    const stem = this.matrix("stem.weight"), used = matrixOf(C, values);
    for (let row = 0; row < C; row++)
      used.values.set(stem.values.subarray(row * C, row * C + values), row * values);
    return timesTransposed(x, used);
  }

  /** One number per token, added to all of its channels. */
  addPosition(x, p) {
    const C = this.config.width;
    for (let at = 0; at < x.values.length; at++) x.values[at] += p[Math.floor(at / C) % this.tokens];
  }

  /** Four groups of channels move up, down, left and right, with wrap-around. */
  shift(x, distance) {
    const [height, width] = this.grid, C = this.config.width, count = shifted(this.config);
    const moved = matrixOf(x.rows, C, x.values.slice());
    [[1, 0], [-1, 0], [0, 1], [0, -1]].forEach(([down, right], group) => {
      for (let token = 0; token < x.rows; token++) {
        const image = Math.floor(token / this.tokens) * this.tokens, place = token - image;
        const row = (Math.floor(place / width) + down * distance + height) % height;
        const column = ((place % width) + right * distance + width) % width;
        const from = (image + row * width + column) * C + group * count;
        moved.values.set(x.values.subarray(from, from + count), token * C + group * count);
      }
    });
    return moved;
  }
}
