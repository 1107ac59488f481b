"""Bodies of chat and completion requests, checked beyond vLLM's schema before an engine sees them.

vLLM's models take messages that its engine cannot read: without a role, in another format, with
lists that are only looked at when somebody walks through them. Its own checks before the schema
trip over values of another type. Both became server errors; here they are refused, by name.
"""

from __future__ import annotations

from typing import Any

from pydantic import ModelWrapValidatorHandler, ValidationError, model_validator
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest

from actors.serving.refusals import RefusedError, complaint

# What vLLM's checks raise where a value has a type that they do not expect.
TRIPPED = (AttributeError, KeyError, OverflowError, RecursionError, TypeError)
LISTS = ("content", "tool_calls")


class ChatBody(ChatCompletionRequest):  # type: ignore[misc]
    """A chat request whose messages are plain data with roles."""

    @model_validator(mode="wrap")
    @classmethod
    def checked(cls, data: Any, handler: ModelWrapValidatorHandler[ChatBody]) -> ChatBody:
        """Check, parse, and unpack the messages' lists.

        Raises:
            RefusedError: names the field, such as ``messages[0].role``.
        """
        given = data.get("messages") if isinstance(data, dict) else None
        given = given if isinstance(given, list) else []  # anything else the schema refuses
        for number, message in enumerate(given):
            _check_message(message, f"messages[{number}]")
        body: ChatBody = _parse(data, handler)
        for number, (message, raw) in enumerate(zip(body.messages, given)):
            _unpack(message, raw, f"messages[{number}]")
        return body


class CompletionBody(CompletionRequest):  # type: ignore[misc]
    """A completion request."""

    @model_validator(mode="wrap")
    @classmethod
    def checked(
        cls, data: Any, handler: ModelWrapValidatorHandler[CompletionBody]
    ) -> CompletionBody:
        """Check and parse.

        Raises:
            RefusedError: names the field where one is known.
        """
        body: CompletionBody = _parse(data, handler)
        return body


def places(body: Any) -> int:
    """How many answers a request asks for at once: ``n`` for each of its prompts."""
    prompt = getattr(body, "prompt", None)
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    return max(1, body.n or 1) * (len(prompt) if several and prompt is not None else 1)


def _parse(data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
    if isinstance(data, dict) and data.get("kv_transfer_params") is not None:
        # Engines of a disaggregated service tell each other tokens in it, which nobody checks.
        message = "kv_transfer_params: it is for engines, not for clients"
        raise RefusedError(400, message, "kv_transfer_params")
    try:
        return handler(data)
    except TRIPPED as error:
        raise RefusedError(400, f"body: a value of the wrong type ({error})") from None


def _check_message(message: Any, path: str) -> None:
    if not isinstance(message, dict):
        raise RefusedError(400, f"{path}: expected an object", path)
    # The schema also takes messages in the Harmony format, which have an author instead.
    if not isinstance(message.get("role"), str):
        raise RefusedError(400, f"{path}.role: expected a role such as 'user'", f"{path}.role")
    for name in LISTS:
        value = message.get(name)
        text = name == "content" and isinstance(value, str)
        if value is not None and not text and not isinstance(value, list):
            kind = "a text or a list of parts" if name == "content" else "a list of calls"
            raise RefusedError(400, f"{path}.{name}: expected {kind}", f"{path}.{name}")


def _unpack(message: Any, raw: dict[str, Any], path: str) -> None:
    """Turn lists that can be read once, and not be sent to another process, into lists."""
    if not isinstance(message, dict):
        raise RefusedError(400, f"{path}: expected a message of a chat", path)
    for name in LISTS:
        parts = message.get(name)
        if parts is None or isinstance(parts, str | list):
            continue
        try:
            message[name] = list(parts)
        except ValidationError as error:
            raise complaint(error.errors()[0], raw.get(name), f"{path}.{name}") from None
