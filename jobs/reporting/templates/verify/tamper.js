// Forgeries, to see the certificate fail. Each changes one thing of a claim in place.
"use strict";

const FORGERIES = {
  /** Add 1/64 to the first weight of the first block's R. */
  weight(claim) {
    const view = new DataView(claim.weights.buffer, claim.weights.byteOffset);
    const start = 8 + Number(view.getBigUint64(0, true));
    const header = JSON.parse(new TextDecoder().decode(claim.weights.subarray(8, start)));
    const place = start + header["blocks.0.R"].data_offsets[0];
    view.setFloat32(place, view.getFloat32(place, true) + 1 / 64, true);
    return "1/64 added to the first weight of blocks.0.R";
  },
  /** Invert the pixel in the middle of an image. */
  pixel(claim, at) {
    const image = imageOf(claim, at), middle = image.length >> 1;
    image[middle] = 255 - image[middle];
    return `pixel ${middle} of sample ${claim.imageRows[at]} inverted: ${255 - image[middle]} became ${image[middle]}`;
  },
  /** Raise a stated radius by one millionth. */
  radius(claim, at) {
    const row = claim.imageRows[at], radii = claim.rows.sound_radius;
    radii[row] += 1e-6;
    return `sound_radius of sample ${row} raised by 0.000001 to ${radii[row]}`;
  },
};

/** Apply a forgery; with `redo` the forger also recounts the table and recomputes every digest. */
function forge(claim, what, at, redo) {
  const told = FORGERIES[what](claim, at);
  if (redo) redoDigests(claim, at);
  return told;
}

function redoDigests(claim, at) {
  const { body, rows } = claim, model = body.model;
  rows.pixels_sha256[claim.imageRows[at]] = sha256(imageOf(claim, at));
  const digests = readTensors(claim.weights, shapesOf(model.network)).sha256;
  for (const layer of body.layers) layer.sha256 = digests[layer.name];
  model.weights_sha256 = sha256(claim.weights);
  claim.identity = JSON.stringify({ network: model.network, weights_sha256: model.weights_sha256 });
  model.digest = sha256OfText(claim.identity);
  const column = body.columns.sound, count = rows.key.length;
  const correct = rows.sound_radius.filter((_, row) => rows.sound_prediction[row] === rows.label[row]);
  column.certified = countsOf(body.eps, correct);
  for (const eps of body.eps) column.cra[eps] = column.certified[eps] / count;
  column.mean_radius = exactSum(correct) / count;
  claim.text = JSON.stringify(body);
  claim.digest = sha256OfText(claim.text);
}
