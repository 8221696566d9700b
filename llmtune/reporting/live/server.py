"""Serves a live page at 127.0.0.1, to requests that name that host: no other site's page can read it."""

from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import socket
from socketserver import BaseServer

from llmtune.errors import MachineError, RecipeError
from llmtune.reporting.live.page import LivePage

HOST = "127.0.0.1"
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def serve(folder: Path, port: int = 0) -> None:
    """Serve the page of a run or a comparison until Ctrl-C; raises RecipeError for a folder that holds neither."""
    with open_server(folder, port) as server:
        print(f"http://{HOST}:{server.server_port}/ shows {folder} as it goes on; Ctrl-C ends this", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt as stop:
            if type(stop) is not KeyboardInterrupt:  # SIGTERM
                raise


def open_server(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server of a folder's page; raises MachineError for a port that is in use."""
    if not 0 <= port < 65536:
        raise RecipeError(f"--port {port}: a port is 1 to 65535; leave it out for a free one")
    page = LivePage(folder)
    try:
        return ThreadingHTTPServer((HOST, port), partial(Handler, page))
    except OSError as error:
        raise MachineError(f"--port {port}: cannot be used: {error.strerror}; leave it out for a free one") from error


class Handler(BaseHTTPRequestHandler):
    """Answers GET of the page and of its version, and nothing else."""

    server_version, sys_version = "llmtune", ""

    def __init__(self, page: LivePage, request: socket, address: tuple[str, int], server: BaseServer) -> None:
        self._page = page
        super().__init__(request, address, server)

    def do_GET(self) -> None:
        """Answer a request; one for another host is refused, as a name may have been bound to this address."""
        port = self.connection.getsockname()[1]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self._send(403, "text/plain", "this page is served to 127.0.0.1 alone\n")
        elif self.path == "/":
            self._send(200, "text/html", self._page.html())
        elif self.path == "/version":
            self._send(200, "text/plain", self._page.version())
        else:
            self._send(404, "text/plain", "there is nothing but /\n")

    def _send(self, code: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        for name, value in {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": len(body), **_HEADERS}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""
