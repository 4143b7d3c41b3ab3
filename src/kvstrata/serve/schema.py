"""Bodies of requests: what is understood, what is ignored, and what is refused because answers would differ."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from kvstrata.serve.problems import Problem

__all__ = ["ChatRequest", "CompletionRequest", "read_body"]

T = TypeVar("T", bound="_Common")

_MOST_STOPS = 4


class StreamOptions(Struct, forbid_unknown_fields=True):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Common(Struct, kw_only=True, forbid_unknown_fields=True):
    """What both kinds of request have. The last groups: ignored, and refused unless they ask for nothing."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    prompt_cache_key: Annotated[str, Meta(min_length=1, max_length=512)] | None = None

    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None

    n: int | None = None
    logprobs: Any = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    @property
    def stops(self) -> list[str]:
        """The texts at which the answer ends."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def most_tokens(self) -> int | None:
        """How many tokens are wanted at most; None where it isn't said."""
        return self.max_tokens

    def refuse(self) -> None:
        """Raise Problem for what would change the answer and isn't there."""
        neutral = {
            "n": (None, 1), "logprobs": (None, False), "logit_bias": (None, {}),
            "presence_penalty": (None, 0), "frequency_penalty": (None, 0), **self.neutral(),
        }  # fmt: skip
        for name, allowed in neutral.items():
            if getattr(self, name) not in allowed:
                raise Problem(f"{name} is not supported by this server", param=name, code="unsupported_parameter")
        if len(self.stops) > _MOST_STOPS or not all(self.stops):
            raise Problem(f"stop must be up to {_MOST_STOPS} texts, none of them empty", param="stop")

    def neutral(self) -> dict[str, tuple[Any, ...]]:
        """Fields of one kind of request, and the values with which they ask for nothing."""
        return {}


class Part(Struct):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: str


class Message(Struct):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """As chat templates want it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(_Common, kw_only=True, forbid_unknown_fields=True):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    top_logprobs: int | None = None

    @property
    def most_tokens(self) -> int | None:
        """How many tokens are wanted at most; None where it isn't said."""
        return self.max_completion_tokens or self.max_tokens

    def neutral(self) -> dict[str, tuple[Any, ...]]:
        """Fields of this kind of request, and the values with which they ask for nothing."""
        return {
            "response_format": (None, {"type": "text"}), "tools": (None, []), "tool_choice": (None, "none", "auto"),
            "top_logprobs": (None, 0),
        }  # fmt: skip


class CompletionRequest(_Common, kw_only=True, forbid_unknown_fields=True):
    """The body of /v1/completions: one prompt, as text or as tokens."""

    prompt: Any
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    def neutral(self) -> dict[str, tuple[Any, ...]]:
        """Fields of this kind of request, and the values with which they ask for nothing."""
        return {"best_of": (None, 1), "echo": (None, False), "suffix": (None, "")}

    def one_prompt(self) -> str | list[int]:
        """The prompt, also out of a list of one; raises Problem for several, or for none."""
        prompt = self.prompt
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        if isinstance(prompt, str):
            return prompt
        if isinstance(prompt, list) and prompt and all(type(token) is int and token >= 0 for token in prompt):
            return prompt
        raise Problem("prompt must be one text, or one list of tokens: send several as requests of their own",
                      param="prompt")  # fmt: skip


def read_body(body: bytes, kind: type[T], served: str) -> T:
    """Return the request in a body; raises Problem for anything that isn't one."""
    try:
        request = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        found = re.search(r"field `(\w+)`|at `\$\.(\w+)", str(error))
        param = next(filter(None, found.groups()), None) if found else None
        raise Problem(f"the request can't be used: {error}", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Problem(f"the body is no JSON: {error}") from None
    if request.model != served:
        raise Problem(
            f"the model {request.model!r} is not here; this server has {served!r}",
            status=404, param="model", code="model_not_found",
        )  # fmt: skip
    request.refuse()
    return request
