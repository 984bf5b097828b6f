"""Scenarios: named prompts with named spans, from templates or from a user's file.

A *span* is a set of character ranges of the prompt. It becomes token positions through the
tokenizer's offset mapping (:func:`token_positions`), never by searching token text, so that it is
exact when a number splits into several tokens or stands in the prompt twice.
"""

from zarrtrace.scenarios.entries import ScenarioEntry, SuiteFile
from zarrtrace.scenarios.names import check_name, name_key
from zarrtrace.scenarios.scenario import DECISION, CharRange, Scenario
from zarrtrace.scenarios.spans import span, span_positions, token_positions
from zarrtrace.scenarios.suite import load_suite
from zarrtrace.scenarios.templates import render_template

__all__ = [
    "DECISION",
    "CharRange",
    "Scenario",
    "ScenarioEntry",
    "SuiteFile",
    "check_name",
    "load_suite",
    "name_key",
    "render_template",
    "span",
    "span_positions",
    "token_positions",
]
