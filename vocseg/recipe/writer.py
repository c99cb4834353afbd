"""A recipe written back out: its resolved form as TOML, and the JSON schema that editors complete from."""

from collections.abc import Iterator
from typing import Any

from vocseg.recipe.reader import Recipe
from vocseg.recipe.schema import PLACES, Plain, table_model
from vocseg.recipe.toml import Key, write_key, write_value
from vocseg.registry import Registry


def resolved_lines(recipe: Recipe) -> Iterator[tuple[str, bool]]:
    """The resolved recipe as lines of TOML, each with whether it is a value the recipe left to its default."""
    given = {key[:n] for key in recipe.given for n in range(len(key) + 1)}
    tables: list[tuple[str, Key, dict[str, Any]]] = []
    for name, value in recipe.resolved.items():
        if isinstance(value, dict):
            tables.append((f"[{name}]", (name,), value))
        elif isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
            if not value:
                yield f"{write_key(name)} = []", (name,) not in given
            tables += [(f"[[{name}]]", (name, i), entry) for i, entry in enumerate(value)]
        else:
            yield f"{write_key(name)} = {write_value(value)}", (name,) not in given
    for header, key, table in tables:
        yield "", False
        yield header, False
        for name, value in table.items():
            yield f"{write_key(name)} = {write_value(value)}", (*key, name) not in given


def write_resolved(recipe: Recipe) -> str:
    """The resolved recipe as TOML text. Read again, it resolves to itself."""
    return "\n".join(line for line, _ in resolved_lines(recipe)) + "\n"


def json_schema(registry: Registry) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe over these components, for editors and CI.

    Raises:
        UsageError: a component has a parameter of a type that cannot be checked.
    """
    schema = Plain.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    for place in PLACES:
        options = []
        for component in registry:
            if component.kind != place.kind:
                continue
            table = table_model(place, component).model_json_schema()
            definitions |= table.pop("$defs", {})
            table["properties"]["name"] = {"const": component.name, "description": component.summary}
            definitions[f"{place.table}_{component.name}"] = table
            options.append({"$ref": f"#/$defs/{place.table}_{component.name}"})
        one: dict[str, Any] = {"oneOf": options, "description": place.core.__doc__}
        schema["properties"][place.table] = {"type": "array", "items": one} if place.many else one
    schema["required"] = [*(place.table for place in PLACES if place.default is None), "train"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "vocseg recipe"}
