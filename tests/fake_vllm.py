"""A stand-in for vLLM's server process, run as ``python -m tests.fake_vllm`` with vLLM's flags and two of its own:

``--fake-dir``   where it notes its pids (``pids``), its flags, one start a line (``starts``), and that a request for
                 ``/later`` has come (``later``)
``--fake``       ``refuse`` to start, ``refuse-head`` (only with speculation), ``slow`` (never ready)

On GET it answers with its ``SPECDEC_STATUS``; ``/later`` takes two seconds, ``/die`` ends the process,
``/hang`` stops it from ever answering again, ``/stuck`` its engine alone. SIGTERM drains as vLLM does, for
``--shutdown-timeout`` seconds. A child that ignores SIGTERM stands for the engine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"


class Handler(BaseHTTPRequestHandler):
    hangs = False
    is_stuck = False
    folder: Path

    def do_GET(self) -> None:
        Handler.hangs = Handler.hangs or self.path == "/hang"
        while Handler.hangs:
            time.sleep(1)
        if self.path == "/die":
            sys.stdout.write("RuntimeError: engine died\n")
            sys.stdout.flush()
            os._exit(3)
        if self.path == "/later":
            (self.folder / "later").touch()
            time.sleep(2)
        if self.path == "/stuck":
            Handler.is_stuck = True
            return
        self.send_response(503 if Handler.is_stuck and self.path == "/specdec/live" else 200)
        self.end_headers()
        self.wfile.write(os.environ["SPECDEC_STATUS"].encode())

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = False  # closing it waits for requests in flight

    def handle_error(self, *args: object) -> None:
        pass  # a client that no longer waits


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--port", type=int)
    parser.add_argument("--fake-dir", type=Path)
    parser.add_argument("--fake", default="")
    parser.add_argument("--speculative-config", type=json.loads)
    parser.add_argument("--shutdown-timeout", type=float)
    flags, _ = parser.parse_known_args()
    child = subprocess.Popen([sys.executable, "-S", "-c", CHILD])
    with (flags.fake_dir / "pids").open("a") as pids, (flags.fake_dir / "starts").open("a") as starts:
        pids.write(f"{os.getpid()}\n{child.pid}\n")
        starts.write(json.dumps(sys.argv[1:]) + "\n")
    if flags.fake == "refuse" or (flags.fake == "refuse-head" and flags.speculative_config):
        sys.exit("ValueError: it does not load")
    if flags.fake == "slow":
        time.sleep(300)
    Handler.folder = flags.fake_dir
    server = Server(("127.0.0.1", flags.port), Handler)

    def drain(*_: object) -> None:
        threading.Timer(flags.shutdown_timeout, os._exit, (1,)).start()
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, drain)
    server.serve_forever(poll_interval=0.02)
    server.server_close()
    os._exit(0)


if __name__ == "__main__":
    main()
