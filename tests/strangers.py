"""What a stranger tries against Ray, and what processes listen on."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import psutil

LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
# `ray.init` of somebody who knows an address and a port, and no more.
_DRIVER = """
import pathlib, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
touch = ray.remote(num_cpus=0)(lambda path: pathlib.Path(path).touch())
ray.get(touch.remote(sys.argv[2]), timeout=60)
"""


def machine_addresses():
    """Every address under which this machine can be reached, or reaches itself."""
    families = (socket.AF_INET, socket.AF_INET6)
    found = [a for of in psutil.net_if_addrs().values() for a in of if a.family in families]
    return [address.address for address in found]


def process_tree(pid):
    """A process and all its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def listening(pid):
    """(name of the process, address, port) of every socket on which its tree listens."""
    found = set()
    for process in process_tree(pid):
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add((process.name(), *connection.laddr[:2]))
    return found


def off_loopback(sockets):
    """Those of `listening` that can be reached from outside of the machine."""
    return {one for one in sockets if one[1] not in LOOPBACK}


def answers(host, port):
    """Whether somebody accepts connections there."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), 5):
        return True
    return False


def post_job(host, port, marker):
    """Ask a job agent or a dashboard to create a file; the HTTP statuses, None: no HTTP."""
    name = f"[{host}]" if ":" in host else host
    body = json.dumps({"entrypoint": f"touch {marker}"}).encode()
    statuses = set()
    for path in ("/api/job_agent/jobs/", "/api/jobs/"):
        request = urllib.request.Request(
            f"http://{name.replace('%', '%25')}:{port}{path}",
            data=body,
            headers={"Content-Type": "application/json"},
        )
        try:
            urllib.request.urlopen(request, timeout=30).close()
            statuses.add(200)
        except urllib.error.HTTPError as error:
            statuses.add(error.code)
        except (OSError, ValueError, http.client.HTTPException):
            statuses.add(None)
    return statuses


def drive(host, port, marker):
    """Join a cluster by its address alone and run code there; whether that was possible."""
    outward = "0" if host in LOOPBACK else "1"  # else Ray replaces the address that is attacked
    name = f"[{host}]" if ":" in host else host
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, f"{name}:{port}", str(marker)],
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "RAY_AUTH_MODE": "disabled",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": outward,
            "RAY_NUM_REDIS_GET_RETRIES": "1",
        },
        capture_output=True,
        timeout=200,
    )
    return done.returncode == 0
