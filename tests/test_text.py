"""Text from stores, models and prompts: what a terminal, Markdown or HTML would obey is escaped."""

from __future__ import annotations

import gzip
import html.parser
import json
import sys
import traceback
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import yaml
from command_line import call
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from zarrtrace.card import write_card
from zarrtrace.cli import main
from zarrtrace.errors import RemoteError, StoreError
from zarrtrace.figures import draw_run
from zarrtrace.format.attributes import OptionAttributes, SpanAttributes
from zarrtrace.index import build_index
from zarrtrace.records import Tokens, TokensRecord
from zarrtrace.store import RunWriter
from zarrtrace.text import html_text, markdown_text, terminal_text, without_secrets

CLEAR, CLIPBOARD = "\x1b[2J\x1b[H", "\x1b]52;c;cm0gLXJmIH4=\x07"
#: Clears the screen, fills the clipboard, CSI as one character, reorders, breaks out of a line, a
#: code span, a cell, an element and a formula.
HOSTILE = f"a{CLEAR}{CLIPBOARD}\x9b2J\u202e\u2066\n# b|c`d</code><script>x</script>&lt;$e$\x7f\x85"


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose every free text is hostile, written by the real writers."""
    path = tmp_path_factory.mktemp("hostile") / "run"
    tokens = Tokens(ids=list(range(7)), texts=[f"{HOSTILE}{at}" for at in range(7)])
    with RunWriter(path, fakes.SCENARIOS, fakes.CONFIG) as run:
        for number, scenario in enumerate(fakes.SCENARIOS):
            planned = fakes.make_plan(scenario)
            plain = planned.attributes
            assert plain.model is not None
            attributes = plain.model_copy(
                update={
                    "prompt": HOSTILE,
                    "tags": (HOSTILE, f"{HOSTILE}{number}"),
                    "model": plain.model.model_copy(
                        update={"id": HOSTILE, "revision": HOSTILE, "tokenizer": HOSTILE}
                    ),
                    "spans": {
                        HOSTILE: SpanAttributes(characters=(), tokens=(1, 2)),
                        "decision": SpanAttributes(characters=(), tokens=(6,)),
                    },
                    "options": {HOSTILE: OptionAttributes(text=HOSTILE, token_id=3)},
                    "versions": {"zarrtrace": HOSTILE},
                }
            )
            saes = tuple(
                sae.model_copy(update={"id": f"{HOSTILE}{sae.layer}", "release": HOSTILE})
                for sae in planned.saes
            )
            writer = run.trace(replace(planned, attributes=attributes, tokens=tokens, saes=saes))
            for record in fakes.make_records(scenario, seed=number):
                if isinstance(record, TokensRecord):
                    texts = np.full(record.next_token.shape, HOSTILE, object)
                    writer.append(replace(record, next_token_text=texts))
                else:
                    writer.append(record)
            writer.finish()
        run.finish()
    build_index(path)
    return path


def obeyed(text: str) -> set[str]:
    """Return the characters that do something, line breaks aside."""
    odd = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    return {one for one in text if unicodedata.category(one) in odd and one != "\n"}


_COMMANDS: dict[str, tuple[str, ...]] = {
    "info": ("info", "RUN"),
    "info --json": ("info", "RUN", "--json"),
    "verify": ("verify", "RUN"),
    "find": ("find", "RUN", "--layer", "1", "--feature", "FEATURE"),
    "find --json": ("find", "RUN", "--layer", "1", "--feature", "FEATURE", "--json"),
    "attention to spans": ("analyze", "attention-to", "RUN", "--quiet"),
    "words": ("analyze", "word-associations", "RUN", "--quiet"),
    "decision": ("analyze", "decision", "RUN", "--quiet"),
    "features of spans": ("analyze", "position-specific-features", "RUN", "--quiet"),
    "unknown span": ("analyze", "attention-to", "RUN", "--source", "nowhere", "--quiet"),
    "unknown option": ("analyze", "attention-to", "RUN", f"--{HOSTILE}"),
    "unknown command": (HOSTILE,),
    "no such run": ("info", f"RUN/{HOSTILE}"),
    "no such address": ("info", f"s3://{HOSTILE}"),
}


@pytest.mark.parametrize("name", _COMMANDS)
def test_a_terminal_gets_nothing_to_obey(hostile_run: Path, name: str) -> None:
    feature = strongest_feature(hostile_run)
    places = {"RUN": str(hostile_run), "FEATURE": str(feature)}
    arguments = [places.get(one, one).replace("RUN/", f"{hostile_run}/") for one in _COMMANDS[name]]
    done = call(*arguments)
    said = done.stdout + done.stderr
    assert said
    assert "Traceback" not in done.stderr
    assert obeyed(said) == set()
    if name not in ("verify",) and "decision" not in name:
        assert "\\x1b[2J" in said or "\\u001b[2J" in done.stdout


def strongest_feature(run: Path) -> int:
    from zarrtrace.store import open_run

    features = open_run(run)[fakes.SCENARIOS[0]]["features"].sel(layer=1)
    return int(np.argmax(features.to_numpy().max(axis=0)))


def test_json_on_a_terminal_says_the_same(hostile_run: Path) -> None:
    out = call("info", hostile_run, "--json").stdout
    assert json.loads(out)["traces"][0]["model"] == HOSTILE


def test_names_stay_on_their_lines(hostile_run: Path) -> None:
    out = call("info", hostile_run).stdout
    rows = out.splitlines()
    assert not any(row.startswith("# b") for row in rows)
    arrays = 3  # on lines of their own
    assert len(rows) == 6 + arrays + 1 + len(fakes.SCENARIOS)


class _Parser(html.parser.HTMLParser):
    """Collects elements and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_card_shows_text_as_it_is(hostile_run: Path) -> None:
    write_card(hostile_run)
    card = hostile_run / "README.md"
    text = card.read_text(encoding="utf-8")
    card.unlink()
    assert obeyed(text) == set()
    _, front, body = text.split("---\n", 2)
    assert HOSTILE in yaml.safe_load(front)["tags"]
    page = _Parser(MarkdownIt("commonmark").enable("table").render(body))
    assert "script" not in page.elements
    shown = terminal_text(" ".join(HOSTILE.split()))
    assert page.text.count(shown) >= 2 + 2 * len(fakes.SCENARIOS)  # model, release, tags


def test_the_page_of_figures_shows_text_as_it_is(hostile_run: Path, tmp_path: Path) -> None:
    page = draw_run(hostile_run, tmp_path / "figures", formats=("png",), dpi=30, scenarios=())
    text = page.read_text(encoding="utf-8")
    assert obeyed(text) == set()
    parsed = _Parser(text)
    assert "script" not in parsed.elements
    assert terminal_text(HOSTILE) in parsed.text


def test_the_viewer_shows_text_as_it_is(hostile_run: Path) -> None:
    from zarrtrace.viewer.layout import Layout

    layout = Layout(hostile_run)
    index = json.loads(layout.index)
    name = index["scenarios"][0]
    found = json.loads(gzip.decompress(layout.read(f"data/@scenarios/{name}.json.gz")))
    shown = [index["model"], *found["tags"], *found["spans"]]
    assert obeyed("".join(shown)) == set()
    assert index["model"] == terminal_text(HOSTILE)


def test_messages_hold_nothing_to_obey() -> None:
    error = StoreError(f"what {HOSTILE}", why=HOSTILE, remedy=HOSTILE)
    for text in (str(error), error.what, error.why, error.remedy):
        assert obeyed(text) == set()


def test_a_traceback_holds_nothing_to_obey(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from zarrtrace import cli

    def fail(_signals: list[int]) -> int:
        raise LookupError(f"{HOSTILE} https://host/run?X-Amz-Signature=0123456789")

    monkeypatch.setattr(cli, "_run", fail)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(LookupError) as raised:
        main()
    capsys.readouterr()
    sys.excepthook(raised.type, raised.value, raised.tb)
    said = capsys.readouterr().err
    assert obeyed(said) == set()
    assert "LookupError" in said
    assert "0123456789" not in said


@given(st.text())
def test_escapes_are_all_and_only_what_is_obeyed(text: str) -> None:
    assert obeyed(terminal_text(text, lines=True)) == set()
    assert "\n" not in terminal_text(text)
    assert terminal_text(terminal_text(text)) == terminal_text(text)
    if not obeyed(text) and "\n" not in text:
        assert terminal_text(text) == text


@given(st.text())
def test_html_and_markdown_show_what_a_terminal_shows(text: str) -> None:
    assert _Parser(f"<p>{html_text(text)}</p>").text == terminal_text(text)
    page = MarkdownIt("commonmark").enable("table")
    cell = markdown_text(text)
    rendered = _Parser(page.render(f"|a|b|\n|-|-|\n|{cell}|last|\n"))
    wanted = terminal_text(" ".join(text.split()))
    assert rendered.text.split() == ["a", "b", *wanted.split(), "last"]


# --- secrets -----------------------------------------------------------------------------------

SECRET = "SeCr3tValue/+=x"  # noqa: S105 -- of nothing

_WITH_SECRETS = {
    "presigned": f"GET https://host/run?X-Amz-Date=1&X-Amz-Signature={SECRET}: 403",
    "SAS": f"https://account.blob.core.windows.net/run?sv=2022&sig={SECRET}",
    "fragment": f"https://host/run#token={SECRET}",
    "password": f"sftp://user:{SECRET}@host/run: refused",
    "password with odd characters": f"ftp://user:p@{SECRET}@host/run",
    "token as user": f"https://{SECRET.split('/', 1)[0]}@host/run",
    "options": f"options {{'secret_access_key': '{SECRET}'}}",
    "setting": f"AWS_SESSION_TOKEN={SECRET} is expired",
    "header": f"Authorization: Bearer {SECRET}",
    "endpoint": f"error sending request for url (http://user:{SECRET}@host:9000/b?list-type=2)",
}


@pytest.mark.parametrize("name", _WITH_SECRETS)
def test_no_secret_in_a_message(name: str) -> None:
    said = str(StoreError(_WITH_SECRETS[name]))
    assert "SeCr3tValue" not in said
    assert without_secrets(said) == said


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/runs/demo/trace: gone",
        "https://host:8443/runs/demo: not found (404)",
        "tcp://10.0.0.1:8786 is no scheduler",
        "abfs://container@account.dfs.core.windows.net/run",
        "sftp://user@host/run",
        "/runs/demo/query_token: holds no text",
        "attribute options.bet.token_id: Input should be a valid integer",
        "next_token_logprob: 3 bytes on disk, 4 were written",
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment.",
        "for a public bucket, --storage-option skip_signature=true.",
    ],
)
def test_other_messages_stay_as_they_are(text: str) -> None:
    assert str(StoreError(text)) == text


@pytest.mark.parametrize(
    "arguments",
    [
        ("info", f"https://host/run?X-Amz-Signature={SECRET}"),
        ("info", f"https://user:{SECRET}@host"),
        ("info", "s3://bucket/run", "--storage-option", SECRET),
        ("info", f"sftp://user:{SECRET}@host/run"),
        ("copy", f"https://host/a/run?sig={SECRET}", "target"),
    ],
)
def test_no_secret_on_the_command_line_comes_back(arguments: tuple[str, ...]) -> None:
    done = call(*arguments)
    assert "SeCr3tValue" not in done.stdout + done.stderr
    assert done.stderr


def test_no_secret_in_what_a_store_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the message nor in a cause that Python would print with it."""
    import obstore

    from zarrtrace.storage import locate

    signed = f"error sending request for url (https://host/a?X-Amz-Signature={SECRET})"

    def refuse(*_: Any, **__: Any) -> None:
        raise obstore.exceptions.GenericError(signed)

    monkeypatch.setattr(obstore, "get", refuse)
    with pytest.raises(RemoteError) as found:
        locate("memory://host/a/run").read()
    assert "https://host/a" in str(found.value)
    assert "SeCr3tValue" not in "".join(traceback.format_exception(found.value))
