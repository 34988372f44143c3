"""What a struct of options must say about itself, for `weft config --explain` and for users."""

from __future__ import annotations

from weft.options import fields


def undocumented(kind: type) -> list[str]:
    """What is missing, in words: a field's documentation, a number's unit or range, a type that text can be read as."""
    missing = []
    for field in fields(kind):
        number = field.type in ("number", "whole number")
        lacks = [
            words
            for words, there in (
                ("documentation", field.doc),
                ("a unit", field.unit or not number),
                ("a range", field.range or not number),
                ("a type of text, numbers, lists or tables", "object" not in field.type),
            )
            if not there
        ]
        missing += [f"{kind.__name__}.{field.name} lacks {', '.join(lacks)}"] if lacks else []
    return missing
