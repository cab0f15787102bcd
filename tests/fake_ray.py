"""The doors of a Ray cluster, open to anybody or to those who have the token."""

import concurrent.futures
import contextlib
import http.server
import json
import threading

import grpc
from ray.core.generated import gcs_pb2, gcs_service_pb2

GCS = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
CLIENT = "/ray.rpc.RayletDriver/ClusterInfo"
_NOT_FOUND = object()


@contextlib.contextmanager
def http_door(paths, *, token="", host="127.0.0.1"):
    """An HTTP server with JSON answers by path (query left out); yields its port.

    Without `token` it serves anybody.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            given = self.headers.get("authorization")
            answer = paths.get(self.path.partition("?")[0], _NOT_FOUND)
            status = 404 if answer is _NOT_FOUND else 200
            if token:
                status = {None: 401, f"Bearer {token}": status}.get(given, 403)
            self.send_response(status)
            self.end_headers()
            if status == 200:
                self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer((host, 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield listening.server_address[1]
        finally:
            listening.shutdown()
            thread.join()


def dashboard(*, token="", nodes=()):
    """A dashboard; `nodes` are the hosts of the cluster, the first is the head."""
    found = [{"node_ip": host, "is_head_node": not i} for i, host in enumerate(nodes)]
    paths = {"/api/jobs/": [], "/api/v0/nodes": {"data": {"result": {"result": found}}}}
    return http_door(paths, token=token)


def agent(*, token=""):
    """The job agent of a node."""
    return http_door({}, token=token)


@contextlib.contextmanager
def grpc_door(method, *, token="", answer=b""):
    """A gRPC server with one method; yields its port."""

    def serve(request, context):
        if token and dict(context.invocation_metadata()).get("authorization") != f"Bearer {token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "Authentication token is missing")
        return answer

    class Handler(grpc.GenericRpcHandler):
        def service(self, details):
            if details.method != method:
                return None
            return grpc.unary_unary_rpc_method_handler(serve)

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2), handlers=[Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait()


def gcs(*, token="", nodes=()):
    """The GCS of a cluster; `nodes` are pairs of host and port of the agent."""
    reply = gcs_service_pb2.GetAllNodeInfoReply()
    for number, (host, port) in enumerate(nodes):
        reply.node_info_list.add(
            node_manager_address=host,
            dashboard_agent_listen_port=port,
            is_head_node=not number,
            state=gcs_pb2.GcsNodeInfo.ALIVE,
        )
    # A node that has left is asked no more.
    reply.node_info_list.add(node_manager_address="192.0.2.9", state=gcs_pb2.GcsNodeInfo.DEAD)
    return grpc_door(GCS, token=token, answer=reply.SerializeToString())


def client_server(*, token=""):
    """The server of `ray://`."""
    return grpc_door(CLIENT, token=token)
