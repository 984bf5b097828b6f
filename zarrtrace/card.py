"""The dataset card that makes a run or a table a Hugging Face dataset folder: its ``README.md``.

Keys of the metadata are those of https://huggingface.co/docs/hub/datasets-cards. The Hub's table
viewer reads Parquet, CSV and JSON and would take Zarr's metadata for a table, so the card turns it
off; for the same reason it has no ``configs`` and no ``dataset_info``, which describe tables.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import yaml

from zarrtrace.errors import IntegrityError, NotATraceError, StoreError, readable
from zarrtrace.format.attributes import MetadataValue, ranges
from zarrtrace.format.layout import INDEX
from zarrtrace.scenarios import split_trace_name
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store import (
    RunSummary,
    TableSummary,
    TraceSummary,
    kind_of,
    summarize,
    summarize_table,
)
from zarrtrace.text import markdown_text

_MARK = re.compile(r"<!-- zarrtrace card ([0-9a-f]{16}) -->\n\Z")
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))
_LARGER = "1M<n<10M"
_SCENARIOS_SHOWN = 50
# Most columns of metadata, and characters of a text.
_COLUMNS_SHOWN, _TEXT_SHOWN = 6, 60

_ARRAYS = {
    "attention": "attention probability, lossless unless the attributes say otherwise",
    "attention_mean": "its mean over heads",
    "features": "SAE feature activations, dense; 0 where a feature is silent",
    "top_feature": "the strongest features of each token",
    "top_activation": "their activations",
    "residual": "the residual stream",
    "next_token": "the most likely next tokens",
    "next_token_logprob": "natural logarithms of their probabilities",
    "next_token_text": "their texts",
}


def write_card(
    run: Address,
    *,
    license: str | None = None,  # noqa: A002
    title: str | None = None,
) -> Location:
    """Write the dataset card of a run or a table, ``README.md`` in its folder; nothing is uploaded.

    Parameters
    ----------
    run
        Its folder, or its address.
    license
        Identifier as the Hub lists them, for example ``cc-by-4.0``. Without one the card names
        none: the publisher of the run has to choose.
    title
        Heading of the card; the folder's name if None.

    Returns
    -------
    Location
        The card.

    Raises
    ------
    StoreError
        If there is a README that this function did not write, or that was edited since.
    NotATraceError, FormatVersionError, IntegrityError
        If the run cannot be read.
    """
    run = locate(run)
    kind = kind_of(run)
    if kind == "trace":
        raise NotATraceError(
            f"{run}: is the trace of one scenario, not a run",
            why="A card describes a data set, and a trace holds no other files.",
            remedy=f"Give the run that it is in: {run.parent}.",
        )
    card = run / "README.md"
    if not _free(card):
        raise StoreError(
            f"{card}: exists, and is not a card as zarrtrace wrote it",
            why="It was written by someone else, or edited since.",
            remedy="Move it away to have a new one made.",
        )
    name = title or run.resolved().name
    if kind == "table":
        table = summarize_table(run)
        metadata, body = _metadata_of_table(table, license, name), _body_of_table(table, name)
    else:
        summary = summarize(run)
        metadata = _metadata(summary, license, name)
        body = _body(summary, name, indexed=(run / INDEX).is_folder())
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=False)
    text = f"---\n{front}---\n\n{body}\n"
    card.write(f"{text}<!-- zarrtrace card {_digest(text)} -->\n".encode())
    return card


def _free(card: Location) -> bool:
    """Whether there is no file, or a card that nobody has edited."""
    try:
        text = card.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return True
    except IntegrityError:  # something else in place of a file
        return False
    found = _MARK.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _metadata(summary: RunSummary, license_id: str | None, name: str) -> dict[str, Any]:
    models = sorted({trace.model for trace in summary.traces if trace.model})
    tags = ["attention"]
    if any(trace.sae_ids for trace in summary.traces):
        tags.append("sparse-autoencoder")
    return _front(license_id, name, len(summary.traces), [*tags, *models])


def _metadata_of_table(table: TableSummary, license_id: str | None, name: str) -> dict[str, Any]:
    tags = ["sparse-autoencoder"] if any(one.startswith("features") for one in table.arrays) else []
    return _front(license_id, name, table.samples, [*tags, *filter(None, [table.model])])


def _front(license_id: str | None, name: str, count: int, tags: list[str]) -> dict[str, Any]:
    size = next((label for limit, label in _SIZES if count < limit), _LARGER)
    return {
        **({"license": license_id} if license_id else {}),
        "pretty_name": name,
        "size_categories": [size],
        "annotations_creators": ["machine-generated"],
        "tags": ["zarr", "xarray", "interpretability", *tags],
        "viewer": False,
    }


def _body(summary: RunSummary, name: str, *, indexed: bool) -> str:
    traces = summary.traces
    tokens = sum(trace.tokens for trace in traces)
    is_whole = all(trace.dims.get("query", 0) == trace.tokens for trace in traces)
    count = _prompt_count(traces)
    of = f"{count} prompts" if count == len(traces) else f"{len(traces)} repeats of {count} prompts"
    lines = [
        f"# {markdown_text(name)}",
        "",
        (
            "Attention and SAE features of a language model, for every layer and "
            f"{'token' if is_whole else 'some tokens'} of "
            f"{of} ({tokens:,} tokens): a Zarr v3 hierarchy, one group each, "
            f"with labelled dimensions. {readable(summary.bytes_on_disk)}, "
            f"{readable(summary.bytes_dense)} dense. Written by zarrtrace, format version "
            f"{summary.format_version}."
        ),
        "",
    ]
    if summary.scenarios_missing or not summary.complete:
        lines += ["**Not complete:** scenarios or layers are missing.", ""]
    lines += [*_generated(traces), *_sources(traces), "## Opening", "", *_opening(traces), ""]
    lines += ["## Arrays of a prompt", "", *_arrays(traces), ""]
    if indexed:
        lines += [
            (
                f"`{INDEX}/` holds, by layer and feature, maximum, mean and frequency over all "
                "prompts and the 20 strongest tokens."
            ),
            "",
        ]
    return "\n".join([*lines, "## Prompts", "", *_prompts(traces)])


def _body_of_table(table: TableSummary, name: str) -> str:
    lines = [
        f"# {markdown_text(name)}",
        "",
        (
            f"One row a sample, {table.samples:,} of {table.scenarios:,} prompts (positions: "
            f"{markdown_text(table.positions)}): SAE features and residual stream of a language "
            f"model, as labelled Zarr v3 arrays. {readable(table.bytes_on_disk)}, "
            f"{readable(table.bytes_dense)} dense. Written by zarrtrace, format version "
            f"{table.format_version}."
        ),
        "",
        f"- Model: {markdown_text(table.model or 'not known')}",
        *([f"- SAEs: {markdown_text(table.sae_release)}"] if table.sae_release else []),
        f"- Layers: {ranges(table.layers)} (decoder blocks, counted from 0)",
        *(
            ["- Generated text: the model itself wrote the tokens that `generated` marks"]
            if table.generated
            else []
        ),
        *([f"- Not computed: {len(table.failed):,} prompts, NaN"] if table.failed else []),
        "",
        "## Opening",
        "",
        "```python",
        "import xarray as xr",
        "",
        'folder = "."  # or huggingface_hub.snapshot_download("OWNER/NAME", repo_type="dataset")',
        "ds = xr.open_zarr(folder)  # or zarrtrace.open_table, which refuses lost files",
        "```",
        "",
        "## Arrays",
        "",
        "| array | shape | |",
        "|---|---|---|",
        *(_array(*one) for one in table.arrays.items()),
        "",
        "## Columns of metadata",
        "",
        "| column | values | samples without |",
        "|---|---|---|",
    ]
    for column, found in table.columns.items():
        groups = ", ".join(f"{_cell(value)} ({n:,})" for value, n in found.groups.items())
        if not groups and found.least is not None:
            groups = f"{found.least:g} to {found.greatest:g}"
        said = groups or f"{found.distinct:,} values"
        lines.append(f"| {markdown_text(column)} | {said} | {found.missing:,} |")
    return "\n".join(lines)


def _prompt_count(traces: Iterable[TraceSummary]) -> int:
    return len({split_trace_name(trace.scenario)[0] for trace in traces})


def _generated(traces: tuple[TraceSummary, ...]) -> list[str]:
    """Say that texts are the model's own, if there are any."""
    texts = [trace for trace in traces if trace.completion is not None]
    if not texts:
        return []
    of = _prompt_count(texts)
    chose = Counter(trace.choice or "none" for trace in texts)
    counted = ", ".join(f"{markdown_text(name)} ({n:,})" for name, n in chose.most_common())
    said = f" Options found in them: {counted}." if any(trace.choice for trace in texts) else ""
    return [
        (
            f"**Generated text:** the model itself wrote {len(texts):,} continuations of {of:,} "
            "prompts. `generated` marks their tokens, the attribute `generation` holds each text "
            f"and how it was drawn.{said}"
        ),
        "",
    ]


def _sources(traces: tuple[TraceSummary, ...]) -> list[str]:
    models = Counter(trace.model for trace in traces if trace.model)
    releases = Counter(trace.sae_release for trace in traces if trace.sae_release)
    layers = sorted({layer for trace in traces for layer in trace.layers})
    out = [f"- Model: {', '.join(map(markdown_text, models)) or 'not known'}"]
    if releases:
        out.append(f"- SAEs: {', '.join(map(markdown_text, releases))}")
    return [*out, f"- Layers: {ranges(layers)} (decoder blocks, counted from 0)", ""]


def _opening(traces: tuple[TraceSummary, ...]) -> list[str]:
    first = traces[0].scenario if traces else "SCENARIO"
    return [
        "```python",
        "import xarray as xr",
        "",
        'folder = "."  # or huggingface_hub.snapshot_download("OWNER/NAME", repo_type="dataset")',
        f'ds = xr.open_zarr(f"{{folder}}/{first}")  # one prompt',
        'run = xr.open_datatree(folder, engine="zarr")  # all of them',
        "```",
        "",
        (
            "Any other Zarr v3 reader works too, such as tensorstore or zarrita.js. With "
            "zarrtrace, `zarrtrace.open_run(folder)` also refuses files that are missing or cut "
            "short, and `zarrtrace verify` compares every byte with its checksum."
        ),
    ]


def _arrays(traces: tuple[TraceSummary, ...]) -> list[str]:
    if not traces:
        return ["None yet."]
    first = traces[0]
    out = [
        (
            f"Sizes are those of {markdown_text(first.scenario)}; prompts differ in their number "
            "of tokens."
        ),
        "",
        "| array | shape | |",
        "|---|---|---|",
    ]
    out += [_array(*one) for one in first.arrays.items()]
    return [
        *out,
        "",
        (
            "`key_token`, `token_id`, `special` and `query_token` label the positions, `sae_id` "
            "the layers. The attributes of each group hold the prompt, spans, tags, metadata, "
            "model and SAEs, those of each array the checksums of its files."
        ),
    ]


def _array(name: str, shape: tuple[int, ...]) -> str:
    base = re.sub(r"^(features|top_feature|top_activation)_.*", r"\1", name)
    shown = f"`{name}`" if re.fullmatch(r"\w+", name) else markdown_text(name)
    return f"| {shown} | {' × '.join(map(str, shape))} | {_ARRAYS.get(base, '')} |"


def _prompts(traces: tuple[TraceSummary, ...]) -> list[str]:
    columns = list(dict.fromkeys(name for trace in traces for name in trace.metadata))
    more_columns = columns[_COLUMNS_SHOWN:]
    del columns[_COLUMNS_SHOWN:]
    texts = any(trace.completion is not None for trace in traces)
    header = ["name", "tokens", "tags", *(f"`{name}`" for name in columns)]
    header += ["choice", "completion"] if texts else []
    out = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for trace in traces[:_SCENARIOS_SHOWN]:
        tags = ", ".join(markdown_text(tag) for tag in trace.tags)
        cells = [markdown_text(trace.scenario), str(trace.tokens), tags]
        cells += [_cell(trace.metadata.get(name)) for name in columns]
        cells += [_cell(trace.choice), _cell(trace.completion)] if texts else []
        out.append(f"| {' | '.join(cells)} |")
    if more_columns:
        out += ["", f"Further metadata: {', '.join(f'`{name}`' for name in more_columns)}."]
    more = len(traces) - _SCENARIOS_SHOWN
    return [*out, *(["", f"And {more} more."] if more > 0 else [])]


def _cell(value: MetadataValue) -> str:
    """Write a value of metadata; nothing for a missing one."""
    if isinstance(value, bool):
        return str(value).lower()
    text = "" if value is None else str(value)
    return markdown_text(text if len(text) <= _TEXT_SHOWN else f"{text[: _TEXT_SHOWN - 1]}…")
