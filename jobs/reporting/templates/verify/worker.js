// The worker of the page: forges if asked to, verifies, and says how far it is.
"use strict";

self.onmessage = ({ data: { data, forgery } }) => {
  const started = Date.now();
  const claim = unpack(data);
  const told = forgery && forge(claim, forgery.what, forgery.at, forgery.redo);
  const found = verify(claim, (step, done, of) => self.postMessage({ step, done, of }));
  const { network, tensors, ...result } = found; // these two cannot leave the worker, or need not
  const bound = network && { L: network.L, matrices: network.factors.length, D: network.head.largestFactor };
  const seconds = (Date.now() - started) / 1000;
  self.postMessage({ result: { ...result, stated: claim.body.columns, bound, told, seconds } });
};
