// Rounding of floating point programs: sections 2, 3 and 5 of docs/explanation/certificate.md.
//
// ECMAScript numbers are IEEE 754 float64, and every +, -, * and / is rounded once, to nearest:
// nothing here is contracted, reordered or computed in another precision. Every quantity of an
// error bound is non-negative, so one factor at the end of a section covers the bound's own rounding.
"use strict";

/** 2^exponent, exactly, for exponents of normal numbers; `2 ** x` may be an approximation. */
function powerOfTwo(exponent) {
  if (!(exponent >= -1022 && exponent <= 1023)) throw new Error(`2^${exponent} is not a normal number`);
  const view = new DataView(new ArrayBuffer(8));
  view.setUint32(0, (exponent + 1023) << 20);
  return view.getFloat64(0);
}

/** value * 2^exponent in two steps: the power itself need not be a normal number. */
function timesPowerOfTwo(value, exponent) {
  const half = Math.trunc(exponent / 2);
  return value * powerOfTwo(half) * powerOfTwo(exponent - half);
}

/** The s with 2^-s * value in [1/2, 1); 0 for 0. */
function exponentOf(value) {
  if (value === 0) return 0;
  const view = new DataView(new ArrayBuffer(8));
  view.setFloat64(0, value);
  const biased = (view.getUint32(0) >>> 20) & 0x7ff;
  return biased === 0 ? exponentOf(value * powerOfTwo(64)) - 64 : biased - 1022;
}

const U = powerOfTwo(-53);
/** Covers the rounding of a sum, a norm or a square root of non-negative numbers. */
const ROUND_UP = 1 + powerOfTwo(-30);
/** Covers a handful of float64 operations. */
const GUARD = powerOfTwo(-50);

// The table of section 5: u_p of stored activations, u_a of the accumulation in dot products, u_w of
// the copy of the weights, u_s of pixels, pool and head, eta (smallest normal number), limit.
const SINGLE = powerOfTwo(-24), NARROW = powerOfTwo(-8);
const WIDE_RANGE = { eta: powerOfTwo(-1022), limit: powerOfTwo(500) };
const SINGLE_RANGE = { eta: powerOfTwo(-126), limit: powerOfTwo(60) };
const PROGRAMS = {
  float64: { name: "float64", u_p: U, u_a: U, u_w: 0, u_s: U, ...WIDE_RANGE },
  float32: { name: "float32", u_p: SINGLE, u_a: SINGLE, u_w: 0, u_s: SINGLE, ...SINGLE_RANGE },
  bfloat16: { name: "bfloat16", u_p: NARROW, u_a: SINGLE, u_w: NARROW, u_s: SINGLE, ...SINGLE_RANGE },
};

/** gamma(k, u) = k u / (1 - k u): relative error of a sum of k products. */
function gamma(k, u) {
  return k * u < 1 ? (k * u) / (1 - k * u) : Infinity;
}

/** (1 + a)(1 + b)... - 1 by x, y -> x + y + x y: a leading 1 would swallow 2^-53. */
function combined(errors) {
  let total = 0;
  for (const error of errors) total += error + total * error;
  return total;
}

/** kappa(k; a, r) = (1 + u_w)^a (1 + gamma(k, u_a)) (1 + u_p)^r - 1. */
function kappa(k, program, copies = 1, roundings = 1) {
  const weights = Array(copies).fill(program.u_w);
  const stored = Array(roundings).fill(program.u_p);
  return combined([gamma(k, program.u_a), ...weights, ...stored]);
}

/** The steps of section 5: n bounds the exact activation, e its error, peak is P. */
class ErrorState {
  /**
   * Step 1: pixels of norm at most N, minus 1/2 (a translation of norm `shift`), stored. An entry of
   * x + delta is rounded when it is given, and k / 255 may be a product with the rounded reciprocal.
   */
  constructor(program, N, shift) {
    this.program = program;
    this.peak = 0;
    this.n = N + shift;
    this.e = gamma(3, program.u_s) * N;
    this.e += program.u_s * (this.n + this.e);
    this.round(program.u_p);
  }

  /** Norm of the computed activation. */
  get size() {
    return this.n + this.e;
  }

  see(size) {
    this.peak = Math.max(this.peak, Number.isNaN(size) ? Infinity : size);
  }

  /** The activation is stored with a relative error. */
  round(relative) {
    this.e += relative * this.size;
    this.see(this.size);
  }

  /** A stored vector of norm beta is added. */
  translate(beta) {
    this.n += beta;
    this.e += this.program.u_w * beta;
    this.round(this.program.u_p);
  }

  /** A product with A, ||A|| <= sigma and || |A| || <= alpha, plus a bias of norm beta. */
  multiply(sigma, alpha, rounding, beta = 0) {
    const product = alpha * this.size + beta;
    this.see(product);
    this.n = sigma * this.n + beta;
    this.e = sigma * this.e + rounding * product;
    this.see(this.size);
  }

  /** Steps 6 and 7: E with underflow and overflow; `underflow` is Omega for activations of size 1. */
  close(error, underflow) {
    const omega = underflow * Math.max(1, this.peak);
    const total = (error + omega) * (1 + powerOfTwo(-20));
    const bounded = omega <= 1 && this.peak <= this.program.limit && !Number.isNaN(total);
    return bounded ? total : Infinity;
  }
}
