// The head: section 4 of docs/explanation/certificate.md, and step 5 of section 5.
"use strict";

/** Logits W h + b; the rows of a `unit` head are divided by their norms first. */
class Head {
  constructor(config, weight, bias) {
    const K = config.num_classes, C = weight.length / K; // C: features
    this.unit = config.head === "unit";
    this.bias = bias;
    this.rows = Array.from({ length: K }, (_, k) => weight.slice(k * C, (k + 1) * C));
    const norms = this.rows.map((row) => Math.sqrt(sumOfSquares(row)));
    if (this.unit) {
      if (!(Math.min(...norms) >= 1e-6)) throw new Disagreement("head.weight", Math.min(...norms), "rows of norm at least 1e-6");
      this.rows = this.rows.map((row, k) => row.map((w) => w / norms[k]));
    }
    this.longest = Math.max(...norms) * ROUND_UP;
    this.omega = this.unit ? 1 : this.longest;
    const rho = this.unit ? gamma(C + 4, U) : 0;
    const distance = (v, w) => Math.sqrt(sumOfSquares(v.map((x, at) => x - w[at])));
    this.nominalFactors = this.rows.map((v) => this.rows.map((w) => distance(v, w)));
    this.factors = this.nominalFactors.map((row, i) =>
      row.map((plain, j) => (i === j ? 0 : (plain + 2 * rho) * ROUND_UP)));
    this.largestFactor = Math.max(...this.factors.flat()); // D
  }

  logits(features) {
    return this.rows.map((row, k) => row.reduce((sum, w, at) => sum + w * features[at], 0) + this.bias[k]);
  }

  /** Step 5 of section 5, before underflow, and the sizes of the head in P. */
  marginError(state) {
    const { u_w, u_s } = state.program, C = this.rows[0].length;
    const rho_s = this.unit ? gamma(C + 4, u_s) + 2 * u_w : u_w;
    const dot = gamma(C + 1, u_s), b_max = largestEntry(this.bias);
    state.see(this.omega * (1 + rho_s) * (1 + dot) * state.size + b_max);
    state.see(this.longest); // a row whose norm overflows is divided by infinity
    return this.largestFactor * state.e
      + 2 * this.omega * (rho_s + dot * (1 + rho_s)) * state.size
      + 2 * (dot * (1 + u_w) + u_w) * b_max;
  }
}
