"""Which certifier made a result: a digest of the program text that its numbers come from."""

import functools
import hashlib
from pathlib import Path

import model

_JOBS = ("certify_tasks.py", "attack_task.py")
_VERIFIER = "verif"
"""The verifier changes no number of a certificate."""


@functools.cache
def certifier_digest() -> str:
    """sha256 over networks, bounds, attacks and tasks: a mended certifier evaluates again."""
    root, here = Path(model.__file__).parent, Path(__file__).parent
    sources = [path for path in root.rglob("*.py") if _VERIFIER not in str(path.relative_to(root))]
    digest = hashlib.sha256()
    for path in sorted(sources) + [here / name for name in _JOBS]:
        data = path.read_bytes()
        digest.update(f"{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()
