"""Options of an image, written as text, as nested options."""

from __future__ import annotations

from ..errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Options = dict[str, Any]


def parse_image_opts(text: str) -> Options:
    """`driver=qcow2,file.filename=x,...` as nested options. A doubled comma stands for a comma."""
    options: Options = {}
    for item in text.replace(",,", "\0").split(","):
        key, equals, value = item.replace("\0", ",").partition("=")
        if not equals or not key:
            raise UsageError(
                f"'{item}' is not of the form key=value", hint="example: driver=raw,file.filename=disk.img"
            )
        _put(options, key, value)
    return options


def parse_json(text: str) -> Options:
    """`json:{...}`, whose keys may have dots. Raises UsageError."""
    import json

    try:
        options = json.loads(text.removeprefix("json:"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"'{text}' is not valid JSON: {error}") from None
    if not isinstance(options, dict):
        raise UsageError(f"'{text}' is not a JSON object")
    return _unfold(options)


def _unfold(options: Options) -> Options:
    """Dotted keys of a JSON object as nested objects."""
    result: Options = {}
    for key, value in options.items():
        _put(result, key, _unfold(value) if isinstance(value, dict) else value)
    return result


def _put(options: Options, key: str, value: Any) -> None:
    """Set an option whose dotted key names the groups it is in."""
    *parents, last = key.split(".")
    for parent in parents:
        inner = options.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UsageError(f"option '{key}' contradicts '{parent}'")
        options = inner
    options[last] = value
