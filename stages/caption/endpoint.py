"""An OpenAI-compatible endpoint (chat completions), such as a vLLM server of one's own."""

import asyncio
import base64
import os
from collections.abc import Sequence
from typing import Any

import aiohttp
import numpy as np
from pydantic import BaseModel, Field, ValidationError

from schemas.arrays import Image
from schemas.errors import LostError, PlanError, ShardError, first_line
from stages.models.backends import ModelCard
from stages.models.torch_backend import Together
from stages.pixels.images import encode_jpeg
from stages.runtime import Device
from stages.settings import Settings

_BACKOFF_S = 0.5
"""Before the first further attempt; doubles with each."""
_MAX_BODY = 1 << 20
_SHOWN = 200
"""Characters of a failure that are shown: a stranger wrote them."""
_QUALITY = 95
_TRANSIENT = {408, 409, 425, 429, *range(500, 600)}
_WRONG = {*range(300, 400), 401, 402, 404, 405, 413}
"""The address (that of http where there is https), key, account, model or size: no photo, or few, would fare better."""
_REFUSED = ("content_filter", "content_policy_violation")


class _Transient(Exception):
    """An attempt failed in a manner that may pass; `wait` is what the server wants, seconds."""

    def __init__(self, message: str, wait: float = 0) -> None:
        super().__init__(message)
        self.wait = wait


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)


class Endpoint:
    """Several requests at a time, at temperature 0. Follows no redirect: the key is for this host alone."""

    batch = 1 << 16  # as many as there are

    def __init__(self, settings: Settings, device: Device) -> None:
        self._settings = settings.caption
        self._url = settings.models.captioner.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self._key = _key(settings)
        # threads share one bound on requests at a time
        self._together = Together(lambda _, images: asyncio.run(self._captions(images)))

    @classmethod
    def card(cls, settings: Settings) -> ModelCard:
        _key(settings)  # a key that is not there is no surprise for the workers
        return ModelCard(settings.caption.model, "captioner", "", "as its provider says", commercial=True)

    def caption(self, images: Sequence[Image]) -> list[str]:
        """Captions of the pictures.

        Raises:
            ShardError: when the endpoint fails at one of them, after all attempts; says how.
            LostError: when it will answer nothing as it is called.
        """
        return self._together((None, image) for image in images)

    async def _captions(self, images: Sequence[Image]) -> list[str]:
        gate, headers = asyncio.Semaphore(self._settings.concurrency), {"Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=None)) as session:
            return await asyncio.gather(*(self._caption(session, gate, image) for image in images))

    async def _caption(self, session: aiohttp.ClientSession, gate: asyncio.Semaphore, image: Image) -> str:
        """The caption of a picture; tries again after what may pass, as long as there is time."""
        settings, failure = self._settings, "no answer"
        try:
            async with gate, asyncio.timeout(settings.timeout_s) as limit:
                for attempt in range(settings.retries + 1):
                    try:
                        return await self._answer(session, image)
                    except _Transient as error:
                        failure, wait = str(error), max(error.wait, _BACKOFF_S * 2**attempt)
                    except (aiohttp.ClientError, OSError) as error:
                        failure, wait = first_line(error), _BACKOFF_S * 2**attempt
                    if attempt == settings.retries or asyncio.get_running_loop().time() + wait > (limit.when() or 0):
                        break
                    await asyncio.sleep(wait)
        except TimeoutError:
            failure += f", {settings.timeout_s:g} s are over"
        raise self._error(failure)

    async def _answer(self, session: aiohttp.ClientSession, image: Image, *, is_grey: bool = False) -> str:
        picture = base64.b64encode(encode_jpeg(image, _QUALITY)).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}},
            {"type": "text", "text": self._settings.prompt},
        ]
        question: dict[str, Any] = {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._settings.max_tokens,
            "temperature": 0,
            "seed": 0,
        }
        async with session.post(self._url, json=question, allow_redirects=False) as response:
            body = bytearray()
            async for chunk in response.content.iter_chunked(1 << 16):
                body += chunk
                if len(body) > _MAX_BODY:
                    raise _Transient(f"an answer of more than {_MAX_BODY:,} bytes")
            status, after = response.status, response.headers.get("Retry-After", "")
        if status in _TRANSIENT:
            raise _Transient(f"HTTP {status}", float(after) if after.isdecimal() and after.isascii() else 0)
        text = body.decode(errors="replace")
        if status == 400 and any(word in text for word in _REFUSED):
            return ""
        answer = f"HTTP {status}, {text.strip() or 'without a word'}"
        if 400 <= status < 500 and status not in _WRONG and not is_grey:
            # This photo, or any? One of its size with nothing to see tells: where that is refused too, the run stops.
            await self._answer(session, np.full_like(image, 127), is_grey=True)
            return ""
        if 300 <= status < 500:
            raise LostError(
                f"The endpoint of models.captioner refuses ({self._shown(answer)}), so the run stops: see that its "
                "address is right, and caption.model, caption.api_key_env, caption.max_side; the same command goes on."
            )
        if status != 200:
            raise self._error(answer)
        try:
            choice = _Completion.model_validate_json(bytes(body)).choices[0]
        except ValidationError as error:
            raise _Transient("an answer that is no chat completion") from error
        return "" if choice.finish_reason == "content_filter" else choice.message.content or ""

    def _error(self, failure: str) -> ShardError:
        return ShardError(
            f"The endpoint of models.captioner gave no caption ({self._shown(failure)}): a rerun asks it again."
        )

    def _shown(self, failure: str) -> str:
        text = failure.replace(self._key, "***") if self._key else failure
        return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())[:_SHOWN]


def _key(settings: Settings) -> str:
    """The key, empty where none is needed."""
    name = settings.caption.api_key_env
    key = os.environ.get(name, "").strip() if name else ""
    if name and not (key and key.isascii() and key.isprintable()):
        raise PlanError(f"The environment variable {name} (caption.api_key_env) holds no key: set it.")
    return key
