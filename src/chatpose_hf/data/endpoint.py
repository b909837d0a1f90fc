"""A language model behind an address that speaks OpenAI's protocol: questions and pictures in, JSON objects out."""

import base64
import hashlib
import io
import json
import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image


_MAX_ANSWERS = 3  # asked for before a question counts as one that the model cannot answer
_MAX_RETRIES = 5  # of one request, where the server is busy, broken or slow
_TIMEOUT = 120  # seconds
# Of an answer: looking for JSON in more would take long, and no answer of ours is a tenth of that.
_MAX_LETTERS = 20_000
_TRAILING_COMMA = re.compile(r",(?=\s*[}\]])")
_ADVICE = {
    400: "the model's name, whether it takes pictures, and the temperature",
    401: "the key: the argument `api_key` or the environment variable OPENAI_API_KEY",
    403: "whether the key may use this model",
    404: "the base URL, which ends in /v1 at most servers, and the model's name",
    429: "the account's limits, or ask with a lower `concurrency`",
}


class Endpoint:
    """
    A model at an OpenAI-compatible server, a company's or one's own. What it is told leaves this machine.

    Every answer goes into the cache at once, so a run that was killed asks only what is still open. Can be pickled:
    each process makes its own client. The key is sent to the server and shown nowhere.

    Args:
        base_url (`str`, *optional*):
            Such as `http://localhost:8000/v1`; that of the environment variable `OPENAI_BASE_URL` where it is `None`.
        model (`str`): the server's name for it.
        api_key (`str`, *optional*): that of the environment variable `OPENAI_API_KEY` by default; servers of one's own
            want none.
        temperature (`float`, *optional*, defaults to 0.2): of sampling.
        cache (`str` or `Path`, *optional*): a JSONL file of answers, made where it is absent.
        concurrency (`int`, *optional*, defaults to 4): requests at once.

    Raises:
        ImportError: where the client is not installed.
    """

    def __init__(
        self,
        base_url: str | None,
        model: str,
        api_key: str | None = None,
        temperature: float = 0.2,
        cache: str | Path | None = None,
        concurrency: int = 4,
    ):
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise ImportError("asking a model needs the package openai: pip install 'chatpose_hf[build]'") from error
        base_url = base_url or os.environ.get("OPENAI_BASE_URL") or ""
        if "@" in urlsplit(base_url).netloc:
            raise ValueError("expected a base URL without a name and a password: errors show it; the key goes apart")
        if not base_url.startswith(("http://", "https://")) or not model:
            raise ValueError(
                f"expected an http(s) URL (or OPENAI_BASE_URL) and a model's name, got {base_url!r} and {model!r}"
            )
        if concurrency < 1:
            raise ValueError(f"expected a concurrency of at least 1, got {concurrency}")
        self.base_url, self.model, self.temperature, self.concurrency = base_url, model, temperature, concurrency
        self.cache = None if cache is None else Path(cache)
        self._api_key = api_key
        self._reset()

    def __repr__(self) -> str:
        return f"Endpoint({self.base_url!r}, {self.model!r}, temperature={self.temperature})"

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in ("_client", "_answers", "_lock")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._reset()

    def _reset(self) -> None:
        self._client = None
        self._answers: dict[str, dict] | None = None
        self._lock = threading.Lock()

    def settings(self) -> dict[str, str | float]:
        """What the answers depend on."""
        return {"model": self.model, "temperature": self.temperature}

    def ask(self, prompt: str, images: Sequence[bytes] = ()) -> dict | None:
        """
        Args:
            prompt (`str`): says what JSON object is wanted.
            images (`Sequence[bytes]`, *optional*): encoded pictures, sent with the prompt.

        Returns:
            `dict`, *optional*: the object; `None` where the model gave none in 3 answers.

        Raises:
            ValueError: where the server refuses, or cannot be reached after some tries; says what to check.
        """
        key = self._key(prompt, images)
        with self._lock:
            answer = self._known().get(key)
        if answer is not None:
            return answer
        content = [{"type": "text", "text": prompt}, *({"type": "image_url", "image_url": _url(im)} for im in images)]
        for _ in range(_MAX_ANSWERS):
            answer = parse_object(self._request(content))
            if answer is not None:
                with self._lock:
                    self._remember(key, answer)
                return answer
        return None

    def ask_all(self, questions: Iterable[tuple[str, Sequence[bytes]]]) -> Iterator[dict | None]:
        """
        The answers to prompts with their pictures, in order, `concurrency` at once; as [`Endpoint.ask`].

        Questions are taken a few ahead of the answers: who takes no more answers asks, and pays for, no more.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            waiting: deque[Future] = deque()
            try:
                for prompt, images in questions:
                    waiting.append(pool.submit(self.ask, prompt, images))
                    if len(waiting) == 2 * self.concurrency:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # what the server refused once it need not see again

    def _request(self, content: list[dict]) -> object:
        """The model's words, if the reply has any."""
        import openai

        key = (self._api_key or os.environ.get("OPENAI_API_KEY", "")).strip()  # files end with a new line
        if not (key.isascii() and key.isprintable()):
            raise ValueError("expected a key of printable ASCII letters, got others; check how it was copied")
        with self._lock:
            if self._client is None:
                # The client wants a key even where the server does not.
                self._client = openai.OpenAI(
                    base_url=self.base_url, api_key=key or "none", max_retries=_MAX_RETRIES, timeout=_TIMEOUT
                )
        try:
            completion = self._client.chat.completions.create(
                model=self.model, temperature=self.temperature, messages=[{"role": "user", "content": content}]
            )
            return completion.choices[0].message.content
        except openai.APIStatusError as error:
            advice = _ADVICE.get(error.status_code, "the server's log, and try again later")
            words = str(error.message)
            words = (words.replace(key, "***") if key else words)[:300]
            # Not `from error`, whose words may hold the key.
            raise ValueError(
                f"{self.base_url} answered {error.status_code} for the model {self.model!r}: {words}; check {advice}"
            ) from None
        except openai.APIConnectionError:  # timeouts among them
            raise ValueError(
                f"cannot reach {self.base_url} in {_MAX_RETRIES + 1} tries; check the URL, the network, and that the "
                "server runs; answers so far are kept"
            ) from None
        except (openai.APIResponseValidationError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
            return None  # a reply that is none of the protocol's

    def _key(self, prompt: str, images: Sequence[bytes]) -> str:
        digests = [hashlib.sha256(image).hexdigest() for image in images]
        asked = json.dumps([self.model, prompt, digests, float(self.temperature)])
        return hashlib.sha256(asked.encode()).hexdigest()

    def _known(self) -> dict[str, dict]:
        if self._answers is None:
            self._answers = {}
            if self.cache is not None and self.cache.exists():
                for line in self.cache.read_bytes().split(b"\n"):
                    try:
                        record = json.loads(line)
                        key, answer = record["key"], record["answer"]
                    except (ValueError, KeyError, TypeError, RecursionError):
                        continue  # an empty line, or one that a kill tore
                    if isinstance(key, str) and isinstance(answer, dict):
                        self._answers[key] = answer
        return self._answers

    def _remember(self, key: str, answer: dict) -> None:
        self._known()[key] = answer
        if self.cache is not None:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            # One write of a whole line, on a new one after what a kill may have torn: other processes add theirs.
            with open(self.cache, "ab", buffering=0) as file:
                file.write(b"\n" + json.dumps({"key": key, "answer": answer}).encode() + b"\n")
                os.fsync(file.fileno())  # answers cost money


def parse_object(text: object) -> dict | None:
    """
    The first JSON object in a model's words, after its thoughts where it shows them, whatever stands around it and with
    commas too many; `None` where there is none.
    """
    if not isinstance(text, str):
        return None
    text = text.rpartition("</think>")[2][:_MAX_LETTERS]
    mended = _TRAILING_COMMA.sub(" ", text)  # as long, so that an object begins at the same place
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        for words in (text, mended):
            try:
                return decoder.raw_decode(words, start)[0]
            except (ValueError, RecursionError):
                pass
        start = text.find("{", start + 1)
    return None


def _url(image: bytes) -> dict[str, str]:
    with Image.open(io.BytesIO(image)) as picture:
        kind = picture.get_format_mimetype()
    return {"url": f"data:{kind};base64,{base64.b64encode(image).decode()}"}
