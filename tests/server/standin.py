"""Stand-in for `vllm serve` without a built vLLM: a front that answers, an engine that shares
memory and a named semaphore, a worker in a session of its own.

Run as `standin.py PORT [MANNER]`. As with vLLM, the front loses SIGTERM during start-up, and a
front that is killed leaves the other processes behind.
"""

import ctypes
import http.server
import json
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable

CORE = "(EngineCore pid=7) ERROR 11-23 20:01:02 [core.py:946]"
CRASH = f"""{CORE} EngineCore failed to start.
{CORE} Traceback (most recent call last):
{CORE}   File "gpu_worker.py", line 1, in init_device
{CORE} torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.
(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above. Failed \
core proc(s): {{}}
"""
FOLLOWS = CRASH.splitlines()[-1]
KILLED = FOLLOWS.replace("{}", "{'EngineCore': -9}")
OLD_PTXAS = f"""{CORE} triton.runtime.errors.PTXASError: PTXAS error: Internal codegen error
{CORE} `ptxas` stderr:
{CORE} ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'
{FOLLOWS}
"""
REMOTE_CODE = "ValueError: The repository x contains custom code which must be executed to load it."
ENDS = {"crash": CRASH, "killed": KILLED, "old ptxas": OLD_PTXAS, "remote code": REMOTE_CODE}


class Front(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer({"data": [{"id": "standin"}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if MANNER == "hung":
            sleep_for_ever()
        elif MANNER == "numb":
            self.answer({"error": {"message": "EngineCore encountered an issue."}}, 500)
        else:
            self.answer({"choices": [{"text": "!"}]})

    def answer(self, document: dict[str, object], status: int = 200) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child


def sleep_for_ever() -> None:
    while True:
        time.sleep(60)


def engine() -> None:
    if MANNER != "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    name = f"standin-{sys.argv[1]}-{os.getpid()}"
    # As multiprocessing's with spawn, but no resource tracker removes it.
    ctypes.CDLL(None).sem_open(f"/{name}".encode(), os.O_CREAT | os.O_EXCL, 0o600, 1)
    path = f"/dev/shm/{name}"
    with open(path, "w+b") as file:
        file.truncate(4096)
        shared = mmap.mmap(file.fileno(), 4096)
    shared[:1] = b"x"

    def worker() -> None:
        if MANNER == "apart":
            os.setsid()
        sleep_for_ever()

    fork(worker)
    sleep_for_ever()


MANNER = sys.argv[2] if len(sys.argv) > 2 else ""
if MANNER == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if MANNER in ENDS:
    sys.exit(ENDS[MANNER])
held = signal.signal(signal.SIGTERM, signal.SIG_IGN)
fork(engine)
print("engine started", flush=True)
if MANNER == "slow":
    sleep_for_ever()
if MANNER != "deaf":
    signal.signal(signal.SIGTERM, held)
with http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Front) as server:
    server.serve_forever()
