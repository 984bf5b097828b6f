"""The loader of YAML files, whose plain values are what YAML 1.1 and 1.2 both take them for."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from zarrtrace.scenarios.written_numbers import written_number

# PyYAML reads YAML 1.1, in which 12:30 is 750, 0123 is 83 and no is false. YAML 1.2 dropped these,
# and nobody who writes a prompt means them. What only 1.2 reads as a number, such as 1e3 and 0o17,
# is text to PyYAML and stays it.
_PLAIN = {
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": ("true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": ("[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"(?:[-+]?[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": ("<<", ["<"]),
}


def _number(loader: Any, node: Any) -> float:
    is_whole = node.tag.endswith(":int")
    number: float = (loader.construct_yaml_int if is_whole else loader.construct_yaml_float)(node)
    if isinstance(number, float) and not math.isfinite(number):
        return number  # .inf and .nan are YAML's words, and not a prompt's
    try:
        return written_number(number, node.value)
    except ValueError:  # more than the 4,300 digits that Python writes: refused where it is text
        return number


#: Loads values without objects of Python; numbers are texts of the file where they become text.
YAMLLoader: Any = type(
    "YAMLLoader",
    (getattr(yaml, "CSafeLoader", yaml.SafeLoader),),
    {"yaml_implicit_resolvers": {}},
)
for _name, (_pattern, _first) in _PLAIN.items():
    YAMLLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first
    )
for _name in ("int", "float"):
    YAMLLoader.add_constructor(f"tag:yaml.org,2002:{_name}", _number)
