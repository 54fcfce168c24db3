"""The Neuronpedia client against a server of the test's own, on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from mechreward.errors import InputError
from mechreward.features.neuronpedia_client import NeuronpediaClient

FEATURE = {"modelId": "m", "layer": "3-res", "index": "7", "explanations": [{"description": "numbers"}], "extra": 1}
FOUND = {"results": [{"modelId": "m", "layer": "l", "index": i, "description": f"d{i}"} for i in range(3)]}
NEURON = {"results": [{"description": "said", "neuron": FEATURE}]}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, body: bytes) -> None:
        self.server.seen.append((self.command, self.path, body, self.headers.get("x-api-key")))  # type: ignore[attr-defined]
        status, text = self.server.answers.get(self.path, (404, "{}"))  # type: ignore[attr-defined]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setenv("MECHREWARD_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.seen = []  # type: ignore[attr-defined]
    made.answers = {  # type: ignore[attr-defined]
        "/api/feature/m/3-res/7": (200, json.dumps(FEATURE)),
        "/api/feature/a%2Fb/l/1": (200, json.dumps({**FEATURE, "explanations": []})),
        "/api/feature/m/bad/1": (200, '{"modelId": "m"}'),
        "/api/feature/m/text/1": (200, "<html>"),
        "/api/feature/m/nan/1": (200, '{"modelId": NaN}'),
        "/api/feature/m/busy/1": (429, "{}"),
        "/api/explanation/search-model": (200, json.dumps(FOUND)),
    }
    thread = Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def client(server: ThreadingHTTPServer, **options: object) -> NeuronpediaClient:
    return NeuronpediaClient(f"http://127.0.0.1:{server.server_address[1]}/api/", **options)  # type: ignore[arg-type]


def test_a_feature_is_asked_for_once(server: ThreadingHTTPServer) -> None:
    for _ in range(2):
        found = client(server, api_key="secret").get_feature("m", "3-res", 7)
        assert (found.model_id, found.sae_id, found.index, found.description) == ("m", "3-res", 7, "numbers")
        assert found.raw["extra"] == 1 and str(found.label()) == "numbers (neuronpedia)"
    assert server.seen == [("GET", "/api/feature/m/3-res/7", b"", "secret")]  # type: ignore[attr-defined]
    client(server, cache_enabled=False).get_feature("m", "3-res", 7)
    assert len(server.seen) == 2 and server.seen[1][3] is None  # type: ignore[attr-defined]


def test_what_is_kept_needs_no_network(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    known = client(server)
    known.get_feature("m", "3-res", 7)
    assert "secret" not in "".join(path.read_text() for path in (tmp_path / "neuronpedia").iterdir())
    server.shutdown()
    server.server_close()
    assert known.get_feature("m", "3-res", 7).description == "numbers"
    with pytest.raises(InputError, match="neuronpedia: cannot reach http.*feature/m/3-res/8 .*labels need a network"):
        known.get_feature("m", "3-res", 8)


def test_names_are_quoted_and_no_explanation_is_no_label(server: ThreadingHTTPServer) -> None:
    found = client(server).get_feature("a/b", "l", 1)
    assert found.description == "" and found.label() is None


@pytest.mark.parametrize(
    ("sae_id", "sentence"),
    [
        ("none", "answered 404, it has no such feature"),
        ("busy", "answered 429, wait and ask again"),
        ("bad", "the answer is no feature; modelId, layer and index are needed"),
        ("text", "answered something that is not JSON"),
        ("nan", "answered something that is not JSON"),
    ],
)
def test_errors_are_said_and_not_kept(sae_id: str, sentence: str, server: ThreadingHTTPServer) -> None:
    path = f"/api/feature/m/{sae_id}/1"
    for _ in range(2):
        with pytest.raises(InputError, match=sentence):
            client(server).get_feature("m", sae_id, 1)
    server.answers[path] = (200, json.dumps(FEATURE))  # type: ignore[attr-defined]
    assert client(server).get_feature("m", sae_id, 1).description == "numbers"


def test_search(server: ThreadingHTTPServer) -> None:
    found = client(server).search("m", "numbers", top_k=2)
    assert [(f.index, f.description) for f in found] == [(0, "d0"), (1, "d1")]
    assert len(client(server).search("m", "numbers")) == 3
    method, _, body, _ = server.seen[0]  # type: ignore[attr-defined]
    assert method == "POST" and json.loads(body) == {"modelId": "m", "query": "numbers"}
    assert len(server.seen) == 1  # type: ignore[attr-defined]
    server.answers["/api/explanation/search-model"] = (200, json.dumps(NEURON))  # type: ignore[attr-defined]
    assert [f.description for f in client(server).search("m", "other")] == ["said"]
    server.answers["/api/explanation/search-model"] = (200, '{"results": []}')  # type: ignore[attr-defined]
    assert client(server).search("m", "nothing") == []
    server.answers["/api/explanation/search-model"] = (200, "{}")  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="without a list of results"):
        client(server).search("m", "third")


def test_a_search_goes_on_where_a_page_ends(server: ThreadingHTTPServer) -> None:
    server.answers["/api/explanation/search-model"] = (200, json.dumps(FOUND | {"hasMore": True, "nextOffset": 3}))  # type: ignore[attr-defined]
    assert [f.index for f in client(server, cache_enabled=False).search("m", "numbers", top_k=5)] == [0, 1, 2, 0, 1]
    bodies = [json.loads(body) for _, _, body, _ in server.seen]  # type: ignore[attr-defined]
    assert bodies == [{"modelId": "m", "query": "numbers"}, {"modelId": "m", "query": "numbers", "offset": 3}]
    server.answers["/api/explanation/search-model"] = (200, '{"results": [], "nextOffset": 3}')  # type: ignore[attr-defined]
    assert client(server, cache_enabled=False).search("m", "numbers", top_k=5) == []


def test_arguments(server: ThreadingHTTPServer) -> None:
    with pytest.raises(InputError, match="'ftp://x' is not an address of http"):
        NeuronpediaClient("ftp://x")
    with pytest.raises(InputError, match="timeout: 0.0 is not allowed"):
        NeuronpediaClient(timeout=0.0)
    with pytest.raises(InputError, match="top_k: 0 is not allowed"):
        client(server).search("m", "numbers", top_k=0)
    with pytest.raises(InputError, match="query: 'ab' is too short; Neuronpedia searches for 3 letters or more"):
        client(server).search("m", "ab")
