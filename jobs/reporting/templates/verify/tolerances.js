// How what is stated is compared with what is derived.
"use strict";

/** Something that is stated, and differs from what is derived. */
class Disagreement extends Error {
  constructor(place, stated, derived) {
    super(`${place} is ${shown(stated)}, derived ${shown(derived)}`);
    Object.assign(this, { place, stated: shown(stated), derived: shown(derived) });
  }
}

function shown(value) {
  const text = typeof value === "string" ? value : JSON.stringify(value) ?? String(value);
  return text.length <= 100 ? text : `${text.slice(0, 100)}...`;
}

const SAME_BOUND = 1e-9; // two float64 computations of one bound, relative

/** A derived number that is stated up to a relative difference, or between two limits. */
class Near {
  constructor(value, tolerance = SAME_BOUND) {
    Object.assign(this, { value, tolerance });
  }
  allows(x) {
    if (!Number.isFinite(x) || !Number.isFinite(this.value)) return x === this.value;
    return Math.abs(x - this.value) <= this.tolerance * Math.max(Math.abs(x), Math.abs(this.value));
  }
  toJSON() {
    return this.value;
  }
}
class Within {
  constructor(least, most) {
    Object.assign(this, { least, most });
  }
  allows(x) {
    return this.least <= x && x <= this.most;
  }
  toJSON() {
    return [this.least, this.most];
  }
}

/** Compare what is stated with what is derived, down to the leaves; both have the same fields. */
function agree(stated, derived, place) {
  const isObject = (x) => x !== null && typeof x === "object" && !Array.isArray(x);
  if (derived instanceof Near || derived instanceof Within) {
    const number = stated === null ? Infinity : stated; // JSON has no infinity
    if (typeof number !== "number" || !derived.allows(number)) throw new Disagreement(place, stated, derived);
  } else if (Array.isArray(derived)) {
    if (!Array.isArray(stated) || stated.length !== derived.length) throw new Disagreement(place, stated, derived);
    derived.forEach((item, i) => agree(stated[i], item, `${place}[${i}]`));
  } else if (isObject(derived)) {
    const names = (x) => (isObject(x) ? Object.keys(x).sort() : x);
    if (shownFully(names(stated)) !== shownFully(names(derived)))
      throw new Disagreement(`${place} (fields)`, names(stated), names(derived));
    for (const name in derived) agree(stated[name], derived[name], `${place}.${name}`);
  } else if (stated !== derived) {
    throw new Disagreement(place, stated, derived);
  }
}

function shownFully(value) {
  return JSON.stringify(value);
}
