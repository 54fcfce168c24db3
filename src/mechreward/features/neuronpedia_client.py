"""Feature labels from Neuronpedia, over HTTP, kept on disk once they were fetched.

Answers lie under ``cache_dir()/neuronpedia``, one file a request, and are used without asking again; errors are never
kept, and every one is said: no answer is not the same as no label. Nothing but this module talks to Neuronpedia.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

from mechreward.errors import InputError
from mechreward.features.labels import Label
from mechreward.files import read_json, sha256_bytes, write_json
from mechreward.sae import cache_dir

BASE_URL = "https://www.neuronpedia.org/api"
MAX_BYTES = 32 * 2**20
"""Longest answer that is read."""
QUERY_LETTERS = 3
"""Shortest query that Neuronpedia searches for."""


@dataclass(frozen=True)
class NeuronpediaFeature:
    """One feature as Neuronpedia has it."""

    model_id: str
    sae_id: str
    """Its "source", such as `20-gemmascope-res-16k`."""
    index: int
    description: str
    """Its first explanation; empty if nobody has written one."""
    raw: Mapping[str, Any]
    """The whole answer."""

    def label(self) -> Label | None:
        """The description as a label; None if there is none."""
        return Label(self.index, self.description, "neuronpedia") if self.description.strip() else None


class NeuronpediaClient:
    """Asks for features by id, and for features by what is said of them.

    Args:
        base_url: where the API is; `http://localhost:3000/api` for an instance of one's own.
        api_key: sent as `x-api-key`; search needs one.
        timeout: seconds until a request counts as failed.
        cache_enabled: keep answers, and use kept ones.

    Raises:
        InputError: if the address is not one of http or https, or the timeout is not positive.
    """

    def __init__(
        self, base_url: str = BASE_URL, api_key: str | None = None, timeout: float = 30.0, cache_enabled: bool = True
    ) -> None:
        if urlsplit(base_url).scheme not in ("http", "https"):
            raise InputError(f"base_url: {base_url!r} is not an address of http or https")
        if timeout <= 0:
            raise InputError(f"timeout: {timeout} is not allowed; it must be more than 0 seconds")
        self.base_url, self.api_key, self.timeout = base_url.rstrip("/"), api_key, timeout
        self.cache_enabled = cache_enabled

    def get_feature(self, model_id: str, sae_id: str, feature_index: int) -> NeuronpediaFeature:
        """One feature.

        Raises:
            InputError: if Neuronpedia cannot be reached, refuses, has no such feature or answers something else.
        """
        parts = "/".join(quote(str(part), safe="") for part in (model_id, sae_id, feature_index))
        return self._ask(f"{self.base_url}/feature/{parts}", None, _feature)

    def search(self, model_id: str, query: str, top_k: int = 10) -> list[NeuronpediaFeature]:
        """The first `top_k` features of a model whose explanations match the query; an empty list is an answer.

        Raises:
            InputError: as `get_feature`, if `top_k` is less than 1, or the query shorter than Neuronpedia takes.
        """
        if top_k < 1:
            raise InputError(f"top_k: {top_k} is not allowed; it must be at least 1")
        if len(query) < QUERY_LETTERS:
            raise InputError(f"query: {query!r} is too short; Neuronpedia searches for {QUERY_LETTERS} letters or more")
        # All SAEs of a model are searched here; `/explanation/search` refuses a body without a list of them.
        url, found, offset = f"{self.base_url}/explanation/search-model", list[NeuronpediaFeature](), 0
        while offset is not None and len(found) < top_k:
            body = {"modelId": model_id, "query": query} | ({"offset": offset} if offset else {})
            page, offset = self._ask(url, body, _page)
            found += page
        return found[:top_k]

    def _ask(self, url: str, body: dict[str, Any] | None, parse: Callable[[Any], Any]) -> Any:
        """The parsed answer, kept once it could be parsed."""
        data = None if body is None else json.dumps(body, sort_keys=True).encode()
        if not self.cache_enabled:
            return parse(self._fetch(url, data))
        path = cache_dir() / "neuronpedia" / f"{sha256_bytes(url.encode(), b' ', data or b'')}.json"
        if path.is_file():
            return parse(read_json(path))
        answer = self._fetch(url, data)
        parsed = parse(answer)
        write_json(path, answer)
        return parsed

    def _fetch(self, url: str, data: bytes | None) -> Any:
        headers = {"Accept": "application/json", "User-Agent": "mechreward", "Content-Type": "application/json"}
        if self.api_key is not None:
            headers["x-api-key"] = self.api_key
        try:
            with urlopen(Request(url, data, headers), timeout=self.timeout) as answer:
                text = answer.read(MAX_BYTES + 1)
        except HTTPError as error:
            raise InputError(f"neuronpedia: {url} answered {error.code}, {_advice(error.code)}") from error
        except (URLError, HTTPException, OSError) as error:
            raise InputError(
                f"neuronpedia: cannot reach {url} ({error}); labels need a network, or a cache that holds them"
            ) from error
        if len(text) > MAX_BYTES:
            raise InputError(f"neuronpedia: {url} answered more than {MAX_BYTES} bytes")
        try:
            return json.loads(text, parse_constant=_refuse)
        except ValueError as error:
            raise InputError(f"neuronpedia: {url} answered something that is not JSON") from error


def _feature(answer: Any) -> NeuronpediaFeature:
    try:
        explanations = answer.get("explanations") or [{"description": answer.get("description") or ""}]
        description = str(explanations[0]["description"])
        names = str(answer["modelId"]), str(answer["layer"])
        return NeuronpediaFeature(*names, int(answer["index"]), description, answer)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError("neuronpedia: the answer is no feature; modelId, layer and index are needed") from error


def _page(answer: Any) -> tuple[list[NeuronpediaFeature], int | None]:
    """The features of one page of a search, and where the next one begins; None if there is no more."""
    if not isinstance(answer, dict) or not isinstance(answer.get("results"), list):
        raise InputError("neuronpedia: a search was answered without a list of results")
    offset = answer.get("nextOffset") if answer["results"] else None
    return [_feature(_of_result(result)) for result in answer["results"]], offset


def _of_result(result: Any) -> Any:
    """A search result's feature: its `neuron`, where it has one, under the words that were found."""
    if isinstance(result, dict) and isinstance(result.get("neuron"), dict) and "description" in result:
        # A neuron brings all its explanations along, and the one that was found need not be the first.
        return {**result["neuron"], "explanations": [{"description": result["description"]}]}
    return result


def _advice(code: int) -> str:
    known = {401: "give an api_key", 403: "give an api_key", 404: "it has no such feature", 429: "wait and ask again"}
    return known.get(code, "ask again later")


def _refuse(name: str) -> float:
    raise ValueError(name)
