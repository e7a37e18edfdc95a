"""A stand-in for W&B's server: as much of it as the client needs to log a run, or one of the ways in which it fails."""

import gzip
import json
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Manner = Literal["behaves", "refuses", "forbids", "hangs", "drops"]
KEY = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class OnServer:
    """What the server has of a W&B run."""

    history: dict[int, dict[str, Any]] = field(default_factory=dict)  # by the number of the line
    config: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    def rows(self) -> list[dict[str, Any]]:
        return [self.history[line] for line in sorted(self.history)]

    def steps(self) -> list[int]:
        return [row["_step"] for row in self.rows()]


class WandbServer(ThreadingHTTPServer):
    """On a free port; `manner` may change while it runs."""

    daemon_threads = True

    def __init__(self, manner: Manner = "behaves", *, rewinds: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.manner = manner
        self.rewinds = rewinds
        self.runs: dict[str, OnServer] = defaultdict(OnServer)
        self.asked: list[str] = []
        self.alerts: list[dict[str, Any]] = []
        self.over = threading.Event()

    def __enter__(self) -> "WandbServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": KEY, "WANDB_MODE": "online"}

    @property
    def run(self) -> OnServer:
        (run,) = self.runs.values()
        return run

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed in the middle of a sentence is part of the play."""

    def answer(self, operation: str, variables: dict[str, Any], query: str) -> Any:
        self.asked.append(operation)
        if operation == "RunResumeStatus":
            return {"model": {**_PROJECT, "bucket": self._resumed(variables["name"])}}
        if operation == "UpsertBucket":
            return {"upsertBucket": self._upserted(variables)}
        if operation == "RewindRun":
            return {"rewindRun": self._rewound(variables)}
        if operation == "NotifyScriptableRunAlert":
            self.alerts.append(variables)
            return {"notifyScriptableRunAlert": {"success": True}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"/storage/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return {}

    def stream(self, run: str, message: dict[str, Any]) -> None:
        kept = self.runs[run]
        history = message.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        for line, content in enumerate(history["content"], start=history["offset"]):
            assert line not in kept.history, f"line {line} comes twice"
            kept.history[line] = json.loads(content)
        if message.get("complete"):
            kept.exit_code = message.get("exitcode")

    def _resumed(self, name: str) -> dict[str, Any] | None:
        if name not in self.runs:
            return None
        rows = self.runs[name].rows()
        return {
            "id": "1",
            "name": name,
            "summaryMetrics": json.dumps(rows[-1] if rows else {}),
            "displayName": name,
            "logLineCount": 0,
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsTail": "[]",
            "config": json.dumps(self.runs[name].config),
            "tags": [],
            "notes": "",
            "wandbConfig": json.dumps({"t": 1}),
        }

    def _upserted(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[variables["name"]]
        run.config |= json.loads(variables.get("config") or "{}")
        return {"bucket": self._bucket(variables["name"]), "inserted": not run.history}

    def _rewound(self, variables: dict[str, Any]) -> dict[str, Any] | None:
        if not self.rewinds:
            return None
        name = variables["runName"]
        kept = [row for row in self.runs[name].rows() if row["_step"] <= variables["metricValue"]]
        self.runs[name].history = dict(enumerate(kept))
        return {"rewoundRun": self._bucket(name)}

    def _bucket(self, name: str) -> dict[str, Any]:
        return {
            "id": "1",
            "name": name,
            "displayName": name,
            "description": "",
            "config": json.dumps(self.runs[name].config),
            "sweepName": None,
            "project": _PROJECT,
            "historyLineCount": len(self.runs[name].history),
        }


_PROJECT = {"id": "1", "name": "pathfm", "entity": {"id": "1", "name": "lab"}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.server.manner == "hangs":
            self.server.over.wait()
        elif self.server.manner == "drops":
            self.close_connection = True
        elif self.server.manner != "behaves":
            self._reply({"errors": [{"message": "no"}]}, 500 if self.server.manner == "refuses" else 403)
        elif self.path == "/graphql":
            asked = json.loads(body)
            answer = self.server.answer(asked["operationName"], asked.get("variables") or {}, asked["query"])
            self._reply({"data": answer} if None not in answer.values() else {"errors": [{"message": "no"}]})
        else:
            self.server.stream(self.path.split("/")[-2], json.loads(body))
            self._reply({})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._reply({})

    def do_GET(self) -> None:
        self._reply({})

    def log_message(self, *_: object) -> None:
        pass

    def _reply(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
