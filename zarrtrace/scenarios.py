"""Scenarios: named prompts with named spans, from templates or from a user's file.

A *span* is a set of character ranges of the prompt. It becomes token positions through the
tokenizer's offset mapping (:func:`token_positions`), never by searching token text, so that it is
exact when a number splits into several tokens or stands in the prompt twice.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import re
import stat
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from zarrtrace.errors import ScenarioError, readable

if TYPE_CHECKING:
    import xarray as xr

#: The span that every scenario has: its last token, where the model decides what to say next.
DECISION = "decision"

CharRange = tuple[int, int]

_IDENTIFIER = r"[A-Za-z_][A-Za-z0-9_]*"
_TEMPLATE_TOKEN = re.compile(
    rf"\{{\{{|\}}\}}|\{{(?P<value>{_IDENTIFIER})\}}|\[\[(?P<mark>{_IDENTIFIER}):|(?P<close>\]\])|[{{}}]"
)
# How pydantic names the members of a union within an error's location.
_UNION_MEMBER = re.compile(r"constrained-|literal\[|list\[|tuple\[|TextSpan$|(?:str|int|float)$")
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SAFE_NAME = re.compile(r"[^\W_][\w.\-]*")
_DEVICE_NAMES = frozenset(
    {"con", "prn", "aux", "nul", "clock$"}
    | {f"{port}{i}" for port in ("com", "lpt") for i in range(10)}
)
_RESERVED_NAMES = frozenset({"zarr.json", "index"}) | _DEVICE_NAMES
_MAX_NAME = 100
_MAX_FILE_BYTES = 2**28
_MAX_PROMPT = 2**22
# Scenarios need 6. libyaml builds deeper ones by recursion that overflows the stack.
_MAX_YAML_DEPTH = 50


@dataclass(frozen=True)
class Scenario:
    """A named prompt with named spans.

    Attributes
    ----------
    name
        Unique within its suite and safe as a folder name (:func:`check_name`).
    prompt
        The text the model reads, without special tokens.
    spans
        Character ranges ``(start, end)`` of `prompt` by span name, half open.
    tags
        Groups the scenario belongs to, for example ``("risky",)``.
    options
        Named continuations whose probability matters, for example ``{"bet": "1"}``.
    """

    name: str
    prompt: str
    spans: Mapping[str, tuple[CharRange, ...]] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)


# --- the file format ---------------------------------------------------------------------------

_Text = Annotated[str, StringConstraints(min_length=1)]
_SpanName = Annotated[str, StringConstraints(pattern=rf"^{_IDENTIFIER}$")]
_Scalar = str | int | float


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextSpan(_Strict):
    """A span given by literal text of the prompt."""

    text: _Text = Field(description="Literal text; it must occur in the prompt.")
    occurrence: Annotated[int, Field(ge=1)] | Literal["last", "all"] | None = Field(
        default=None, description="Which occurrence, counted from 1; needed if there are several."
    )


_Range = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
SpanEntry = _Text | TextSpan | _Range | list[_Range]


class ScenarioEntry(_Strict):
    """One scenario of a file: a prompt, or a template with its values."""

    name: str
    prompt: _Text | None = Field(default=None, description="The prompt, word for word.")
    template: _Text | None = Field(
        default=None,
        description="`{value}` takes a value, `[[span:text]]` marks a span, `{{` and `}}` are "
        "braces.",
    )
    values: dict[str, _Scalar | list[_Scalar]] = Field(
        default_factory=dict, description="Values of the template; a list is joined with ', '."
    )
    spans: dict[_SpanName, SpanEntry] = Field(
        default_factory=dict,
        description="Spans by literal text, by text and occurrence, or by character range(s) "
        "[start, end).",
        json_schema_extra={"additionalProperties": False},
    )
    tags: list[_Text] = Field(default_factory=list)
    options: dict[str, _Text] | None = Field(
        default=None, description="Continuations whose probability matters, by name."
    )


class SuiteFile(_Strict):
    """A file of scenarios, with defaults that its entries share."""

    name: str | None = None
    template: _Text | None = Field(default=None, description="Template of entries without one.")
    defaults: dict[str, _Scalar | list[_Scalar]] = Field(default_factory=dict)
    options: dict[str, _Text] = Field(default_factory=dict)
    scenarios: list[ScenarioEntry] = Field(min_length=1)


# --- reading a file ----------------------------------------------------------------------------


def load_suite(path: str | Path) -> tuple[Scenario, ...]:
    """Read scenarios from a YAML file (``.yaml``, ``.yml``) or a JSONL file (``.jsonl``).

    Parameters
    ----------
    path
        YAML holds a list under ``scenarios``; JSONL holds one such entry a line.

    Raises
    ------
    ScenarioError
        If the file cannot be read or is not valid; the message names file, line and reason.
    """
    path = Path(path)
    try:
        _refuse_odd_file(path)
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ScenarioError(
            f"{path}: no such scenario file", remedy="Give --scenarios a YAML or JSONL file."
        ) from None
    except (OSError, ValueError) as error:
        raise ScenarioError(
            f"{path}: cannot be read as UTF-8 text ({error})",
            remedy="Save the file as UTF-8 and check its permissions.",
        ) from error
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        suite, lines = _parse_jsonl(path, text)
    elif suffix in (".yaml", ".yml"):
        suite, lines = _parse_yaml(path, text)
    else:
        raise ScenarioError(
            f"{path}: unknown kind of scenario file {suffix or '(no ending)'!r}",
            remedy="Name it .yaml (a list under 'scenarios') or .jsonl (one scenario a line).",
        )
    return _build_all(path, suite, lines)


def _refuse_odd_file(path: Path) -> None:
    """Refuse what would never end, or not fit into memory, before it is read."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ScenarioError(
            f"{path}: cannot be read: not a regular file",
            why="It is a folder, a pipe or a device.",
            remedy="Give --scenarios a YAML or JSONL file.",
        )
    if status.st_size > _MAX_FILE_BYTES:
        raise ScenarioError(
            f"{path}: larger than {readable(_MAX_FILE_BYTES)}",
            why="No file of scenarios is that large; it is probably another file.",
            remedy="Check --scenarios, or split the file.",
        )


def _parse_yaml(path: Path, text: str) -> tuple[SuiteFile, list[int]]:
    loader: Any = None
    try:
        # The reader of its first characters complains at once.
        loader = _YAML_LOADER(text)
        _refuse_deep_yaml(path, text)
        node = loader.get_single_node()
        _refuse_odd_yaml(path, node)
        data = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        # What is never closed is noticed behind the last line.
        line = min(mark.line + 1, len(text.splitlines())) if mark is not None else 1
        reason = getattr(error, "problem", None) or str(error)
        raise ScenarioError(
            f"{path}:{line}: not valid YAML: {reason}",
            remedy="Check quotes, colons and indentation around that line.",
        ) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # What PyYAML's constructors make of, for example, !!int without digits.
        raise ScenarioError(
            f"{path}: not usable YAML: {type(error).__name__}",
            why="It holds a date, number or tag that is none.",
            remedy="See schema/README.md for the shape of a scenario file.",
        ) from None
    finally:
        if loader is not None:
            loader.dispose()
    try:
        suite = SuiteFile.model_validate(data)
    except ValidationError as error:
        raise _invalid(path, error, lambda loc: _line_of(node, loc)) from None
    return suite, [_line_of(node, ("scenarios", i)) for i in range(len(suite.scenarios))]


def _parse_jsonl(path: Path, text: str) -> tuple[SuiteFile, list[int]]:
    entries, lines = [], []
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line, object_pairs_hook=_refuse_double_keys)
            entries.append(ScenarioEntry.model_validate(entry))
        except ScenarioError as error:
            raise ScenarioError(f"{path}:{number}: {error.what}", remedy=error.remedy) from None
        except ValidationError as error:
            raise _invalid(path, error, lambda _loc, number=number: number) from None
        except (ValueError, RecursionError) as error:  # JSON, or an integer that is too long
            raise ScenarioError(
                f"{path}:{number}: not valid JSON: {error}",
                remedy="Each line of a .jsonl file is one JSON object: a scenario.",
            ) from None
        lines.append(number)
    if not entries:
        raise ScenarioError(f"{path}: holds no scenario", remedy="Write one JSON object a line.")
    return SuiteFile(scenarios=entries), lines


def _refuse_double_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for key, value in pairs:
        if key in entry:
            raise ScenarioError(f"key {key!r} stands twice", remedy="Keep one of the two.")
        entry[key] = value
    return entry


def _refuse_deep_yaml(path: Path, text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_YAML_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_YAML_DEPTH:
            raise ScenarioError(
                f"{path}: not usable YAML: nested too deep",
                why=f"Scenarios need 6 levels; more than {_MAX_YAML_DEPTH} are not read.",
                remedy="See schema/README.md for the shape of a scenario file.",
            )


def _refuse_odd_yaml(path: Path, root: yaml.Node | None) -> None:
    """Refuse aliases (they can expand without bound) and keys that stand twice."""
    seen: set[int] = set()
    stack = [] if root is None else [root]
    while stack:
        node = stack.pop()
        line = node.start_mark.line + 1
        if id(node) in seen:
            raise ScenarioError(
                f"{path}:{line}: YAML anchors and aliases are not supported",
                why="A few lines of them can expand to more than fits into memory.",
                remedy="Use the file's own 'template' and 'defaults' for what entries share.",
            )
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                if isinstance(key.value, str) and key.value in keys:
                    raise ScenarioError(
                        f"{path}:{key.start_mark.line + 1}: key {key.value!r} stands twice",
                        remedy="Keep one of the two.",
                    )
                keys.add(key.value if isinstance(key.value, str) else "")
                stack += [key, value]
        elif isinstance(node, yaml.SequenceNode):
            stack += node.value


def _line_of(node: yaml.Node | None, loc: Sequence[str | int]) -> int:
    """Line of the innermost YAML node on the way along `loc`."""
    if node is None:
        return 1
    for step in loc:
        if isinstance(node, yaml.MappingNode):
            children = [value for key, value in node.value if key.value == str(step)]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            children = node.value[step : step + 1]
        else:
            break
        if not children:
            break
        node = children[0]
    return int(node.start_mark.line) + 1


def _invalid(path: Path, error: ValidationError, line_of: Any) -> ScenarioError:
    first, *others = error.errors()
    if _UNION_MEMBER.match(str(first["loc"][-1:] and first["loc"][-1])):
        # None of several forms fits: the one that fits furthest is what was meant.
        alike = [e for e in others if e["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]]
        first = max([first, *alike], key=lambda e: len(e["loc"]))
    loc = tuple(step for step in first["loc"] if not _UNION_MEMBER.match(str(step)))
    where = ".".join(str(step) for step in loc) or "the file"
    remedy = "See schema/scenarios.schema.json for what an entry may hold."
    if first["type"] == "extra_forbidden":
        known = [*ScenarioEntry.model_fields, *SuiteFile.model_fields, *TextSpan.model_fields]
        close = difflib.get_close_matches(str(loc[-1]), known, n=1)
        if close:
            remedy = f"Did you mean {close[0]!r}? {remedy}"
        reason = f"unknown field {loc[-1]!r}"
    else:
        reason = first["msg"]
    return ScenarioError(f"{path}:{line_of(loc)}: {where}: {reason}", remedy=remedy)


# --- from entries to scenarios -----------------------------------------------------------------


def _build_all(path: Path, suite: SuiteFile, lines: Sequence[int]) -> tuple[Scenario, ...]:
    scenarios: list[Scenario] = []
    taken: dict[str, str] = {}
    for entry, line in zip(suite.scenarios, lines, strict=True):
        try:
            scenario = _build(entry, suite)
            key = name_key(scenario.name)
            if key in taken:
                raise ScenarioError(
                    f"scenario name {scenario.name!r} is taken by {taken[key]!r}",
                    why="Names that differ only in case or Unicode form are one folder on many "
                    "file systems.",
                    remedy="Rename one of the two.",
                )
        except ScenarioError as error:
            raise ScenarioError(
                f"{path}:{line}: {error.what}", why=error.why, remedy=error.remedy
            ) from None
        taken[key] = scenario.name
        scenarios.append(scenario)
    return tuple(scenarios)


def _build(entry: ScenarioEntry, suite: SuiteFile) -> Scenario:
    check_name(entry.name)
    if entry.prompt is not None and (entry.template is not None or entry.values):
        raise ScenarioError(
            f"scenario {entry.name!r} has a prompt and a template or values",
            remedy="Give either 'prompt', or 'template' and 'values'.",
        )
    spans: dict[str, tuple[CharRange, ...]] = {}
    template = entry.template or suite.template
    if entry.prompt is not None:
        prompt = entry.prompt
    elif template is not None:
        unused = set(entry.values) - set(_value_names(template))
        if unused:
            raise ScenarioError(
                f"scenario {entry.name!r}: value {min(unused)!r} is not in its template",
                remedy=f"The template takes: {', '.join(_value_names(template)) or 'none'}.",
            )
        prompt, spans = render_template(template, {**suite.defaults, **entry.values})
    else:
        raise ScenarioError(
            f"scenario {entry.name!r} has no prompt",
            remedy="Give it 'prompt', or 'template' (its own or the file's) and 'values'.",
        )
    _check_text(entry.name, prompt)
    occurrences = functools.cache(functools.partial(_occurrences, prompt))
    for name, given in entry.spans.items():
        if name == DECISION:
            raise ScenarioError(
                f"scenario {entry.name!r}: span {DECISION!r} is always the last token",
                remedy="Give your span another name.",
            )
        spans[name] = (
            *spans.get(name, ()),
            *_find_span(entry.name, name, given, prompt, occurrences),
        )
    return Scenario(
        name=entry.name,
        prompt=prompt,
        spans={name: tuple(sorted(set(ranges))) for name, ranges in spans.items()},
        tags=tuple(dict.fromkeys(entry.tags)),
        options=suite.options if entry.options is None else entry.options,
    )


def _check_text(name: str, prompt: str) -> None:
    if not prompt.strip():
        raise ScenarioError(f"scenario {name!r}: its prompt is empty", remedy="Give it text.")
    if len(prompt) > _MAX_PROMPT:
        raise ScenarioError(
            f"scenario {name!r}: its prompt has {len(prompt):,} characters",
            why=f"Up to {_MAX_PROMPT:,} are read, about a million tokens.",
            remedy="Shorten it, or split it into several scenarios.",
        )


def check_name(name: str) -> str:
    """Return `name` if it is safe as a folder and Zarr node name.

    Raises
    ------
    ScenarioError
        If it is empty, too long, reserved, or could leave its folder.
    """
    rule = (
        "A name starts with a letter or digit and goes on with letters, digits, '_', '-' or '.', "
        f"at most {_MAX_NAME} in all; it becomes a folder of the run."
    )
    problem = ""
    if not name:
        problem = "is empty"
    elif len(name.encode("utf-8", "replace")) > _MAX_NAME:
        problem = f"is longer than {_MAX_NAME} bytes"
    elif not _SAFE_NAME.fullmatch(name) or name.endswith("."):
        problem = "is not safe as a folder name"
    elif unicodedata.normalize("NFC", name) != name:
        problem = "is not in Unicode normal form NFC"
    elif name.casefold() in _RESERVED_NAMES or name.casefold().split(".")[0] in _DEVICE_NAMES:
        problem = "is reserved"
    if problem:
        shown = ascii(name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}...")
        raise ScenarioError(f"scenario name {shown} {problem}", remedy=rule)
    return name


def name_key(name: str) -> str:
    """Return what two names share if a file system may take them for one."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def _value_names(template: str) -> list[str]:
    found = (match["value"] for match in _TEMPLATE_TOKEN.finditer(template))
    return list(dict.fromkeys(name for name in found if name))


def render_template(
    template: str, values: Mapping[str, object]
) -> tuple[str, dict[str, tuple[CharRange, ...]]]:
    """Fill a template and find its marked spans.

    Parameters
    ----------
    template
        ``{name}`` takes a value, ``[[span:text]]`` marks a span (values may stand inside, other
        marks may not), ``{{`` and ``}}`` are braces. A span marked twice has two ranges.
    values
        Values by name; a list or tuple is joined with ``", "``. Values are text, never template.

    Returns
    -------
    prompt, spans
        The text, and the character ranges of each marked span in it.

    Raises
    ------
    ScenarioError
        If a value is missing, a mark is nested, empty or not closed, or a brace stands alone.
    """
    out: list[str] = []
    length = at = 0
    opened: tuple[str, int] | None = None
    spans: dict[str, list[CharRange]] = {}
    for match in _TEMPLATE_TOKEN.finditer(template):
        text = template[at : match.start()]
        at = match.end()
        token, start = match[0], length + len(text)
        if match["value"]:
            text += _render_value(match["value"], values)
        elif match["mark"]:
            if opened or match["mark"] == DECISION:
                raise ScenarioError(
                    f"the template opens span {match['mark']!r} "
                    + (f"inside span {opened[0]!r}" if opened else "by mark"),
                    remedy=f"Marks do not nest, and {DECISION!r} is always the last token.",
                )
            opened = (match["mark"], start)
        elif match["close"]:
            if opened is None:
                text += token
            else:
                name, begin = opened
                if begin == start:
                    raise ScenarioError(f"span {name!r} is empty", remedy="Mark some text.")
                spans.setdefault(name, []).append((begin, start))
                opened = None
        elif token in ("{{", "}}"):
            text += token[0]
        else:
            raise ScenarioError(
                f"the template has a lone {token!r} at character {match.start()}",
                remedy="Write '{{' or '}}' for a brace; '{name}' takes a value.",
            )
        out.append(text)
        length += len(text)
    if opened:
        raise ScenarioError(
            f"span {opened[0]!r} is never closed", remedy="Write [[name:text]] around its text."
        )
    out.append(template[at:])
    return "".join(out), {name: tuple(ranges) for name, ranges in spans.items()}


def _render_value(name: str, values: Mapping[str, object]) -> str:
    if name not in values:
        close = difflib.get_close_matches(name, values, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ScenarioError(
            f"the template needs a value {name!r}",
            remedy=f"Add it to 'values' or 'defaults'.{hint}",
        )
    value = values[name]
    try:
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        raise ScenarioError(
            f"value {name!r} is a number with too many digits", remedy="Write it as text."
        ) from None


def _occurrences(prompt: str, text: str) -> list[CharRange]:
    """Return where `text` stands in a prompt; occurrences may overlap."""
    found = []
    at = prompt.find(text)
    while at >= 0:
        found.append((at, at + len(text)))
        at = prompt.find(text, at + 1)
    return found


def _find_span(
    scenario: str,
    name: str,
    given: SpanEntry,
    prompt: str,
    occurrences: Callable[[str], Sequence[CharRange]],
) -> list[CharRange]:
    if isinstance(given, str):
        given = TextSpan(text=given)
    if isinstance(given, TextSpan):
        return _choose(scenario, name, given, occurrences(given.text))
    ranges = [given] if isinstance(given, tuple) else list(given)
    for start, end in ranges:
        if not start < end <= len(prompt):
            raise ScenarioError(
                f"scenario {scenario!r}: span {name!r} at [{start}, {end}) is not in its prompt",
                why=f"The prompt has {len(prompt)} characters; a range is [start, end).",
                remedy="Give start < end, both within the prompt.",
            )
    return ranges


def _choose(
    scenario: str, name: str, given: TextSpan, found: Sequence[CharRange]
) -> list[CharRange]:
    label = f"scenario {scenario!r}: span {name!r}"
    if not found:
        raise ScenarioError(
            f"{label}: {given.text!r} is not in the prompt",
            remedy="Spell it as the prompt does, white space included.",
        )
    if given.occurrence == "all":
        return list(found)
    if given.occurrence == "last":
        return [found[-1]]
    if given.occurrence is None:
        if len(found) > 1:
            raise ScenarioError(
                f"{label}: {given.text!r} stands in the prompt {len(found)} times",
                remedy=f"Say which: occurrence: 1 to {len(found)}, 'last' or 'all'.",
            )
        return [found[0]]
    if given.occurrence > len(found):
        raise ScenarioError(
            f"{label}: occurrence {given.occurrence} of {given.text!r}, which stands there "
            f"{len(found)} time(s)",
            remedy=f"Give 1 to {len(found)}.",
        )
    return [found[given.occurrence - 1]]


# --- from characters to tokens -----------------------------------------------------------------


def token_positions(ranges: Iterable[CharRange], offsets: Sequence[CharRange]) -> list[int]:
    """Positions of the tokens that share a character with any of `ranges`.

    Parameters
    ----------
    ranges
        Character ranges ``[start, end)`` of the prompt.
    offsets
        The tokenizer's offset mapping: one ``(start, end)`` a token; special tokens have an empty
        range and belong to no span.

    Returns
    -------
    list of int
        Ascending token positions; several tokens that spell one character all belong to it.
    """
    return _Offsets(offsets).positions(ranges)


class _Offsets:
    """Tokens sorted by the characters they stand for: a range is found without a scan of all."""

    def __init__(self, offsets: Sequence[CharRange]) -> None:
        self._tokens = sorted(
            (start, end, position) for position, (start, end) in enumerate(offsets) if start < end
        )
        self._starts = [start for start, _, _ in self._tokens]
        # The furthest end so far: tokens that spell one character together overlap.
        self._ends = list(itertools.accumulate((end for _, end, _ in self._tokens), max))

    def positions(self, ranges: Iterable[CharRange]) -> list[int]:
        """Return the positions of tokens that share a character with any of `ranges`."""
        found: set[int] = set()
        for begin, stop in ranges:
            first, last = bisect_right(self._ends, begin), bisect_left(self._starts, stop)
            found.update(at for _, end, at in self._tokens[first:last] if end > begin)
        return sorted(found)


def span_positions(scenario: Scenario, offsets: Sequence[CharRange]) -> dict[str, list[int]]:
    """Token positions of every span of `scenario`, ``decision`` (the last token) included.

    Raises
    ------
    ScenarioError
        If a span covers no token of the prompt.
    """
    tokens = _Offsets(offsets)
    positions = {name: tokens.positions(ranges) for name, ranges in scenario.spans.items()}
    for name, found in positions.items():
        if not found:
            raise ScenarioError(
                f"scenario {scenario.name!r}: span {name!r} covers no token",
                why="It marks only characters that the tokenizer drops, such as white space.",
                remedy="Mark a visible word.",
            )
    positions[DECISION] = [len(offsets) - 1]
    return positions


def span(ds: xr.Dataset, name: str) -> list[int]:
    """Return the token positions of a span: labels of ``query`` and ``key``.

    Parameters
    ----------
    ds
        A trace.
    name
        A span of its scenario, or ``"decision"``.

    Raises
    ------
    ScenarioError
        If the trace has no such span.
    """
    spans = ds.attrs["spans"]
    if name not in spans:
        raise ScenarioError(
            f"{ds.attrs['scenario']}: no span {name!r}",
            remedy=f"It has: {', '.join(spans)}.",
        )
    return [int(position) for position in spans[name]["tokens"]]
