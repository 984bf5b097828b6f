"""Extracting to a table: samples of many prompts, in one store.

All prompts are tokenised for the table's size and coordinates (:mod:`.survey`). Then groups of some
hundred scenarios go through the model one after another, while what the group before gave is
compressed and written. No group depends on how many there are: 100,000 prompts need no more memory
than 1,000.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from zarrtrace.errors import ModelError
from zarrtrace.extraction.answers import expected_prompts
from zarrtrace.extraction.configuration import library_versions, prompt_digest
from zarrtrace.extraction.continuations import continued_stream, expected, settings_of
from zarrtrace.extraction.estimates import estimate_table
from zarrtrace.extraction.gathering import SampleGroup
from zarrtrace.extraction.interrupts import held_back
from zarrtrace.extraction.job import Job, prepare, tokenized, with_prompts
from zarrtrace.extraction.options import NOTHING_LOADED, Loaded, Options
from zarrtrace.extraction.packages import capture_package
from zarrtrace.extraction.progress import GenerationProgress, SampleProgress, Shown, say
from zarrtrace.extraction.running import borrowed, captured, saying_how_much_room
from zarrtrace.extraction.survey import Survey, survey
from zarrtrace.extraction.writers import THREADS, MissingParts
from zarrtrace.format.layout import itemsize
from zarrtrace.format.table_layout import TableAttributes, TableShape
from zarrtrace.hub import cache_if_unreachable
from zarrtrace.identity import refuse_other
from zarrtrace.machine import release_freed
from zarrtrace.records import SampleRecord, SampleTokens, TablePlan, Tokens
from zarrtrace.scenarios.positions import as_text
from zarrtrace.scenarios.scenario import changed
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store import (
    ContinuationFile,
    TableWriter,
    check_sizes,
    check_target,
    read_table,
    remove_continuations,
)

if TYPE_CHECKING:
    from zarrtrace.capture import Prompt
    from zarrtrace.scenarios import Scenario, ScenarioStream

# Scenarios in one forward pass, at most: more are no faster. The blocks' matrices of attention,
# which are not kept, stay within this many bytes.
_BATCH_SIZE, _MATRICES = 64, {"cpu": 2**28, "cuda": 2**32}
# A group has at most this many samples, and about this many bytes of residual stream.
_SAMPLES, _BYTES = 1024, 2**28
# Seconds for which a thread may keep Python's lock while other threads wait and a GPU computes.
_TURN = 1e-4
# As many prompts as are needed to see that the model can be used.
_FIRST = 16


# Prompts by scenario, and the positions of their samples; None for all.
Chosen = dict[str, tuple["Prompt", tuple[int, ...] | None]]


@dataclass(frozen=True)
class TableJob:
    """A job for the samples of a stream of scenarios.

    Attributes
    ----------
    job
        Everything but the prompts; it holds the first few.
    survey
        The samples of all scenarios.
    """

    job: Job
    survey: Survey

    @property
    def shape(self) -> TableShape:
        """Sizes of the table's arrays."""
        job = self.job
        return TableShape(
            layers=len(job.layers),
            samples=self.survey.samples,
            features={sae.variable: sae.d_sae for found in job.saes.values() for sae in found},
            channels=job.channels,
            feature_dtype=job.options.feature_dtype if job.saes else None,
            residual_dtype=job.options.residual_dtype if job.residual else None,
            limits=job.model.limits.layout,
        )

    def plan(self) -> TablePlan:
        """Return everything that is known of the table before its first sample is computed."""
        job, seen = self.job, self.survey
        trace = job.plan(expected(job, 1).prompts[0]).attributes
        same = ["model", "layers", "layers_without_sae", "layers_without_residual"]
        same += ["feature_dtype", "residual_dtype", "residual_hook"]
        attributes = TableAttributes(
            scenarios=seen.scenarios,
            positions=as_text(job.options.positions),
            spans=seen.spans,
            options=seen.options,
            metadata=seen.metadata,
            chat_template=seen.chat_template,
            versions=library_versions(),
            config={},
            **{name: getattr(trace, name) for name in same},
        )
        config = _config(job, seen.digest)
        saes = tuple(sae for found in job.saes.values() for sae in found)
        return TablePlan(attributes, self.shape, seen.coordinates, config, saes)

    def groups(self, done: int) -> list[tuple[int, int]]:
        """Cut the scenarios that are not stored into groups that go through the model together."""
        return self.survey.groups(self.most_samples, done)

    def prompts(self, first: int, stop: int) -> Chosen:
        """Return some scenarios as far as computing them takes: names and tokens."""
        usual, found = self.job.prompts[0], {}
        for name, ids, where in self.survey.chosen(first, stop):
            prompt = replace(
                usual, scenario=changed(usual.scenario, name=name), tokens=Tokens(ids, ())
            )
            found[name] = prompt, None if len(where) == len(ids) else where
        return found

    @property
    def most_samples(self) -> int:
        """Return how many samples a group has at most."""
        row = len(self.job.layers) * 4 * (self.job.channels or 0)
        return max(64, min(_SAMPLES, _BYTES // max(row, 1)))


def extract_table(
    output: Address,
    options: Options,
    stream: ScenarioStream,
    *,
    loaded: Loaded = NOTHING_LOADED,
    overwrite: bool = False,
    repair: bool = False,
    accept_versions: bool = False,
    progress: Shown = None,
) -> Location:
    """Do what :func:`zarrtrace.extract` does with ``layout="table"``; return where the table is.

    A table that was interrupted is resumed if its configuration is the same. If a scenario cannot
    be computed, or values of it are not finite, all values of its samples are NaN, and the table's
    attribute ``failed`` says why.

    Parameters
    ----------
    output
        Folder of the table, or its address in an object store.
    options
        Options of the extraction; its scenarios are those of `stream`.
    stream
        The scenarios.
    loaded, overwrite, repair, accept_versions, progress
        As for :func:`zarrtrace.extraction.extract_run`.

    Raises
    ------
    ConfigError, ScenarioError, ModelError, SAEError, StoreError
        As for :func:`zarrtrace.extraction.extract_run`; a ModelError only if no scenario of
        the first group can be computed.
    """
    output = locate(output)
    check_target(output, "table", overwrite=overwrite, repair=repair)
    named = options.own_model if loaded.model is None else None
    how = {"overwrite": overwrite, "repair": repair, "accept_versions": accept_versions}
    with cache_if_unreachable(named, options.sae_release), borrowed(loaded.model):
        job = _prepared(options, stream, loaded=loaded, weights=True, progress=progress)
        say(job.notes, progress)
        total = 0 if options.generate is None else len(stream) * options.generate.samples
        is_new = overwrite or repair or not total
        if not is_new and _is_complete(output, job, stream, options, how):
            return output
        with contextlib.ExitStack() as stack:
            with GenerationProgress(total, progress) as generation:
                prompts = _tokenized(job, stream)
                if options.generate is not None:
                    file = ContinuationFile(
                        output,
                        settings_of(job.config),
                        is_first_check=not (overwrite or repair),
                        accept_versions=accept_versions,
                    )
                    kept = stack.enter_context(file)
                    prompts = continued_stream(job, options.generate, prompts, kept, generation)
                table = stack.enter_context(surveyed(job, prompts, options.batch_size))
            stack.enter_context(saying_how_much_room(estimate_table(table).disk_bytes))
            writer = stack.enter_context(TableWriter(output, table.plan(), **how))
            shown = SampleProgress(table.survey.samples, writer.done, progress, generation)
            with shown as bar:
                _fill(writer, table, bar)
                writer.finish()
        remove_continuations(output)
    return output


@contextlib.contextmanager
def prepare_table(
    options: Options,
    stream: ScenarioStream,
    *,
    loaded: Loaded = NOTHING_LOADED,
    weights: bool = True,
    progress: Shown = None,
) -> Iterator[TableJob]:
    """Check options against the model and the SAEs, and look at all scenarios once.

    A context manager: ids of tokens are in a temporary file.

    Parameters
    ----------
    weights
        False leaves out the model's weights; enough to estimate a table.

    Raises
    ------
    ConfigError, ScenarioError, ModelError, SAEError
        As for :func:`extract_table`.
    """
    job = _prepared(options, stream, loaded=loaded, weights=weights, progress=progress)
    prompts = _tokenized(job, stream)
    if options.generate is not None:
        prompts = expected_prompts(job.model, prompts, options.generate)
    with surveyed(job, prompts, options.batch_size) as table:
        yield table


def _prepared(
    options: Options, stream: ScenarioStream, *, loaded: Loaded, weights: bool, progress: Shown
) -> Job:
    """Return a job that holds the first few prompts."""
    job = prepare(
        replace(options, attention=False, batch_size=options.batch_size or _BATCH_SIZE),
        scenarios=list(itertools.islice(stream, _FIRST)),
        loaded=loaded,
        weights=weights,
        progress=progress == "bars",
    )
    if job.source is not None:  # each is loaded once, as far as there is memory
        job = replace(job, source=capture_package().keeping(job.source))
    if options.attention:
        job = replace(job, notes=(*job.notes, "a table holds no attention (--no-attention)"))
    return job


@contextlib.contextmanager
def surveyed(
    job: Job, prompts: Iterable[Prompt], batch_size: int | None = None
) -> Iterator[TableJob]:
    """Look at all prompts once; ids of their tokens are in a temporary file meanwhile.

    Parameters
    ----------
    batch_size
        Scenarios in one forward pass; None chooses.
    """
    with tempfile.TemporaryFile() as ids:
        found = survey(prompts, job.positions, prompt_digest, ids)
        if batch_size is None:
            job = _with_batches(job, found.longest)
        yield TableJob(job, found)


def _is_complete(
    output: Location,
    job: Job,
    stream: ScenarioStream,
    options: Options,
    how: Mapping[str, bool],
) -> bool:
    """Whether a complete table holds the continuations already; another one is refused.

    Raises
    ------
    ConfigMismatchError
        If it was started with another configuration.
    """
    if options.generate is None or not (output / "zarr.json").is_file():
        return False
    found = read_table(output)
    prompts = expected_prompts(job.model, _tokenized(job, stream), options.generate, 1)
    with surveyed(job, prompts, options.batch_size) as table:
        now = _config(table.job, table.survey.digest)
    accepted = how["accept_versions"]
    refuse_other(output, found.attributes.config, now, accept_versions=accepted)
    check_sizes(found)
    return True


def _config(job: Job, digest: str) -> dict[str, Any]:
    """Return what a resumed table must agree with."""
    return {**job.config, "layout": "table", "prompts": digest}


def _with_batches(job: Job, longest: int) -> Job:
    """Choose how many scenarios go through the model together, by the longest prompt alone."""
    matrices = 3 * job.model.n_heads * longest**2 * itemsize(job.model.attributes.dtype)
    room = _MATRICES["cpu" if job.model.device.type == "cpu" else "cuda"]
    size = max(1, min(job.batch_size, room // matrices))
    config = {**job.config, "batch_size": size}
    options = replace(job.options, batch_size=size)
    return replace(job, batch_size=size, config=config, options=options)


def _tokenized(job: Job, scenarios: Iterable[Scenario]) -> Iterator[Prompt]:
    bos = job.model.attributes.prepend_bos
    return tokenized(job.options, job.model, scenarios, prepend_bos=bos)


def _fill(writer: TableWriter, table: TableJob, bar: SampleProgress) -> None:
    """Compute missing samples group by group; others compress and write."""
    done, shape = writer.done, table.shape
    groups = table.groups(done)
    options = table.job.options
    dtypes = options.feature_dtype, options.residual_dtype
    with (
        held_back() as interrupted,
        _quick_turns(table.job),
        ThreadPoolExecutor(THREADS, "zarrtrace-write") as pool,
    ):
        waiting: list[Future[None]] = []
        for first, stop in groups:
            here = table.prompts(first, stop)
            starts = table.survey.starts[first : stop + 1]
            rows = itertools.pairwise((starts - starts[0]).tolist())
            group = SampleGroup(int(starts[0]), dict(zip(here, rows, strict=True)))
            group = _computed(
                table.job, here, group, dtypes, interrupted, is_first=group.start == 0
            )
            for future in waiting:  # rows of a layer come in order
                future.result()
            bar.update(int(starts[-1]) - max(int(starts[0]), done))
            waiting = _written(pool, writer, group, table.job.layers, shape, done)
            release_freed()
        for future in waiting:
            future.result()


@contextlib.contextmanager
def _quick_turns(job: Job) -> Iterator[None]:
    """Let threads take quick turns where this one has to keep a GPU busy.

    Each operation of torch gives Python's lock away; a thread that compresses would keep it for
    5 ms each time.
    """
    before = sys.getswitchinterval()
    if job.model.device.type != "cpu":
        sys.setswitchinterval(_TURN)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _computed(
    job: Job,
    chosen: Chosen,
    group: SampleGroup,
    dtypes: tuple[str, str],
    interrupted: Any,
    *,
    is_first: bool,
) -> SampleGroup:
    """Compute a group; if that fails, its scenarios one by one.

    Raises
    ------
    ModelError
        If none of them can be computed, and no group before was: the model is at fault then.
    """
    try:
        _add_all(job, chosen, group, dtypes, interrupted)
    except ModelError as error:
        last = error
    else:
        return group
    alone, job = SampleGroup(group.start, group.rows), replace(job, batch_size=1)
    for name, one in chosen.items():
        try:
            _add_all(job, {name: one}, alone, dtypes, interrupted)
        except ModelError as error:
            last = error
            alone.fail(name, error.what)
    if is_first and len(alone.failed) == len(chosen):
        raise last
    return alone


def _add_all(
    job: Job, chosen: Chosen, group: SampleGroup, dtypes: tuple[str, str], interrupted: Any
) -> None:
    everything = MissingParts(job.layers, tokens=True)
    job = with_prompts(job, tuple(prompt for prompt, _ in chosen.values()))
    positions = {name: where for name, (_, where) in chosen.items()}
    records = captured(
        job, dict.fromkeys(chosen, everything), lambda prompt: positions[prompt.scenario.name]
    )
    with contextlib.closing(records):
        for record in records:
            group.add(record, dtypes)
            interrupted()


def _written(
    pool: ThreadPoolExecutor,
    writer: TableWriter,
    group: SampleGroup,
    layers: Sequence[int],
    shape: TableShape,
    done: int,
) -> list[Future[None]]:
    """Have threads write a group: its samples that are not stored yet."""

    def write(records: Iterator[SampleRecord] | Iterator[SampleTokens]) -> None:
        for record in records:
            writer.append(record)

    for name, reason in group.failed.items():
        start, stop = (group.start + row for row in group.rows[name])
        if stop > done:
            writer.fail(name, reason, max(start, done), stop - max(start, done))
    of_layers = [group.layer(layer, shape, done) for layer in layers]
    return [pool.submit(write, group.tokens(done)), *(pool.submit(write, one) for one in of_layers)]
