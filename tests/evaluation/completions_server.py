"""A small OpenAI-compatible server for tests, with a real model, which can be told to misbehave."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class CompletionsServer:
    """`/v1/models` and `/v1/completions` as vLLM has them: greedy text, log-probabilities of an echoed prompt.

    Attributes that tests change:
        names: of the models.
        key: the key that requests must have.
        takes_tokens: whether prompts may be token ids.
        strips: removes the first space of a text, as decoding the new tokens alone does.
        extra_tokens: in `usage`.
        context: fields of each model in the list.
        echo: `"right"`, `"ignored"`, `"short"`, `"shifted"`, `"not finite"`, `"llama.cpp"` or `"without the end"`.
        failure, fail_from, num_failures: `"status 500"`, `"drop"`, `"not JSON"`, `"error object"`, `"no text"` or
            `"slow"`, from this request on, and for how many.
    """

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.lock = model, tokenizer, threading.Lock()
        self.reset()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = _QuietServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.names, self.key, self.echo, self.takes_tokens = ["tiny"], None, "right", True
        self.strips = False
        self.extra_tokens, self.context = 0, {}
        self.failure, self.fail_from, self.num_failures = None, 0, 10**9
        self.requests: list[dict] = []
        self.run = object()  # connections from before it are of a client that stopped

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def complete(self, request: dict) -> dict:
        prompt = request["prompt"]
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        num_prompt, stops = len(ids), request.get("stop") or []
        text = ""
        for _ in range(request["max_tokens"]):
            ids.append(int(self._log_softmax(ids)[-1].argmax()))
            if ids[-1] == self.tokenizer.eos_token_id:
                break
            text = self._decode(ids, num_prompt)
            if any(stop in text for stop in stops):
                text = min((text.partition(stop)[0] for stop in stops), key=len)
                break
        choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": None}
        echoes = request.get("echo", False) and self.echo not in ("ignored", "llama.cpp")
        if request.get("logprobs"):
            choice["logprobs"] = self._log_probabilities(ids, 0 if echoes else num_prompt)
        return {"choices": [choice], "usage": {"prompt_tokens": num_prompt + self.extra_tokens}}

    def _decode(self, ids: list[int], start: int) -> str:
        if self.strips:
            return self.tokenizer.decode(ids[start:], skip_special_tokens=True)
        return self.tokenizer.decode(ids)[len(self.tokenizer.decode(ids[:start])) :]

    def _log_softmax(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def _log_probabilities(self, ids: list[int], start: int) -> dict:
        own, best = [None], [None]
        scores = self._log_softmax(ids)
        for place in range(1, len(ids)):
            row = scores[place - 1]
            own.append(float(row[ids[place]]))
            best.append({"own": own[-1], "best": float(row.max())})
        if start == 0 and self.echo == "shifted":  # those of the token before
            own = [None, own[1], *own[1:-1]]
        if start == 0 and self.echo == "not finite":
            own[-2] = float("-inf")
        if start == 0 and self.echo == "short":
            own, best = own[1:], best[1:]
        if start == 0 and self.echo == "without the end" and ids[-1] == self.tokenizer.eos_token_id:
            own, best = own[:-1], best[:-1]
        if self.echo == "llama.cpp":
            return {"content": [{"token": "x", "logprob": value} for value in own[start:]]}
        return {"token_logprobs": own[start:], "top_logprobs": best[start:]}


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """A client closes its connections when a request fails."""


class _Handler(BaseHTTPRequestHandler):
    owner: CompletionsServer
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.run = self.owner.run

    def log_message(self, *_):
        pass

    def do_GET(self):
        owner = self.owner
        if owner.key and self.headers.get("Authorization") != f"Bearer {owner.key}":
            return self._answer(401, '{"error": "a key is needed"}\nmore')
        rows = [{"id": name, "object": "model"} for name in owner.names]
        if owner.context:
            rows = [{**row, **owner.context} for row in rows]
        return self._answer(200, json.dumps({"object": "list", "data": rows}))

    def do_POST(self):
        owner = self.owner
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions" or request["model"] not in owner.names:
            return self._answer(404, '{"error": "no such model"}')
        if isinstance(request["prompt"], list) and not owner.takes_tokens:
            return self._answer(400, '{"error": "prompt must be a string"}')
        with owner.lock:
            if self.run is not owner.run:
                return None
            owner.requests.append(request)
            fails = owner.failure and len(owner.requests) > owner.fail_from and owner.num_failures > 0
            owner.num_failures -= bool(fails)
            answer = owner.complete(request)
        if not fails:
            return self._answer(200, json.dumps(answer))
        if owner.failure == "drop":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices"')
            self.close_connection = True
            return None
        if owner.failure == "slow":
            time.sleep(3)
        bodies = {
            "status 500": (500, "\nout of memory\nTraceback"),
            "not JSON": (200, "<html>\nhello"),
            "error object": (200, '{"error": {"message": "overloaded"}}'),
            "no text": (200, '{"choices": [{"index": 0}]}'),
            "slow": (200, "{}"),
        }
        return self._answer(*bodies[owner.failure])

    def _answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())
