"""Pretrain from a local S3-compatible server: `python -m tests.pretrain_s3 PRESET [--overrides]`.

Starts the server on a free loopback port, writes the preset's shard set to it, runs
`pipeline.pretrain` on that set and ends the server.
"""

import logging
import os
import subprocess
import sys

from tests.object_store import BUCKET, s3_environment, s3_server


def main(arguments: list[str]) -> int:
    """Run it; returns the exit code of the first command that failed, else 0."""
    preset, *overrides = arguments
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line per request otherwise
    shards = f"s3://{BUCKET}/{preset}"
    write = ["data_shards.write", preset, "--out", shards]
    train = ["pipeline.pretrain", preset, "--data.shards", shards, *overrides]
    with s3_server() as address:
        environment = {**os.environ, **s3_environment(f"http://{address}")}
        for command in (write, train):
            print("python -m", *command, flush=True)  # noqa: T201
            code = subprocess.run([sys.executable, "-m", *command], env=environment).returncode
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["digits"]))
