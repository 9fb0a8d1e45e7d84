"""The fields of requests for vectors and scores, and the texts in them (semantics EMB-1)."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import WithJsonSchema

from pagedcore.errors import RequestError
from pagedcore_openai.protocol import Fields, Prompt

_STRINGS = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
_TEXT_OR_TEXTS = {"anyOf": [{"type": "string", "minLength": 1}, _STRINGS]}
_DOCUMENTS = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}}},
        ]
    },
}

TextOrTexts = Annotated[Any, WithJsonSchema(_TEXT_OR_TEXTS)]
Documents = Annotated[Any, WithJsonSchema(_DOCUMENTS)]


class VectorFields(Fields):
    """What requests for vectors and scores have in common."""

    NO_EFFECT: ClassVar[frozenset[str]] = frozenset({"user", "metadata"})
    """See `Fields`."""

    model: str | None = None
    truncate_prompt_tokens: int | None = None
    priority: int | None = None


class EmbeddingRequest(VectorFields):
    """POST /v1/embeddings."""

    input: Prompt = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    pooling: Literal["last", "mean", "cls"] | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = None


class ScoreRequest(VectorFields):
    """POST /v1/score."""

    text_1: TextOrTexts = None
    text_2: TextOrTexts = None


class RerankRequest(VectorFields):
    """POST /v1/rerank."""

    query: str | None = None
    documents: Documents = None
    top_n: int | None = None
    return_documents: bool | None = None


def inputs_of(value: Any, most: int) -> list[str | list[int]]:
    """What becomes vectors, each a text or token ids; raises RequestError for anything else."""
    if isinstance(value, str) or (isinstance(value, list) and value and _are_ids(value)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise RequestError(
            "input must be a text, a list of token ids, or a list of either, and not empty", "input"
        )
    _check_count(value, most, "input")
    if not all(isinstance(item, str) for item in value) and not all(
        isinstance(item, list) and _are_ids(item) for item in value
    ):
        raise RequestError("input must hold texts, or lists of token ids", "input")
    if not all(value):
        raise RequestError("input must not hold an empty element", "input")
    return value


def pairs_of(fields: ScoreRequest, most: int) -> list[tuple[str, str]]:
    """Each text of one side with its partner; one text is the partner of all of the other side."""
    first = texts_of(fields.text_1, most, "text_1")
    second = texts_of(fields.text_2, most, "text_2")
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise RequestError(
            f"text_1 must hold one text or as many as text_2, {len(second)}, not {len(first)}",
            "text_1",
        )
    return list(zip(first, second, strict=True))


def documents_of(fields: RerankRequest, most: int) -> list[str]:
    """The texts of the documents; raises RequestError for a request that is not in order."""
    if not fields.query:
        raise RequestError("query must be a text that is not empty", "query")
    if fields.top_n is not None and fields.top_n < 1:
        raise RequestError(f"top_n must be at least 1, not {fields.top_n}", "top_n")
    documents = fields.documents
    if isinstance(documents, list):
        _check_count(documents, most, "documents")
        documents = [d.get("text") if isinstance(d, dict) else d for d in documents]
    return texts_of(documents, most, "documents")


def texts_of(value: Any, most: int, name: str) -> list[str]:
    """One text, or several, as a list."""
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and texts:
        _check_count(texts, most, name)
        if all(isinstance(text, str) and text for text in texts):
            return texts
    raise RequestError(f"{name} must hold texts that are not empty", name)


def _check_count(items: Sequence[Any], most: int, name: str) -> None:
    """Before anything looks at the elements (LIMIT-1)."""
    if len(items) > most:
        raise RequestError(f"{name} may have at most {most} entries, not {len(items)}", name)


def _are_ids(items: Sequence[Any]) -> bool:
    return all(type(item) is int for item in items)
