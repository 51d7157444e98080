"""JSON schemas whose texts are short, and a checker for their keywords."""

import re
from typing import Any


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


NAME = {"type": "string", "maxLength": 20}
SMALL = {"type": "integer", "minimum": -100, "maximum": 100}  # of unbounded numbers a small model may never end
SCHEMAS: dict[str, dict[str, Any]] = {
    "an enum": _object(sentiment={"enum": ["positive", "negative", "neutral"]}, is_sure={"type": "boolean"}),
    "numbers": _object(age={"type": "integer", "minimum": 0, "maximum": 120}, score={"type": "number", "maximum": 10}),
    "a text": _object(title={"type": "string", "minLength": 3, "maxLength": 40}),
    "nested objects": _object(person=_object(name=NAME, address=_object(city=NAME, floor=SMALL))),
    "an array": _object(tags={"type": "array", "items": NAME, "minItems": 2, "maxItems": 4}),
    "an array of objects": {
        "type": "array",
        "items": _object(city=NAME, is_capital={"type": "boolean"}),
        "minItems": 1,
        "maxItems": 3,
    },
    "a pattern": _object(date={"type": "string", "pattern": "^[12][0-9]{3}-[01][0-9]-[0-3][0-9]$"}),
    "a choice": _object(answer={"anyOf": [SMALL, {"type": "null"}, NAME]}),
    "optional fields": {**_object(name=NAME, note=NAME, year=SMALL), "required": ["name"]},
    "a reference": {"$defs": {"point": _object(x=SMALL, y=SMALL)},
                    **_object(start={"$ref": "#/$defs/point"}, end={"$ref": "#/$defs/point"})},
}  # fmt: skip
_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def follows(value: Any, schema: dict[str, Any], root: dict[str, Any] | None = None) -> bool:
    """Whether a value follows a schema, as far as the schemas above have keywords."""
    root = root or schema
    assert schema.keys() <= {"$ref", "$defs", "type", "enum", "anyOf", "properties", "required",
                             "additionalProperties", "items", "minItems", "maxItems", "minLength", "maxLength",
                             "minimum", "maximum", "pattern"}  # fmt: skip
    if "$ref" in schema:
        return follows(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "enum" in schema:
        return value in schema["enum"]
    if "anyOf" in schema:
        return any(follows(value, each, root) for each in schema["anyOf"])
    kind = schema["type"]
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return False
    if kind == "object":
        properties = schema.get("properties", {})
        extra = value.keys() - properties.keys()
        return (
            value.keys() >= set(schema.get("required", ()))
            and not (extra and schema.get("additionalProperties") is False)
            and all(follows(value[name], properties[name], root) for name in value.keys() - extra)
        )
    if kind == "array":
        is_long_enough = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return is_long_enough and all(follows(item, schema["items"], root) for item in value)
    if kind == "string":
        is_long_enough = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
        return is_long_enough and re.search(schema.get("pattern", ""), value) is not None
    return kind not in ("integer", "number") or schema.get("minimum", value) <= value <= schema.get("maximum", value)
