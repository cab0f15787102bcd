// The radius of one sample: section 6 of docs/explanation/certificate.md.
"use strict";

/** What the producer takes off its radii, so that another program's proof is not below them. */
const SLACK = powerOfTwo(-26);

/** N = sqrt(sum k^2) / 255 (1 + 2^-50); the sum is exact in integers. */
function imageNorm(pixels) {
  return (Math.sqrt(sumOfSquares(Float64Array.from(pixels))) / 255) * (1 + GUARD);
}

function argmax(values) {
  return values.reduce((best, value, at) => (value > values[best] ? at : best), 0);
}

function argmin(values) {
  return argmax(values.map((value) => -value));
}

/** A quotient; 0 / 0 is 0, for nothing is certified then. */
function quotient(x, y) {
  return Number.isNaN(x / y) ? 0 : x / y;
}

/** g_j = y_c - y_j; infinite at the prediction c itself, which limits no radius. */
function marginsOf(y, c) {
  return y.map((value, j) => (j === c ? Infinity : y[c] - value));
}

/** What papers report: no rounding is accounted for, and no proof limits what is stated. */
function nominalRadii(network, y, c) {
  const margins = marginsOf(y, c);
  const radii = margins.map((g, j) => (j === c ? Infinity : quotient(g, network.head.nominalFactors[c][j])));
  return { margins, radii, proved: Infinity, error: 0, ball: [0, 0] };
}

/**
 * Radii of `sound` or `deployed` for one image.
 *
 * `radii` are those of section 6, which a certificate states. `proved` is the largest radius that
 * this page can prove, with its own bounds, logits y and errors. With f the real function of the
 * stored weights, m_j = f_c - f_j and r > 0:
 *
 *   m_j(x)         >= g_j - E_64(N)              y is the float64 program of this page
 *   m_j(x + delta) >= m_j(x) - r L factor(c, j)  for ||delta|| < r
 *   margin of the program at x + delta >= m_j(x + delta) - E(N + r)
 *
 * so r is proved if g_j - E_64(N) - E(N + r) >= r L factor(c, j) for every rival j.
 */
function provedRadii(network, program, y, c, N) {
  const margins = marginsOf(y, c), { L } = network, factor = network.head.factors[c];
  const own = network.marginError(N, PROGRAMS.float64), error = network.marginError(N, program);
  const reached = (left) => left.map((g, j) => (j === c ? Infinity : quotient(g, factor[j]) / L));
  const errorOnBall = (left) =>
    network.marginError((N + Math.max(0, Math.min(...reached(left)))) * (1 + GUARD), program);

  const proves = (r) => {
    const within = network.marginError((N + r) * (1 + GUARD), program);
    const used = (j) => r * L * (1 + GUARD) * factor[j] * (1 + GUARD);
    return margins.every((g, j) => j === c || g * (1 - GUARD) - own - within >= used(j));
  };
  const proved = largestProved(proves, Math.min(...reached(margins)));

  const ball = errorOnBall(margins); // E_ball, with r0 from the margins alone
  const taken = (program.name === "float64" ? 3 : 1) * error + ball;
  const left = margins.map((g, j) => (j === c ? Infinity : g - taken - SLACK * (g + error + ball)));
  const radii = reached(left).map((r) => r * (1 - SLACK));
  const apart = error + own; // the program's margins differ from these by the errors of both
  const limits = [-apart, apart].map((by) => errorOnBall(margins.map((g) => g + by)));
  return { margins, radii, proved, error, ball: limits };
}

/** The largest r in [0, most] with proves(r), which holds up to one radius; found by halving. */
function largestProved(proves, most) {
  if (!(most > 0) || !Number.isFinite(most)) return 0;
  if (proves(most)) return most;
  let low = 0, high = most;
  for (let step = 0; step < 100; step++) {
    const middle = low + (high - low) / 2;
    if (middle === low || middle === high) break;
    if (proves(middle)) low = middle;
    else high = middle;
  }
  return low;
}
