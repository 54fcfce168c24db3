"""The EXAMINER: any second model, asked by text. A local Hugging Face model, or an OpenAI-compatible endpoint.

`Examiner` is the protocol; `LocalExaminer` and `EndpointExaminer` keep it. An answer that does not come (down, slow, an
error of the server, a body that is no chat completion, a prompt that is too long) is an `ExaminerError`, and so is one
that says nothing usable: `Patience` asks again after a growing wait, and `examine` (`claims.py`) then skips the request
and counts it. What no request can get past (an unknown model, a wrong key) is bad input and stops at once.
"""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

from transformers import PreTrainedTokenizerBase

from mechreward.errors import InputError
from mechreward.models import LoadedModel
from mechreward.rollout import sample_responses, tokenise_prompts
from mechreward.tasks import Question

FINAL = (401, 403, 404)
"""HTTP statuses that any request would get: wrong key, no right, no such address or model."""
SHOWN = 200
"""Characters of an error's body that are passed on."""


class ExaminerError(Exception):
    """No usable answer this time: down, slow, or rubbish."""


@runtime_checkable
class Examiner(Protocol):
    """A model that answers a text with a text."""

    @property
    def name(self) -> str:
        """Which model it is."""
        ...

    def ask(self, prompt: str) -> str:
        """The answer. Raises ExaminerError if there is none this time, InputError if there never will be."""
        ...


@dataclass(frozen=True)
class LocalExaminer:
    """A Hugging Face model on this machine; greedy by default."""

    loaded: LoadedModel
    max_new_tokens: int = 256
    temperature: float = 0.0
    chat: bool = True
    """Put prompts into the tokenizer's chat template."""
    _times: Counter[str] = field(default_factory=Counter, init=False, repr=False, compare=False)
    """How often each prompt was asked: asked again, a sampled answer is drawn anew."""

    @property
    def name(self) -> str:
        return self.loaded.name

    def ask(self, prompt: str) -> str:
        question = Question("examiner", defused(prompt, self.loaded.tokenizer), "")
        if self.chat and self.loaded.tokenizer.chat_template is None:
            raise InputError(f"chat: the tokenizer of {self.loaded.name} has no chat template; ask it with chat=False")
        try:
            tokenise_prompts(self.loaded, [question], max_new_tokens=self.max_new_tokens, chat=self.chat)
        except InputError as error:  # of this prompt, such as one that is too long
            raise ExaminerError(str(error)) from error
        responses = sample_responses(
            self.loaded,
            [question],
            n=1,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            chat=self.chat,
            seed=self._times[prompt],
        )
        self._times[prompt] += 1
        return responses[0].text


def defused(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text with a space inside each of the tokenizer's control tokens.

    What is judged is a model's own text, and a policy may learn to write the token that ends the user's turn, after
    which it would speak as the examiner.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(special, key=len, reverse=True)
    pattern = "|".join(re.escape(token) for token in longest_first if len(token) > 1)
    return re.sub(pattern, lambda found: f"{found[0][0]} {found[0][1:]}", text) if pattern else text


@dataclass(frozen=True)
class EndpointExaminer:
    """An OpenAI-compatible server, such as `vllm serve`; asked at `{url}/chat/completions`.

    Which control tokens its model has is not known here: to keep those that stand in a judged answer from being read as
    such is the server's part.
    """

    url: str
    """Up to and with the version: `http://localhost:8000/v1`."""
    name: str
    """Of the model, as the server knows it."""
    key: str | None = field(default=None, repr=False)
    max_tokens: int = 512
    temperature: float = 0.0
    timeout: float = 60.0
    """Seconds without a byte from the server after which an answer counts as not given."""

    def __post_init__(self) -> None:
        if not _is_address(self.url):
            raise InputError(f"url: {self.url!r} is no address; give one such as http://localhost:8000/v1")
        if self.key and not re.fullmatch(r"[!-~]+", self.key):
            # The key itself is not shown: errors are printed and written to files.
            raise InputError("key: holds a space, a line break or a letter that is not ASCII; give the key alone")
        if self.max_tokens < 1:
            raise InputError(f"max_tokens: {self.max_tokens} is too small; it must be at least 1")
        if not 0 <= self.temperature < inf:
            raise InputError(f"temperature: {self.temperature} is not allowed; it must be 0 or a positive number")
        if not 0 < self.timeout < inf:
            raise InputError(f"timeout: {self.timeout} is not allowed; it must be above 0 seconds, and finite")

    def ask(self, prompt: str) -> str:
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        address = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                return _content(json.loads(reply.read()))
        except urllib.error.HTTPError as error:
            if error.code in FINAL:
                why = f"{address} answers {error.code} {error.reason}"
                raise InputError(f"examiner: {why} for {self.name!r}; check address, model and key") from error
            raise ExaminerError(f"{address} answers {error.code}: {_said(error)}") from error
        # No connection, timeout; half a reply, or none of HTTP; not JSON, not UTF-8.
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ExaminerError(f"{address}: {error}") from error


def _is_address(url: str) -> bool:
    """Whether it is http(s) with a host, and a port in range if it names one."""
    try:
        parts = urlsplit(url)
        plain = not re.search(r"[\s\x00-\x1f\x7f]", url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and plain
    except ValueError:  # of a port that is no number or too large, or half an IPv6 address
        return False


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(4 * SHOWN).decode(errors="replace")[:SHOWN]
    except (OSError, http.client.HTTPException):
        return str(error.reason)


def _content(reply: Any) -> str:
    try:
        content = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ExaminerError("the reply is no chat completion") from error
    if not isinstance(content, str) or not content.strip():
        raise ExaminerError("the reply is empty")
    return content


@dataclass(frozen=True)
class Patience:
    """How often an examiner is asked the same again, and how long it is given in between."""

    tries: int = 3
    wait: float = 1.0
    """Seconds before the second try; twice as long before each further one."""
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise InputError(f"tries: {self.tries} is too small; it must be at least 1")
        if not 0 <= self.wait < inf:
            raise InputError(f"wait: {self.wait} is not allowed; it must be 0 seconds or more, and finite")

    def ask(self, examiner: Examiner, prompt: str, read: Callable[[str], str]) -> str:
        """What `read` makes of the answer; it raises ExaminerError for rubbish, which is asked again too.

        Raises:
            ExaminerError: of the last try.
        """
        for attempt in range(self.tries - 1):
            try:
                return read(examiner.ask(prompt))
            except ExaminerError:
                self.sleep(self.wait * 2**attempt)
        return read(examiner.ask(prompt))
