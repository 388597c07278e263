"""What /openapi.json says of calls and answers. Bodies are read and written elsewhere, by us.

Of answers it names what is always there. Every error, whatever its status, is one and the same
object.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel

Schema = dict[str, Any]
TEXT: Final = {"type": "string"}
COUNT: Final = {"type": "integer", "minimum": 0}
OBJECT: Final = {"type": "object"}


def _object(**fields: Schema) -> Schema:
    return {"type": "object", "properties": fields, "required": [*fields]}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def _either(*values: str) -> Schema:
    return {"type": "string", "enum": [*values]}


ERROR: Final = _object(
    error=_object(
        message=TEXT,
        type=TEXT,
        param={"type": ["string", "null"]},
        code={"type": "string", "description": "what went wrong, for programs"},
    )
)
_CARD: Final = _object(id=TEXT, object=_either("model"), created=COUNT, max_model_len=COUNT)


def _answer(kind: str, **content: Schema) -> Schema:
    choice = _object(
        index=COUNT,
        logprobs={"type": ["object", "null"]},
        finish_reason=_either("stop", "length"),
        **content,
    )
    usage = _object(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT)
    return _object(
        id=TEXT, object=_either(kind), created=COUNT, model=TEXT, choices=_list(choice), usage=usage
    )


_JSON: Final[Mapping[str, Schema]] = {
    "/version": _object(version=TEXT),
    "/load": _object(server_load=COUNT),
    "/status": _object(ready={"type": "boolean"}, workers=_list(OBJECT)),
    "/v1/models": _object(object=_either("list"), data=_list(_CARD)),
    "/v1/models/{name:path}": _CARD,
    "/openapi.json": OBJECT,
    "/v1/completions": _answer("text_completion", text=TEXT),
    "/v1/chat/completions": _answer(
        "chat.completion", message=_object(role=_either("assistant"), content=TEXT)
    ),
    "/tokenize": _object(
        count=COUNT,
        max_model_len=COUNT,
        tokens=_list(COUNT),
        token_strs={"type": ["array", "null"], "items": TEXT},
    ),
    "/detokenize": _object(prompt=TEXT),
}
_STREAMED: Final = ("/v1/completions", "/v1/chat/completions")


def responses(path: str) -> dict[int | str, dict[str, Any]]:
    """What a route answers, by status."""
    content: dict[str, Any] = {}
    if path in _JSON:
        content["application/json"] = {"schema": _JSON[path]}
    if path in _STREAMED:
        content["text/event-stream"] = {"schema": {"description": "chunks, then [DONE]"}}
    if path == "/metrics":
        content["text/plain"] = {"schema": TEXT}
    error = {"content": {"application/json": {"schema": ERROR}}}
    return {
        200: {"description": "Done", "content": content},
        "4XX": {"description": "Refused: the request, the key or its limits", **error},
        "5XX": {"description": "Not now, or a fault of ours", **error},
    }


def request(body: type[BaseModel]) -> dict[str, Any]:
    """What a call takes, as more of its operation."""
    schema = body.model_json_schema()
    inner = schema.pop("$defs", {})
    whole = _resolved(schema, {f"#/$defs/{name}": part for name, part in inner.items()})
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": whole}}}}


def _resolved(schema: Any, parts: Mapping[str, Schema]) -> Any:
    """With what is referred to in its place: inside a larger document references lead nowhere."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return parts[schema["$ref"]]
        return {name: _resolved(value, parts) for name, value in schema.items()}
    return [_resolved(part, parts) for part in schema] if isinstance(schema, list) else schema
