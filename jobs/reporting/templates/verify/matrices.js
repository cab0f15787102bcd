// Bounds of one matrix: section 3 of docs/explanation/certificate.md.
"use strict";

/** A matrix of `rows` x `columns` float64 values, row after row. */
function matrixOf(rows, columns, values = new Float64Array(rows * columns)) {
  return { rows, columns, values };
}

function transpose(A) {
  const T = matrixOf(A.columns, A.rows);
  for (let i = 0; i < A.rows; i++)
    for (let j = 0; j < A.columns; j++) T.values[j * A.rows + i] = A.values[i * A.columns + j];
  return T;
}

/**
 * A B^T: every entry is one dot product of a row of A and a row of B, summed in order.
 *
 * `triangle`: entries above the diagonal are not needed, and mostly left 0.
 */
function timesTransposed(A, B, triangle = false) {
  const k = A.columns, n = B.rows, a = A.values, b = B.values;
  const C = matrixOf(A.rows, n), c = C.values;
  for (let i = 0; i < A.rows; i++) {
    const row = i * k, needed = triangle ? i + 1 : n;
    let j = 0;
    for (; j + 4 <= n && j < needed; j += 4) { // four rows of B at a time: the sums do not wait for each other
      const b0 = j * k, b1 = b0 + k, b2 = b1 + k, b3 = b2 + k;
      let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
      for (let l = 0; l < k; l++) {
        const x = a[row + l];
        s0 += x * b[b0 + l]; s1 += x * b[b1 + l]; s2 += x * b[b2 + l]; s3 += x * b[b3 + l];
      }
      c[i * n + j] = s0; c[i * n + j + 1] = s1; c[i * n + j + 2] = s2; c[i * n + j + 3] = s3;
    }
    for (; j < needed; j++) {
      let sum = 0;
      for (let l = 0; l < k; l++) sum += a[row + l] * b[j * k + l];
      c[i * n + j] = sum;
    }
  }
  return C;
}

/** All entries times one factor; exact where the factor is a power of two. */
function scaledBy(A, factor) {
  return matrixOf(A.rows, A.columns, A.values.map((x) => x * factor));
}

function largestEntry(values) {
  return values.reduce((largest, x) => Math.max(largest, Math.abs(x)), 0);
}

function sumOfSquares(values) {
  return values.reduce((sum, x) => sum + x * x, 0);
}

/** ||A||_F by rows, not rounded up. */
function frobenius(A) {
  let sum = 0;
  for (let i = 0; i < A.rows; i++)
    sum += sumOfSquares(A.values.subarray(i * A.columns, (i + 1) * A.columns));
  return Math.sqrt(sum);
}

/** ||v||_2 of all entries, rounded up. */
function normOf(values) {
  return Math.sqrt(sumOfSquares(values)) * ROUND_UP;
}

/** `absolute` >= || |A| ||: sqrt(largest column sum * largest row sum). */
function absoluteBound(A) {
  const rows = new Float64Array(A.rows), columns = new Float64Array(A.columns);
  A.values.forEach((x, at) => {
    rows[Math.floor(at / A.columns)] += Math.abs(x);
    columns[at % A.columns] += Math.abs(x);
  });
  return Math.sqrt(largestEntry(columns) * largestEntry(rows)) * ROUND_UP;
}

/** A A^T: the lower triangle, copied to the upper one. */
function gram(A) {
  const T = timesTransposed(A, A, true);
  for (let i = 0; i < T.rows; i++)
    for (let j = 0; j < i; j++) T.values[j * T.rows + i] = T.values[i * T.rows + j];
  return T;
}

/** `upper` >= ||A||, by Gram iteration with the rounding of every product accounted for. */
function upperBound(A) {
  const largest = largestEntry(A.values);
  if (largest === 0) return 0;
  const inRange = largest >= powerOfTwo(-100) && largest <= powerOfTwo(100);
  const exponent = inRange ? 0 : exponentOf(largest);
  A = scaledBy(A, powerOfTwo(-exponent));
  const length = Math.max(A.rows, A.columns), order = Math.min(A.rows, A.columns);
  const G = gram(A.rows >= A.columns ? transpose(A) : A); // A^T A or A A^T
  const diagonal = G.values.filter((_, at) => at % (order + 1) === 0);
  const g = diagonal.reduce((x, y) => Math.max(x, y)), least = diagonal.reduce((x, y) => Math.min(x, y));
  const e_G = order * gamma(length, U) * g * (1 + powerOfTwo(-20));
  let q = Infinity;
  if (A.rows === A.columns && least >= 0.5 && g <= 2) {
    const rest = matrixOf(order, order, G.values.slice()); // G - I; this subtraction is exact
    for (let i = 0; i < order; i++) rest.values[i * (order + 1)] -= 1;
    q = 1 + squarings(rest, 3);
  }
  if (q > 1.1) q = Math.min(q, squarings(G, 6));
  return Math.sqrt(q + e_G) * (1 + GUARD) * powerOfTwo(exponent);
}

/** Q(T, m) >= ||T|| of a symmetric T: ||T||^2 = ||T T||, m times. */
function squarings(T, count) {
  const steps = [];
  for (let j = 0; j < count; j++) {
    const exponent = exponentOf(largestEntry(T.values));
    T = scaledBy(T, powerOfTwo(-exponent));
    steps.push({ norm: frobenius(T), exponent });
    T = gram(T); // T T
  }
  let b = frobenius(T);
  for (const { norm, exponent } of steps.reverse())
    b = Math.sqrt(b + gamma(T.rows, U) * norm * norm) * powerOfTwo(exponent);
  return b * ROUND_UP;
}

/** `lower` <= ||A||: what A does to the vector of 30 power iterations; any vector gives one. */
function lowerBound(A) {
  const back = transpose(A);
  const norm = (x) => Math.sqrt(sumOfSquares(x.values));
  const apply = (M, x) => timesTransposed(x, M); // x is one row
  let v = matrixOf(1, A.columns, Float64Array.from({ length: A.columns }, (_, j) => Math.cos(j + 1)));
  v = scaledBy(v, 1 / norm(v));
  for (let step = 0; step < 30; step++) {
    v = apply(back, apply(A, v));
    const length = norm(v);
    if (length === 0) return 0;
    v = scaledBy(v, 1 / length);
  }
  return (norm(apply(A, v)) / norm(v)) * (1 - powerOfTwo(-30));
}

/** All four numbers of one matrix of `layers`. */
function boundsOfMatrix(A) {
  return {
    upper: upperBound(A),
    lower: lowerBound(A),
    absolute: absoluteBound(A),
    frobenius: frobenius(A) * ROUND_UP,
  };
}
