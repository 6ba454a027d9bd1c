"""A real server on this machine, to try the black-box route on without an account: `transformers serve`.

    with Server("smollm2-135m") as server:
        ask(Job(server.endpoint, TEMPLATES["letters"], drawn_calls(questions, n=16)), Replies("replies"))

It speaks the OpenAI chat protocol and samples one token, which is all that decisions need; it gives no logprobs, and cannot
go on from the start of an answer (a template's answer_prefix).
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from typing import Any

import httpx2

from permdistill import sources
from permdistill.api.endpoint import Endpoint
from permdistill.teachers import fast_dtype

# It decodes greedily at any temperature (transformers 5.23) unless its own field says otherwise.
SAMPLING = {"generation_config": '{"do_sample": true, "top_k": 0}'}

# The server ends when its standard input does: with the process that started it, however that ends (a killed kernel too).
# It takes over a socket that is bound already, so that nobody else on this machine can come to its port first.
_TIED = """
import os, socket, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
import uvicorn
bound, serve = socket.socket(fileno=int(sys.argv.pop())), uvicorn.Server.serve
uvicorn.Server.serve = lambda self, sockets=None: serve(self, [bound])
from transformers.cli.transformers import app
app()
"""


_ACCOUNT = ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID")


class Server:
    """`transformers serve` with a teacher's weights, on a free port of this machine; or somebody else's server.

    model     a teacher's name, or a folder with a checkpoint; with ``base_url``, as the API there calls it
    base_url  a server that runs already, up to and with /v1: nothing is started
    dtype     of the weights; "" is the one that this machine is fast with
    wait      seconds for the start
    settings  further fields of the :class:`permdistill.api.endpoint.Endpoint`

    ``endpoint`` is what to ask; ``teacher`` the name of the teacher that is served here, "" where nothing was started. Ends
    with :meth:`stop`, with the ``with`` block, or with this process. Raises ModuleNotFoundError without fastapi and
    uvicorn, RuntimeError when the server ends by itself or does not answer in time.
    """

    def __init__(self, model: str, base_url: str = "", dtype: str = "", wait: float = 240.0, **settings: Any):
        self.process: subprocess.Popen[bytes] | None = None
        self.teacher = "" if base_url else model
        if base_url:
            self.endpoint = Endpoint(base_url, model, **settings)
            return
        for name in ("fastapi", "uvicorn"):
            if importlib.util.find_spec(name) is None:
                raise ModuleNotFoundError(f"`transformers serve` needs {name}: pip install fastapi uvicorn")
        folder = sources.find(model).location()
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            bound.listen(128)
            port = bound.getsockname()[1]
            words = (
                f"--host 127.0.0.1 --port {port} --device cpu --dtype {dtype or str(fast_dtype()).removeprefix('torch.')}"
            )
            # In a process group of its own: a notebook's interrupt stops the cell, not the server.
            self.process = subprocess.Popen(
                [sys.executable, "-c", _TIED, "serve", folder, *words.split(), str(bound.fileno())],
                env={name: value for name, value in os.environ.items() if name not in _ACCOUNT} | {"HF_HUB_OFFLINE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[bound.fileno()],
                process_group=0,
            )
        # No key: it needs none, and when it has ended, whoever takes its port would get it.
        mine = {"extra_body": SAMPLING} | settings | {"key_name": ""}
        self.endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", folder, **mine)
        deadline = time.monotonic() + wait
        try:
            while not self._answers(f"http://127.0.0.1:{port}/health"):
                ended = self.process.poll() is not None
                if ended or time.monotonic() > deadline:
                    why = "has ended by itself" if ended else f"does not answer within {wait:.0f} s"
                    raise RuntimeError(f"transformers serve {why}: run `transformers serve {folder}` by hand to see why")
                time.sleep(0.2)
        except BaseException:
            self.stop()
            raise

    @staticmethod
    def _answers(address: str) -> bool:
        try:
            return httpx2.get(address, timeout=5).is_success
        except httpx2.HTTPError:
            return False

    def stop(self) -> None:
        """End the server if it was started here; once more does nothing."""
        if self.process is not None:
            self.process.terminate()
            self.process.communicate()
            self.process = None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
