// The table: what follows from the rows of samples.parquet alone (section 8.6), counted exactly.
"use strict";

function checkTable(claim) {
  const { body, rows } = claim, count = rows.key.length, classes = body.model.network.num_classes;
  if (!(body.eps.length > 0 && new Set(body.eps).size === body.eps.length))
    throw new Disagreement("eps", body.eps, "different ratios, at least one");
  const isClass = whole(0, classes - 1);
  rows.label.forEach((label, row) => {
    if (!isClass(label)) throw new Disagreement(`${rowName(claim, row)} label`, label, "a class");
  });
  for (const name in COLUMNS) {
    const prediction = rows[`${name}_prediction`], radius = rows[`${name}_radius`].map(orInfinity);
    radius.forEach((r, row) => {
      if (!(r >= 0)) throw new Disagreement(`${rowName(claim, row)} ${name}_radius`, r, "a radius");
    });
    const correct = radius.filter((_, row) => prediction[row] === rows.label[row]);
    const certified = countsOf(body.eps, correct);
    const { largest_error, largest_error_ball, ...stated } = body.columns[name];
    agree(stated, {
      program: stated.program,
      unit_roundoff: PROGRAMS[stated.program].u_p,
      lipschitz: name === "nominal" ? 1 : new Near(body.network_bound), // itself compared below
      clean: correct.length / count,
      certified,
      cra: Object.fromEntries(body.eps.map((eps) => [eps, certified[eps] / count])),
      mean_radius: exactSum(correct) / count,
      vacuous: !radius.some((r) => r > 0),
    }, `columns.${name}`);
  }
}

function orInfinity(value) {
  return value === null ? Infinity : value;
}

/** By eps, how many radii are greater. */
function countsOf(eps, radii) {
  return Object.fromEntries(eps.map((ratio) => [ratio, radii.filter((r) => isGreater(r, ratio)).length]));
}

/** Whether a float64 is greater than a ratio such as 36/255, without rounding: r q > p. */
function isGreater(radius, ratio) {
  const [, p, q = "1"] = /^([0-9]{1,9})(?:\/([1-9][0-9]{0,8}))?$/.exec(ratio) ?? [];
  if (p === undefined) throw new Disagreement("eps", ratio, "a ratio such as 36/255");
  return radius === Infinity || asInteger(radius) * BigInt(q) > BigInt(p) << 1074n;
}

/** A finite float64 times 2^1074: an integer. */
function asInteger(value) {
  const exponent = Math.max(exponentOf(value) - 53, -1074); // value = an integer * 2^exponent
  return BigInt(timesPowerOfTwo(value, -exponent)) << BigInt(exponent + 1074);
}

/** The correctly rounded sum of the finite values. */
function exactSum(values) {
  const sum = values.filter(Number.isFinite).reduce((total, value) => total + asInteger(value), 0n);
  const shift = Math.max(0, sum.toString(2).length - 64);
  const cut = sum >> BigInt(shift), lost = cut << BigInt(shift) === sum ? 0n : 1n;
  return timesPowerOfTwo(Number(cut | lost), shift - 1074); // whatever is lost decides a tie
}

/** What this page derives of the samples that it carries: by column, right predictions and counts. */
function tableOf(claim, samples) {
  const table = {};
  for (const name in COLUMNS) {
    const right = samples.filter((sample) => sample.columns[name].prediction === sample.label);
    const radii = right.map((sample) => sample.columns[name].radius);
    table[name] = { clean: right.length, certified: {} };
    for (const eps of Array.isArray(claim.body.eps) ? claim.body.eps : [])
      table[name].certified[eps] = radii.filter((r) => isGreater(r, eps)).length;
  }
  return table;
}
