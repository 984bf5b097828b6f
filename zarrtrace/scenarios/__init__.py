"""Scenarios: named prompts with named spans, from templates or from a user's file.

A *span* is a set of character ranges of the prompt. It becomes token positions through the
tokenizer's offset mapping (:func:`token_positions`), never by searching token text, so that it is
exact when a number splits into several tokens or stands in the prompt twice.
"""

from zarrtrace.scenarios.chat import Chat, Message
from zarrtrace.scenarios.entries import ScenarioEntry, SuiteFile
from zarrtrace.scenarios.metadata import (
    RESERVED,
    Value,
    check_metadata_name,
    is_missing,
    typed_column,
)
from zarrtrace.scenarios.names import (
    ANSWER,
    COMPLETION,
    DECISION,
    check_name,
    check_trace_name,
    chosen_names,
    first_repeats,
    name_key,
    name_of,
    sample_names,
    split_trace_name,
    trace_name,
)
from zarrtrace.scenarios.sampling import Sampling
from zarrtrace.scenarios.scenario import Scenario
from zarrtrace.scenarios.spans import CharRange, span, span_positions, token_positions
from zarrtrace.scenarios.streams import ScenarioStream
from zarrtrace.scenarios.suite import (
    as_scenarios,
    load_suite,
    read_columns,
    stream,
    suite_attributes,
)
from zarrtrace.scenarios.templates import render_template

__all__ = [
    "ANSWER",
    "COMPLETION",
    "DECISION",
    "RESERVED",
    "CharRange",
    "Chat",
    "Message",
    "Sampling",
    "Scenario",
    "ScenarioEntry",
    "ScenarioStream",
    "SuiteFile",
    "Value",
    "as_scenarios",
    "check_metadata_name",
    "check_name",
    "check_trace_name",
    "chosen_names",
    "first_repeats",
    "is_missing",
    "load_suite",
    "name_key",
    "name_of",
    "read_columns",
    "render_template",
    "sample_names",
    "span",
    "span_positions",
    "split_trace_name",
    "stream",
    "suite_attributes",
    "token_positions",
    "trace_name",
    "typed_column",
]
