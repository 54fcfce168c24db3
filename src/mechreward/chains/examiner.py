"""The EXAMINER: any second model, asked by text. A local Hugging Face model, or an OpenAI-compatible endpoint.

`Examiner` is the protocol; `LocalExaminer` and `EndpointExaminer` keep it. An answer that does not come (down, slow, an
error of the server, a body that is no chat completion) is an `ExaminerError`, and so is one that says nothing usable:
`Patience` asks again after a growing wait, and `examine` (`claims.py`) then skips the request and counts it. What a
server refuses for good (an unknown model, a wrong key) is bad input and stops at once.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from mechreward.errors import InputError
from mechreward.models import LoadedModel
from mechreward.rollout import sample_responses
from mechreward.tasks import Question

RETRIED = (408, 425, 429)
"""HTTP statuses below 500 that pass with time."""


class ExaminerError(Exception):
    """No usable answer this time: down, slow, or rubbish."""


@runtime_checkable
class Examiner(Protocol):
    """A model that answers a text with a text."""

    name: str

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

    @property
    def name(self) -> str:
        return self.loaded.name

    def ask(self, prompt: str) -> str:
        question = Question("examiner", prompt, "")
        responses = sample_responses(
            self.loaded,
            [question],
            n=1,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            chat=self.chat,
        )
        return responses[0].text


@dataclass(frozen=True)
class EndpointExaminer:
    """An OpenAI-compatible server, such as `vllm serve`; asked at `{url}/chat/completions`."""

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
        if not self.url.startswith(("http://", "https://")):
            raise InputError(f"url: {self.url!r} is no address; give one such as http://localhost:8000/v1")
        if not self.timeout > 0:
            raise InputError(f"timeout: {self.timeout} is not allowed; it must be above 0 seconds")

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
            if error.code < 500 and error.code not in RETRIED:
                why = f"{address} answers {error.code} {error.reason}"
                raise InputError(f"examiner: {why} for {self.name!r}; check address, model and key") from error
            raise ExaminerError(f"{address} answers {error.code}") from error
        except (OSError, ValueError) as error:  # no connection, timeout; not JSON, not UTF-8
            raise ExaminerError(f"{address}: {error}") from error


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
