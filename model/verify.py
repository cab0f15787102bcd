"""Derive a certificate again: `python -m model.verify CERTIFICATE --artifact URL --data.shards S`.

Follows docs/explanation/certificate.md with an implementation of its own, `model/verifier/`, that
imports nothing else of the project. Exit status 0: everything derived agrees and every radius of
`sound` and `deployed` is proved; 1: the first disagreement is named; 2: an input cannot be used.

What it cannot tell. The digest is no signature: whoever changes a file may recompute it. So a
change is caught because the number is derived again, and a consistent change of the weights or of
the images makes a certificate of another model or another data set, with other digests. The output
names what was not derived. Of samples that were not drawn, only shard, key, label and the table are
checked.
"""

import sys

from model.verifier.command import main, verify

__all__ = ["main", "verify"]

if __name__ == "__main__":
    sys.exit(main())
