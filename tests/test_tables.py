"""Tables on disk: written block by block, read by others, resumed, checked, copied."""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner
from reading import with_tensorstore, with_zarr, with_zarrs
from sample_tables import (
    Values,
    coordinates_of,
    expected,
    files_of,
    plan_of,
    records_of,
    values_of,
    write_table,
)

import zarrtrace as zt
from zarrtrace.cli import group
from zarrtrace.errors import (
    ConfigError,
    ConfigMismatchError,
    FormatVersionError,
    IncompleteError,
    IntegrityError,
    LockedError,
    NonFiniteError,
    NoSpaceError,
    NotATraceError,
    StoreError,
)
from zarrtrace.format.table_layout import TableShape, table_layout
from zarrtrace.records import SampleRecord, TablePlan
from zarrtrace.storage import disk

SAMPLES = 50


@pytest.fixture
def plan() -> TablePlan:
    return plan_of(SAMPLES)


@pytest.fixture(scope="module")
def values() -> Values:
    return values_of(3, SAMPLES, 300, 12)


@pytest.fixture
def table(tmp_path: Path, plan: TablePlan, values: Values) -> Path:
    write_table(tmp_path / "run", plan, values)
    return tmp_path / "run"


def _same(ds: xr.Dataset, plan: TablePlan, values: Values) -> None:
    wanted = expected(plan, values)
    assert set(ds.data_vars) == {"features", "residual", "next_token", "next_token_logprob"}
    assert ds.features.dims == ("layer", "sample", "feature")
    assert ds.residual.dims == ("layer", "sample", "channel")
    np.testing.assert_array_equal(ds.features.values, wanted.features)
    np.testing.assert_array_equal(ds.residual.values, wanted.residual)
    np.testing.assert_array_equal(ds.next_token.values, wanted.next_token)
    np.testing.assert_array_equal(ds.next_token_logprob.values, wanted.next_token_logprob)
    np.testing.assert_array_equal(ds.next_token_text.values, wanted.next_token_text)
    assert "next_token_text" in ds.coords
    for name, labels in coordinates_of(plan.shape.samples).items():
        assert ds.coords[name].dims == ("sample",)
        found = ds.coords[name].values
        np.testing.assert_array_equal(found, np.asarray(labels, found.dtype))
    assert ds.layer.values.tolist() == list(plan.attributes.layers)
    assert ds.sae_id.values.tolist() == ["l1", "l2", ""]
    assert set(ds.indexes) == {"layer", "feature", "channel"}
    assert ds.features.sel(layer=2, feature=299).shape == (plan.shape.samples,)
    assert ds.attrs["kind"] == "table"
    assert ds.attrs["config"] == dict(plan.config)


def test_plain_xarray_and_ours_read_what_was_written(
    table: Path, plan: TablePlan, values: Values
) -> None:
    _same(xr.open_zarr(table), plan, values)
    _same(zt.open_table(table), plan, values)
    _same(zt.open_table(table, chunks="auto"), plan, values)
    files = [file for file in (table / "features").iterdir() if file.name != "zarr.json"]
    assert len(files) > 2  # layers, and more than one file a layer


@pytest.mark.parametrize("step", [1, 16, 50])
def test_bytes_do_not_depend_on_the_size_of_records(
    table: Path, plan: TablePlan, values: Values, step: int
) -> None:
    other = table.with_name("other")
    write_table(other, plan, values, step=step)
    assert files_of(other) == files_of(table)


def test_resume_after_any_record_gives_the_same_bytes(
    table: Path, plan: TablePlan, values: Values
) -> None:
    path = table.with_name("interrupted")
    done = []
    for count in range(0, 33, 8):
        with zt.store.TableWriter(path, plan) as writer:
            done.append(writer.done)
            for record, _ in zip(
                records_of(plan, values, start=writer.done), range(count), strict=False
            ):
                writer.append(record)
        assert not path.exists()
    write_table(path, plan, values)
    assert files_of(path) == files_of(table)
    assert done == sorted(done)
    assert {*done} == {0, 16, 50}


def test_copy_of_a_table_that_is_being_written_is_refused(
    table: Path, plan: TablePlan, values: Values
) -> None:
    path = table.with_name("unfinished")
    with zt.store.TableWriter(path, plan) as writer:
        for record, _ in zip(records_of(plan, values), range(8), strict=False):
            writer.append(record)
    with pytest.raises(IncompleteError, match="still being written"):
        zt.copy(path, table.with_name("copy"))
    assert not table.with_name("copy").exists()


def test_failed_scenarios_are_nan_and_named(
    tmp_path: Path, plan: TablePlan, values: Values
) -> None:
    path = tmp_path / "run"
    with zt.store.TableWriter(path, plan) as writer:
        for record in records_of(plan, values, stop=20, step=5):
            writer.append(record)
        writer.fail("s10", "out of memory", 20, 2)
        for record in records_of(plan, values, start=22, step=5):
            writer.append(record)
    with zt.store.TableWriter(path, plan) as writer:
        assert writer.done == 50
        writer.finish()
    ds = xr.open_zarr(path)
    assert ds.attrs["failed"] == {"s10": "out of memory"}
    failed = [20, 21]
    for name in ("features", "residual", "next_token_logprob"):
        assert np.isnan(ds[name].isel(sample=failed)).all()
    assert (ds.next_token.isel(sample=failed) == 2**32 - 1).all()
    rest = [n for n in range(SAMPLES) if n not in failed]
    wanted = expected(plan, values).features[:, rest]
    np.testing.assert_array_equal(ds.features.isel(sample=rest), wanted)


def test_other_readers_read_the_same_numbers(table: Path, plan: TablePlan, values: Values) -> None:
    wanted = expected(plan, values)
    for name in ("features", "residual", "next_token"):
        for read in (with_tensorstore, with_zarr, with_zarrs):
            np.testing.assert_array_equal(read(table / name), getattr(wanted, name))


# --- other orders, other threads, other processes ----------------------------------------------


def test_threads_of_layers_write_the_same_bytes(
    table: Path, plan: TablePlan, values: Values
) -> None:
    path = table.with_name("threads")
    queues: dict[int | None, list[Any]] = {}
    for record in records_of(plan, values, step=3):
        queues.setdefault(getattr(record, "layer", None), []).append(record)
    with zt.store.TableWriter(path, plan) as writer:
        with ThreadPoolExecutor(4) as pool:
            for _ in pool.map(lambda queue: [*map(writer.append, queue)], queues.values()):
                pass
        writer.finish()
    assert files_of(path) == files_of(table)


def test_what_was_written_behind_the_journal_is_cut_off(
    table: Path, plan: TablePlan, values: Values
) -> None:
    """A torn line, an edited line, a changed chunk: the table is written from there on."""
    staged = table.with_name(".other.zarrtrace-new")

    def tear(content: bytes) -> bytes:
        return content[:-10]

    def edit(content: bytes) -> bytes:
        return content.replace(b'"block":1', b'"block":2')

    def change(_: bytes) -> None:
        file = next((staged / "features").glob("c.0.0.*"))
        content = bytearray(file.read_bytes())
        content[5] ^= 1
        file.write_bytes(content)

    for damage, done in ((tear, 16), (edit, 16), (change, 0)):
        with zt.store.TableWriter(table.with_name("other"), plan) as writer:
            for record in records_of(plan, values, start=writer.done, stop=40):
                writer.append(record)
            assert writer.done == 32
        journal = staged / "journal"
        if (content := damage(journal.read_bytes())) is not None:
            journal.write_bytes(content)
        with zt.store.TableWriter(table.with_name("other"), plan) as writer:
            assert writer.done == done
    write_table(table.with_name("other"), plan, values)
    assert files_of(table.with_name("other")) == files_of(table)


_WRITE = """
import sys
from sample_tables import plan_of, records_of, values_of
import zarrtrace as zt

plan, values = plan_of(200), values_of(3, 200, 300, 12)
with zt.store.TableWriter(sys.argv[1], plan) as writer:
    print(writer.done, flush=True)
    for record in records_of(plan, values, start=writer.done, step=2):
        writer.append(record)
    writer.finish()
"""


@pytest.mark.long
def test_killed_at_random_moments(tmp_path: Path) -> None:
    write_table(tmp_path / "whole", plan_of(200), values_of(3, 200, 300, 12))
    path, rng = tmp_path / "killed", np.random.default_rng(0)
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITE, str(path)], stdout=subprocess.PIPE, cwd="tests"
        )
        assert process.stdout is not None
        process.stdout.readline()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(float(rng.random() * 0.15))
        process.kill()
        process.communicate()
        if path.exists():
            break
    write_table(path, plan_of(200), values_of(3, 200, 300, 12))
    assert files_of(path) == files_of(tmp_path / "whole")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["killed", "whole"]


def test_a_full_disk_loses_nothing(
    table: Path, plan: TablePlan, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, append, count = table.with_name("full"), disk.append, itertools.count()

    def full(*given: Any) -> None:
        if next(count) > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(*given)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "append", full)
        with zt.store.TableWriter(path, plan) as writer:
            records = list(records_of(plan, values))
            with pytest.raises(NoSpaceError):
                list(map(writer.append, records))
            with pytest.raises(StoreError, match="nothing can be stored any more"):
                writer.append(records[0])
    assert not path.exists()
    write_table(path, plan, values)
    assert files_of(path) == files_of(table)


def test_one_writer_at_a_time(tmp_path: Path, plan: TablePlan) -> None:
    with (
        zt.store.TableWriter(tmp_path / "run", plan),
        pytest.raises(LockedError),
        zt.store.TableWriter(tmp_path / "run", plan),
    ):
        pass


# --- what is refused ---------------------------------------------------------------------------


def test_records_that_do_not_fit_are_refused(
    tmp_path: Path, plan: TablePlan, values: Values
) -> None:
    _, first, *_ = records_of(plan, values)
    assert isinstance(first, SampleRecord)
    found = first.features["features"]
    residual = np.array(first.residual)  # a copy
    turned = tuple(at[::-1] for at in found.at)
    odd = {
        "must come next": replace(first, start=7),
        "layer 9 is not stored": replace(first, layer=9),
        "expected are features, residual": replace(first, residual=None),
        "has shape": replace(first, residual=residual[:, :5]),
        "has shape ": replace(first, residual=residual[:3]),
        "is float64": replace(first, residual=residual.astype(float)),
        "is int32": replace(first, residual=residual.astype(np.int32)),
        "do not ascend": replace(first, features={"features": replace(found, at=turned)}),
        "blocks of 32": replace(first, features={"features": replace(found, columns=32)}),
        "is of type ndarray": replace(first, features={"features": np.asarray(found)}),
    }
    with zt.store.TableWriter(tmp_path / "run", plan) as writer:
        for said, record in odd.items():
            with pytest.raises(StoreError, match=said.strip()):
                writer.append(record)
        residual[2, 3] = np.nan
        with pytest.raises(NonFiniteError, match="residual of layer 1"):
            writer.append(replace(first, residual=residual))
        with pytest.raises(IncompleteError, match="50 of 50 samples missing"):
            writer.finish()


def test_values_too_large_for_the_precision_are_refused(tmp_path: Path, values: Values) -> None:
    plan = plan_of(SAMPLES)
    plan = replace(
        plan,
        attributes=plan.attributes.model_copy(update={"residual_dtype": "float16"}),
        shape=replace(plan.shape, residual_dtype="float16"),
    )
    _, first, *_ = records_of(plan, values)
    assert isinstance(first, SampleRecord)
    with zt.store.TableWriter(tmp_path / "run", plan) as writer:
        writer.append(first)
        large = replace(first, start=7, residual=np.asarray(first.residual) * 1e6)
        with pytest.raises(NonFiniteError, match="--residual-dtype"):
            writer.append(large)


def test_plans_that_contradict_themselves_are_refused(tmp_path: Path, plan: TablePlan) -> None:
    coordinates = dict(plan.coordinates)
    for changed in (
        {"residual": np.zeros(SAMPLES)},
        {"balance": np.zeros(3)},
        {"balance": np.zeros(SAMPLES, np.complex64)},
        {"balance": [None] * SAMPLES},
    ):
        with pytest.raises(ConfigError):
            zt.store.TableWriter(tmp_path, replace(plan, coordinates={**coordinates, **changed}))


def test_another_configuration_is_refused_until_it_is_to_replace(
    table: Path, plan: TablePlan, values: Values
) -> None:
    before = files_of(table)
    other = replace(plan, config={**plan.config, "model": "n"})
    with pytest.raises(ConfigMismatchError, match="model: 'm' there, 'n' now"):
        write_table(table, other, values)
    newer = replace(plan, config={**plan.config, "versions": {"torch": "3.0"}})
    with pytest.raises(ConfigMismatchError, match="version of torch"):
        write_table(table, newer, values)
    write_table(table, newer, values, accept_versions=True)  # complete: nothing to do
    assert files_of(table) == before
    with zt.store.TableWriter(table, other, overwrite=True) as writer:
        for record in records_of(plan, values, stop=20):
            writer.append(record)
    assert files_of(table) == before
    with pytest.raises(ConfigMismatchError):  # what is staged is another one's, too
        write_table(table, newer, values)
    write_table(table, other, values, overwrite=True)
    assert zt.open_table(table).attrs["config"]["model"] == "n"
    assert [one.name for one in table.parent.iterdir()] == ["run"]


def test_staged_with_other_versions_names_both(
    tmp_path: Path, plan: TablePlan, values: Values
) -> None:
    newer = replace(
        plan,
        config={**plan.config, "versions": {"torch": "3.0"}},
        attributes=plan.attributes.model_copy(update={"versions": {"torch": "3.0"}}),
    )
    with zt.store.TableWriter(tmp_path / "run", plan) as writer:
        for record in records_of(plan, values, stop=20):
            writer.append(record)
    with pytest.raises(IncompleteError):
        zt.open_table(tmp_path / "run")
    with pytest.raises(ConfigMismatchError, match="version of torch"):
        write_table(tmp_path / "run", newer, values)
    write_table(tmp_path / "run", newer, values, accept_versions=True)
    attributes = zt.open_table(tmp_path / "run").attrs
    assert attributes["versions"]["torch"] == "2.4.0, 3.0"
    assert attributes["config"]["versions"]["torch"] == "2.4.0, 3.0"


def test_kinds_are_told_apart(table: Path, plan: TablePlan, values: Values) -> None:
    with pytest.raises(NotATraceError, match=r"(?s)is a table, not a run.*open_table"):
        zt.open_run(table)
    with pytest.raises(NotATraceError, match=r"(?s)is a table, not a trace.*open_table"):
        zt.open_trace(table)
    run = table.with_name("traces")
    with zt.store.RunWriter(run, [], {}) as writer:
        writer.finish()
    with pytest.raises(NotATraceError, match=r"(?s)is a run, not a table.*open_run"):
        zt.open_table(run)
    with pytest.raises(NotATraceError, match="is a run, not a table"):
        write_table(run, plan, values)
    write_table(run, plan, values, overwrite=True)
    assert files_of(run) == files_of(table)
    with zt.store.RunWriter(table, [], {}, overwrite=True) as writer:
        writer.finish()
    assert zt.store.kind_of(table) == "run"
    assert sorted(one.name for one in table.parent.iterdir()) == ["run", "traces"]


def test_few_files_whatever_the_size() -> None:
    for features, channels in ((512, 64), (32_768, 4096)):
        layouts = table_layout(
            TableShape(
                layers=31,
                samples=100_000,
                features={"features": features},
                channels=channels,
                coordinates=dict.fromkeys(map(str, range(20)), "int64"),
            )
        )
        files = [
            math.ceil(size / step)
            for one in layouts.values()
            for size, step in [(math.prod(one.shape), math.prod(one.shards or one.chunks))]
        ]
        assert sum(files) + len(files) + 1 <= (200 if features == 512 else 2000)


# --- damage ------------------------------------------------------------------------------------


@pytest.mark.long
def test_damage_of_every_kind_of_file_is_found(table: Path, values: Values) -> None:
    """A changed byte, each file missing, and a foreign file are named."""
    assert zt.verify(table) == []
    for file in sorted(table.rglob("*")):
        if not file.is_file():
            continue
        content = file.read_bytes()
        for at in (0, len(content) // 2, len(content) - 1):
            changed = bytearray(content)
            changed[at] ^= 1
            file.write_bytes(changed)
            with contextlib.suppress(IntegrityError, FormatVersionError, NotATraceError):
                assert zt.verify(table), file
                _read_is_right_or_refused(table, values)
        file.unlink()
        with contextlib.suppress(IntegrityError, NotATraceError):
            assert zt.verify(table), file
            _read_is_right_or_refused(table, values)
        file.write_bytes(content)
    (table / "features" / "odd").touch()
    (problem,) = zt.verify(table)
    assert "does not belong to the table" in problem.message


def _read_is_right_or_refused(table: Path, values: Values) -> None:
    ds = zt.open_table(table)
    for name in ("features", "residual", "next_token", "next_token_logprob", "next_token_text"):
        with contextlib.suppress(IntegrityError):
            found = ds[name].values[:2] if name == "features" else ds[name].values
            wanted = getattr(values, name)
            np.testing.assert_array_equal(found, wanted[:2] if name == "features" else wanted)


def test_repair_keeps_the_blocks_before_the_damage(
    table: Path, plan: TablePlan, values: Values
) -> None:
    before = files_of(table)
    file = table / "residual" / "c.1.0.0"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with zt.store.TableWriter(table, plan) as writer:
        assert writer.is_published
    with zt.store.TableWriter(table, plan, repair=True) as writer:
        assert 0 < writer.done < SAMPLES
    write_table(table, plan, values, repair=True)
    assert files_of(table) == before
    (table / "zarr.json").write_bytes(b"{}")
    with pytest.raises((IntegrityError, NotATraceError)):
        write_table(table, plan, values)


# --- elsewhere ---------------------------------------------------------------------------------


def test_object_stores_and_copies(table: Path, plan: TablePlan, values: Values) -> None:
    address = f"memory://tables-{table.parent.name}/run"
    write_table(address, plan, values)
    _same(zt.open_table(address), plan, values)
    assert zt.verify(address) == []
    back, there = table.with_name("back"), address.replace("/run", "/copy")
    assert zt.copy(address, back).scenarios == 25
    assert files_of(back) == files_of(table)
    zt.copy(table, there)
    assert zt.copy(table, there).bytes == 0
    _same(zt.open_table(there), plan, values)
    with pytest.raises(ConfigMismatchError):
        write_table(address, replace(plan, config={}), values)
    write_table(address, replace(plan, config={}), values, overwrite=True)
    assert zt.open_table(address).attrs["config"] == {}


def test_info_says_what_a_table_holds(table: Path, plan: TablePlan, values: Values) -> None:
    said = CliRunner().invoke(group, ["info", str(table)])
    assert said.exit_code == 0, said.output
    for part in ("50 of 25 scenarios", "last", "1-2,5 (no SAE: 5)", "50 of 50 samples"):
        assert part in said.output
    with zt.store.TableWriter(table.with_name("other"), plan) as writer:
        for record in records_of(plan, values, stop=20):
            writer.append(record)
    said = CliRunner().invoke(group, ["info", str(table.with_name("other"))])
    assert said.exit_code == 3, said.output
    assert "16 of 50 samples" in said.output
    assert CliRunner().invoke(group, ["verify", str(table)]).exit_code == 0
