"""Certified networks as a library.

    import certified_pretrain as cp

    net = cp.load("runs/NAME")
    net.predict(images)                           # classes
    net.certify(images, norm="l2", eps="36/255")  # classes, radii, whether each exceeds eps
    cp.evaluate(net, "runs/data/digits")          # certified robust accuracy

and for a training loop of one's own, without Ray and DeepSpeed: `networks`, `ManifoldAdam`,
`emma_loss`, and `certified`, which makes the same kind of object of a trained network.
"""

from data_shards.untrusted.import_guard import refuse_shadowed

refuse_shadowed(__name__)

from certified_pretrain import networks  # noqa: E402
from certified_pretrain.classifier import (  # noqa: E402
    Attacked,
    CertifiedClassifier,
    Predictions,
    certified,
    load,
)
from certified_pretrain.evaluation import Evaluation, evaluate  # noqa: E402
from certified_pretrain.training import ManifoldAdam, emma_loss  # noqa: E402

__all__ = [
    "Attacked",
    "CertifiedClassifier",
    "Evaluation",
    "ManifoldAdam",
    "Predictions",
    "certified",
    "emma_loss",
    "evaluate",
    "load",
    "networks",
]
