"""A stand-in for Kubernetes' API: it runs each job as a process in an empty folder of its own.

It shows that what is sent there is complete, and nothing about a real cluster.
"""

import base64
import json
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH", "PIP_INDEX_URL", "PIP_CONFIG_FILE")


class Pods:
    """Jobs by name, each with its process, and every job's description in order."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.secrets, self.described = folder, {}, []
        self.processes: dict[str, subprocess.Popen] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def write_config(self) -> Path:
        """A client's configuration that points here."""
        path = self.folder / "kubeconfig"
        host = f"http://127.0.0.1:{self.server.server_port}"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": host}}],
            "users": [{"name": "me", "user": {}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def add(self, kind: str, body: dict) -> None:
        """Keep a secret, or start a job with the environment that its secrets give it."""
        name = body["metadata"]["name"]
        if kind == "secrets":
            self.secrets[name] = body.get("data") or {}
            return
        self.described.append(body)
        container = body["spec"]["template"]["spec"]["containers"][0]
        given = {}
        for variable in container.get("env") or []:
            wanted = variable["valueFrom"]["secretKeyRef"]
            value = self.secrets[wanted["name"]][wanted["key"]]
            given[variable["name"]] = base64.b64decode(value).decode()
        place = self.folder / name
        place.mkdir()
        with place.with_suffix(".log").open("w") as log:
            self.processes[name] = subprocess.Popen(
                [*container["command"], *container["args"]],
                cwd=place,
                env={key: os.environ[key] for key in KEPT if key in os.environ} | given,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def state(self, name: str) -> dict:
        """A job's counts as the API gives them."""
        code = self.processes[name].poll()
        return {} if code is None else {"succeeded" if code == 0 else "failed": 1}

    def close(self) -> None:
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()


def handler(pods: Pods) -> type[BaseHTTPRequestHandler]:
    """The requests that the executor makes; pods themselves are never listed."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: dict) -> None:
            text = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            pods.add(self.path.partition("?")[0].rpartition("/")[2], body)
            self.answer(body)

        def do_GET(self) -> None:
            parts = self.path.partition("?")[0].split("/")
            if parts[-1] == "status":
                self.answer({"metadata": {"name": parts[-2]}, "status": pods.state(parts[-2])})
            else:
                self.answer({"kind": "PodList", "apiVersion": "v1", "items": []})

        def do_DELETE(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.answer({"kind": "Status", "apiVersion": "v1", "status": "Success"})

        def log_message(self, *parts: object) -> None:
            pass

    return Handler
