"""Writing a table: samples come in, layer by layer, and it is published when all are there."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from zarrtrace.errors import (
    ConfigMismatchError,
    IncompleteError,
    IntegrityError,
    StoreError,
)
from zarrtrace.format.layout import NEXT_TOKEN, NO_ID, ArrayLayout
from zarrtrace.format.table_layout import TableAttributes, table_block
from zarrtrace.identity import combined_versions, refuse_other
from zarrtrace.precision import cast_samples
from zarrtrace.records import BFloat16, Nonzeros, SampleRecord, SampleTokens, TablePlan
from zarrtrace.scenarios import sample_names
from zarrtrace.storage import Address, disk, locate
from zarrtrace.store.chunks import encode_rows
from zarrtrace.store.damage import check_sizes, find_damage
from zarrtrace.store.journal import JOURNAL
from zarrtrace.store.metadata import Group, kind_of, read_table
from zarrtrace.store.publish import old_of, publish_folder
from zarrtrace.store.run_writer import LockedRun, remove_run
from zarrtrace.store.staged_table import StagedTable, staged_header, table_folder
from zarrtrace.store.table_plan import arrays_of, described
from zarrtrace.store.table_rows import TableRows, nan_nonzeros
from zarrtrace.store.target import refuse_foreign, refuse_kind, refuse_strangers

_SAME_SIZES = "Give every record the sizes that the table was created with."


class TableWriter(LockedRun):
    """Write a table, block by block of samples; a context manager that holds the run's lock.

    An existing table is resumed: :attr:`done` says how many samples are stored. Readers find the
    table once :meth:`finish` has published it, and never a part of it.

    Parameters
    ----------
    path
        Folder of the table, or its address in an object store.
    plan
        The table.
    overwrite
        Replace an existing run or table, once the new one is finished.
    repair
        Read every byte of an existing table. If any is damaged, write the table again: with the
        blocks before the first damaged one, and what is appended after them.
    accept_versions
        Resume a table that other versions of libraries began, and name both in it.

    Raises
    ------
    NotATraceError
        If `path` exists and is not a table.
    IntegrityError
        If the table is damaged, and `repair` is false.
    ConfigMismatchError
        If the table was started with another configuration.
    LockedError
        If another process is writing it.
    ConfigError
        If the plan contradicts itself, or `path` is in a run.
    StoreError
        If files would be deleted with a table that do not belong to it.
    """

    def __init__(
        self,
        path: Address,
        plan: TablePlan,
        *,
        overwrite: bool = False,
        repair: bool = False,
        accept_versions: bool = False,
    ) -> None:
        self.path = self._final = locate(path).resolved()
        self._attributes, self._layouts, self._coordinates = described(plan)
        self._overwrite, self._repair = overwrite, repair
        self._accept_versions = accept_versions
        self._samples, self._block = plan.shape.samples, table_block(plan.shape)
        self._arrays = arrays_of(plan, self._layouts)
        self._folder = table_folder(self._final)
        self._mutex = threading.Lock()
        self._failed: dict[int, tuple[int, str, str]] = {}
        self._error: BaseException | None = None
        self.is_published = False

    # --- beginning -----------------------------------------------------------------------------

    def _open(self) -> None:
        was_replaced = self._end_publishing()
        self._staged = self._new_stage()
        source = None
        if self._final.exists() and not self._is_empty_folder():
            if self._repair and not self._overwrite:
                source = self._damaged()
            elif self._resumes_existing(replaced=was_replaced):
                check_sizes(read_table(self._final))
                self.is_published = True
            if not self.is_published:
                refuse_strangers(self._final)
        if not self.is_published:
            self._begin(source)
        self._rows = {
            layer: TableRows(layer, self._names_of(layer), self._layouts, self.done)
            for layer in dict.fromkeys(layer for _, layer in self._arrays)
        }

    def _new_stage(self) -> StagedTable:
        return StagedTable(
            self._folder,
            self._attributes,
            self._layouts,
            self._arrays,
            self._block,
            self._samples,
        )

    def _is_empty_folder(self) -> bool:
        return self._final.is_folder() and not any(True for _ in self._final.children())

    def _end_publishing(self) -> bool:
        """End what a writer that was killed had begun to publish; True if it is in its place.

        The journal moves with the table, and is removed last: it tells that what is left beside the
        table is older.
        """
        final, aside = self._final.path, old_of(self._folder)
        if final is None:
            return False
        if not final.exists() and aside.is_dir():
            aside.rename(final)
        if staged_header(final) is None or not (final / "zarr.json").is_file():
            return False
        for folder in (self._folder, aside):
            disk.remove_folder(folder)
        (final / JOURNAL).unlink()
        return True

    def _resumes_existing(self, *, replaced: bool) -> bool:
        """Whether the table that is there is the one asked for, rather than one to replace."""
        if self._final.is_file() or not (self._final / "zarr.json").is_file():
            refuse_foreign(self._final)
        refuse_kind(self._final, "table", overwrite=self._overwrite)
        if kind_of(self._final) == "run":
            return False
        if not self._overwrite:
            self._refuse_other(read_table(self._final).attributes.config)
            return True
        return replaced and read_table(self._final).attributes.config == self._attributes.config

    def _refuse_other(self, config: Mapping[str, Any]) -> None:
        """Refuse what was started otherwise; name its versions and today's."""
        now = self._attributes.config
        refuse_other(self._final, config, now, accept_versions=self._accept_versions)
        if "versions" in now:
            versions = combined_versions(config.get("versions", {}), now["versions"])
            update = {"config": {**now, "versions": versions}}
            self._attributes = self._attributes.model_copy(update=update)
            self._staged = self._new_stage()

    def _damaged(self) -> Group[TableAttributes] | None:
        """Return the table that is there, if it is damaged and its metadata is not."""
        try:
            self._resumes_existing(replaced=False)
            found = read_table(self._final)
        except IntegrityError:
            return None
        self.is_published = not find_damage(found)
        return None if self.is_published else found

    def _begin(self, source: Group[TableAttributes] | None) -> None:
        """Continue what an earlier process left, or begin."""
        header = staged_header(self._folder)
        if header is not None:
            try:
                self._refuse_other(header["config"])
            except ConfigMismatchError:
                if not self._replaces:
                    raise
                header = None
        if header is not None and self._staged.resume(self._coordinates):
            return
        if self._final.path is not None:  # what is there may be somebody else's
            remove_run(locate(self._folder))
        self._staged.create(self._coordinates, {} if source is None else source.attributes.versions)
        if source is not None:
            values = self._coordinates
            first = sample_names(values["scenario"], values.get("repeat")).index
            failed = source.attributes.failed
            self._staged.copy_sound(source, {name: first(name) // self._block for name in failed})
            self._staged = self._new_stage()
            self._staged.resume(self._coordinates)

    def _names_of(self, layer: int | None) -> list[str]:
        return [name for name, of in self._arrays if of == layer]

    # --- adding --------------------------------------------------------------------------------

    @property
    def done(self) -> int:
        """Number of samples stored in all layers: whole blocks, or all."""
        return self._samples if self.is_published else self._staged.done

    def append(self, record: SampleRecord | SampleTokens) -> None:
        """Store some samples of a layer, or next tokens of some samples; from any thread.

        Samples of one layer come in order, from :attr:`done` on; layers are independent.

        Raises
        ------
        StoreError
            If the record's layer, order or shape is not the table's.
        NonFiniteError
            If stored values would not be finite.
        NoSpaceError
            If the disk is full.
        """
        layer = None if isinstance(record, SampleTokens) else record.layer
        if layer not in self._rows:
            if layer in self._attributes.layers and not _values_of(record):
                return  # it has neither SAE nor residual
            raise self._refused(
                "next tokens are not stored" if layer is None else f"layer {layer} is not stored",
                "Create the table with all that it will hold.",
            )
        rows = self._rows[layer]
        with rows.mutex:
            self._refuse_after_error()
            self._fill_failed(rows)
            if problem := rows.problem(record.start, _values_of(record), self._samples):
                raise self._refused(f"{rows.label}: {problem}", _SAME_SIZES)
            self._add(rows, _values_of(cast_samples(record, self._attributes)))
            self._fill_failed(rows)

    def fail(self, scenario: str, reason: str, start: int, count: int = 1) -> None:
        """Note that a scenario was not computed: its samples are NaN in all layers.

        Call it before later samples of any layer are appended.

        Parameters
        ----------
        scenario, reason
            Its name, and why.
        start, count
            Number of its first sample in the table, and of its samples.
        """
        if not 0 <= start < start + count <= self._samples:
            raise self._refused(f"no samples {start} to {start + count - 1}", _SAME_SIZES)
        with self._mutex:
            self._failed[start] = (count, scenario, reason)
        for rows in self._rows.values():
            with rows.mutex:
                self._refuse_after_error()
                self._fill_failed(rows)

    def _fill_failed(self, rows: TableRows) -> None:
        """Add NaN in place of the next samples, if they failed."""
        while (found := self._failed.get(rows.next)) is not None:
            values: dict[str, Any] = {}
            for name in rows.names:
                layout = self._layouts[name]
                shape = (found[0], layout.shape[-1])
                if name.startswith("features"):
                    columns = layout.chunks[-1]
                    values[name] = nan_nonzeros(shape, columns, np.dtype(layout.dtype))
                else:
                    values[name] = _not_computed(layout, shape)
            self._add(rows, values)

    def _add(self, rows: TableRows, values: Mapping[str, Any]) -> None:
        """Add samples of a layer, and append the chunks that they fill."""
        try:
            with disk.explained(self.path):
                for name, part in rows.add(values, self._samples):
                    layout, encoding = self._layouts[name], self._staged.encodings[name]
                    if rows.layer is None:
                        chunks = [encoding.encode(part)]
                    else:
                        chunks = list(encode_rows(layout, encoding, part))
                    with self._mutex:
                        self._staged.append(name, rows.layer, chunks)
                with self._mutex:
                    self._end_blocks()
        except BaseException as error:
            self._error = error
            raise

    def _refuse_after_error(self) -> None:
        """Refuse everything after chunks were lost: later ones would stand in their place."""
        if self._error is not None:
            raise self._refused(
                f"nothing can be stored any more: {self._error}",
                "Run the same command again: it resumes where it stopped.",
            )

    def _end_blocks(self) -> None:
        while self._staged.block_is_whole:
            start = self._staged.stored.blocks * self._block
            self._staged.end_block(
                {
                    scenario: reason
                    for at, (_, scenario, reason) in sorted(self._failed.items())
                    if start <= at < start + self._block
                }
            )

    def _refused(self, what: str, remedy: str) -> StoreError:
        return StoreError(f"{self.path}: {what}", remedy=remedy)

    # --- finishing -----------------------------------------------------------------------------

    def finish(self) -> None:
        """Complete the table, have the disk hold it, and publish it.

        Raises
        ------
        IncompleteError
            If samples were not appended.
        """
        if self.is_published:
            return
        if self.done < self._samples:
            behind = min(self._rows.values(), key=lambda rows: rows.next)
            raise IncompleteError(
                f"{self.path}: not complete: {self._samples - behind.next} of {self._samples} "
                f"samples missing in {behind.label}",
                remedy="Run the same command again; it resumes where this one stopped.",
            )
        with disk.explained(self.path):
            self._staged.complete()
            disk.sync(self._folder)
            target = self._final
            if target.path is None and not self._replaces and (target / "zarr.json").is_file():
                # Another writer of the same command was faster: its table is whole.
                disk.remove_folder(self._folder)
            else:
                publish_folder(self._folder, target)
            if target.path is not None:
                (target.path / JOURNAL).unlink()
                disk.sync_path(target.path)
        self.is_published = True

    @property
    def _replaces(self) -> bool:
        return self._overwrite or self._repair


def _values_of(record: SampleRecord | SampleTokens) -> dict[str, Any]:
    if isinstance(record, SampleTokens):
        return {name: getattr(record, name) for name in NEXT_TOKEN}
    values: dict[str, np.ndarray | BFloat16 | Nonzeros] = dict(record.features)
    if record.residual is not None:
        values["residual"] = record.residual
    return values


def _not_computed(layout: ArrayLayout, shape: tuple[int, int]) -> np.ndarray:
    """Return what stands in place of values that were not computed."""
    if layout.dtype == "string":
        return np.full(shape, "", object)
    return np.full(shape, NO_ID if layout.dtype == "uint32" else np.nan, layout.dtype)
