"""Labels of features: what is stored is what pandas reads from the file, and nothing else."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pandas as pd
import pytest
import sample_tables
import xarray as xr
from click.testing import CliRunner

import zarrtrace as zt
from zarrtrace.cli import group
from zarrtrace.errors import ConfigError, IntegrityError, LockedError, NotATraceError
from zarrtrace.figures import catalogue, features
from zarrtrace.format.attributes import SAEAttributes
from zarrtrace.format.layout import LABELLED
from zarrtrace.index import (
    build_index,
    find_feature,
    names_of,
    read_labels,
    write_labels,
)
from zarrtrace.storage import locate
from zarrtrace.store import RunWriter, locked
from zarrtrace.store.label_file import check_labels
from zarrtrace.viewer.bundle import write_bundle
from zarrtrace.viewer.layout import Layout
from zarrtrace.viewer.page_files import page_file

COLUMNS = ["array", "layer", "feature", "label"]


def labels_of(*rows: tuple[Any, ...]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=["layer", "feature", "label"])


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A CSV file: every feature of layers 1 and 2 of a fake run, in no order."""
    rows = [(layer, n, f"label {n} of {layer}") for layer in (1, 2) for n in range(16)]
    frame = labels_of(*rows).sample(frac=1, random_state=3)
    frame.to_csv(tmp_path / "labels.csv", index=False)
    return tmp_path / "labels.csv"


def neuronpedia_run(folder: Path, layers: tuple[int, ...] = (1, 2, 3)) -> Path:
    """Write a run with the SAEs of the release gpt2-small-res-jb."""

    def sae(layer: int) -> SAEAttributes:
        (found,) = fakes.make_saes([layer], 16)
        name = f"blocks.{layer}.hook_resid_pre"
        return found.model_copy(update={"release": "gpt2-small-res-jb", "id": name})

    plan = replace(fakes.make_plan("Safe_1", layers=layers), saes=tuple(map(sae, layers)))
    with RunWriter(folder, ["Safe_1"], fakes.CONFIG) as run:
        with run.trace(plan) as writer:
            for record in fakes.make_records("Safe_1"):
                writer.append(record)
        run.finish()
    return folder


def explanation(layer: str, index: int | str, text: str | None, **more: Any) -> dict[str, Any]:
    """Return an object as in Neuronpedia's exports, without what is not read."""
    return {
        "id": "c1", "modelId": "gpt2-small", "layer": layer, "index": index, "description": text,
        "typeName": "oai_token-act-pair", "explanationModelName": "gpt-4o-mini",
        "embedding": [0.25] * 4, **more,
    }  # fmt: skip


# --- reading and writing -------------------------------------------------------------------------


def test_labels_are_what_pandas_reads_from_the_file(run: fakes.FakeRun, table: Path) -> None:
    done = write_labels(run.path, table)
    assert done == (32, 32, 0, 0, 0, 0)
    expected = pd.read_csv(table).sort_values(["layer", "feature"], ignore_index=True)
    found = read_labels(run.path)
    assert list(found) == COLUMNS
    assert set(found["array"]) == {"features"}
    pd.testing.assert_frame_equal(
        found[["layer", "feature", "label"]].astype({"label": object}),
        expected.astype({"label": object}),
    )
    pd.testing.assert_frame_equal(pd.read_parquet(run.path / LABELLED), found)  # by others, too
    of_layer = read_labels(run.path, layers=[2])
    assert of_layer["feature"].tolist() == list(range(16))
    assert set(of_layer["layer"]) == {2}


@pytest.mark.parametrize("ending", [".parquet", ".tsv", ".csv.gz", ".jsonl", ".jsonl.gz", ".json"])
def test_every_kind_of_file_gives_the_same(
    run: fakes.FakeRun, table: Path, tmp_path: Path, ending: str
) -> None:
    frame, path = pd.read_csv(table), tmp_path / f"labels{ending}"
    if ending == ".parquet":
        frame.to_parquet(path, index=False)
    elif ".json" in ending:
        frame.to_json(path, orient="records", lines=ending != ".json")
    else:
        frame.to_csv(path, sep="\t" if ending == ".tsv" else ",", index=False)
    write_labels(run.path, path)
    found = read_labels(run.path)
    write_labels(run.path, frame, replace=True)
    pd.testing.assert_frame_equal(found, read_labels(run.path))


def test_words_that_pandas_takes_for_missing_are_labels(run: fakes.FakeRun, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("layer,feature,label\n1,0,null\n1,1,NA\n1,2,  two\n1,3,' '\n")
    write_labels(run.path, tmp_path / "x.csv")
    assert read_labels(run.path)["label"].tolist() == ["null", "NA", "two", "' '"]


def test_rows_that_do_not_fit_are_counted_and_not_stored(run: fakes.FakeRun) -> None:
    frame = labels_of(
        (1, 3, "first"), (1, 3, "second"), (4, 0, "no such layer"), (1, 16, "too far"),
        (1, -1, "before 0"), (2, 0, " \n"), (2, 1, None),
    )  # fmt: skip
    frame["array"] = ["features", None, "", "", "", "", ""]
    other = pd.DataFrame([("features_mlp", 1, 0, "another array")], columns=COLUMNS)
    done = write_labels(run.path, [frame, other])
    assert done._asdict() == {
        "added": 1, "stored": 1, "other_saes": 2, "out_of_range": 2, "empty": 2, "repeated": 1,
    }  # fmt: skip
    assert read_labels(run.path).to_numpy().tolist() == [["features", 1, 3, "first"]]


def test_later_labels_replace_those_of_the_same_features(run: fakes.FakeRun) -> None:
    write_labels(run.path, labels_of((1, 1, "old"), (1, 2, "kept")))
    done = write_labels(run.path, labels_of((1, 1, "new"), (3, 0, "more")))
    assert (done.added, done.stored) == (2, 3)
    assert read_labels(run.path)["label"].tolist() == ["new", "kept", "more"]
    write_labels(run.path, labels_of((1, 5, "alone")), replace=True)
    assert read_labels(run.path)["label"].tolist() == ["alone"]


def test_further_saes_on_a_layer_have_labels_of_their_own(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, features={"features": 16, "features_mlp": 40})
    frame = labels_of((1, 39, "mlp")).assign(array="features_mlp")
    done = write_labels(run.path, [frame, labels_of((1, 39, "too far"), (1, 7, "residual"))])
    assert (done.added, done.out_of_range) == (2, 1)
    assert names_of(run.path, [(1, 39), (1, 7)], array="features_mlp") == {(1, 39): "mlp"}
    assert names_of(run.path, [(1, 39), (1, 7)]) == {(1, 7): "residual"}


def test_tables_have_labels(tmp_path: Path) -> None:
    path = tmp_path / "table"
    sample_tables.write_table(
        path, sample_tables.plan_of(), sample_tables.values_of(3, 50, 300, 12)
    )
    done = write_labels(path, labels_of((2, 9, "of a table"), (5, 9, "a layer without an SAE")))
    assert (done.added, done.other_saes) == (1, 1)
    assert find_feature(path, 2, 9).label == "of a table"
    assert zt.verify(path) == []
    zt.copy(path, tmp_path / "copy")
    assert read_labels(tmp_path / "copy")["label"].tolist() == ["of a table"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("layer,feature,text\n1,2,x\n", "no column 'label'"),
        ("layer,feature,label\n1,2.5,x\n", "row 0 has '2.5' where a whole number"),
        ("layer,feature,label\n1,2,x\n1,,y\n", "row 1 has ''"),
        ("layer,feature,label\n9,2,x\n", "no row labels a feature"),
        ("", "cannot be read"),
    ],
)
def test_a_file_that_is_no_table_of_labels_is_refused(
    run: fakes.FakeRun, tmp_path: Path, content: str, said: str
) -> None:
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(ConfigError, match=said):
        write_labels(run.path, tmp_path / "x.csv")
    assert not (run.path / LABELLED).exists()


def test_what_is_no_run_or_is_being_written_is_refused(run: fakes.FakeRun, tmp_path: Path) -> None:
    with pytest.raises(NotATraceError):
        write_labels(tmp_path / "nothing", labels_of((1, 1, "x")))
    with pytest.raises(ConfigError, match="unknown kind of file"):
        write_labels(run.path, tmp_path / "labels.xlsx")
    with locked(run.path), pytest.raises(LockedError):
        write_labels(run.path, labels_of((1, 1, "x")))
    assert read_labels(run.path).empty


# --- Neuronpedia ---------------------------------------------------------------------------------


def test_explanations_of_neuronpedia_are_matched_with_the_saes(tmp_path: Path) -> None:
    run = neuronpedia_run(tmp_path / "run")
    objects = [
        explanation("2-res-jb", "5", "references to  money"),
        explanation("3-res-jb", 0, "the word stop"),
        explanation("2-res-jb", "5", "by another model"),
        explanation("2-res-jb", "16", "out of range"),
        explanation("7-res-jb", "5", "a layer that the run lacks"),
        explanation("2-res_mid-jb", "5", "another SAE"),
        explanation("2-res-jb", "5", "another model", modelId="gpt2-medium"),
        explanation("2-res-jb", "6", None),
    ]
    with gzip.open(tmp_path / "batch-0.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(one) + "\n" for one in objects[:1])
    (tmp_path / "batch-1.jsonl").write_text("".join(json.dumps(one) + "\n" for one in objects[1:]))
    done = write_labels(run, [tmp_path / "batch-0.jsonl.gz", tmp_path / "batch-1.jsonl"])
    assert done == (2, 2, 3, 1, 1, 1)
    assert read_labels(run)[["layer", "feature", "label"]].to_numpy().tolist() == [
        [2, 5, "references to money"],
        [3, 0, "the word stop"],
    ]
    (tmp_path / "old.json").write_text(json.dumps(objects))  # their older exports
    assert write_labels(run, tmp_path / "old.json", replace=True) == done


def test_explanations_of_other_saes_are_refused_with_the_names_of_the_runs(
    run: fakes.FakeRun, tmp_path: Path
) -> None:
    ours = neuronpedia_run(tmp_path / "ours")
    (tmp_path / "x.jsonl").write_text(json.dumps(explanation("9-res-jb", 1, "x")) + "\n")
    with pytest.raises(ConfigError, match="no row labels") as error:
        write_labels(ours, tmp_path / "x.jsonl")
    assert "gpt2-small/1-res-jb" in str(error.value)
    with pytest.raises(ConfigError, match="not known on Neuronpedia"):
        write_labels(run.path, tmp_path / "x.jsonl")


@pytest.mark.parametrize("end", [-20, -9])
def test_a_file_that_was_cut_short_is_refused(run: fakes.FakeRun, tmp_path: Path, end: int) -> None:
    packed = io.BytesIO()
    with gzip.open(packed, "wt") as file:
        file.write(json.dumps({"layer": 1, "feature": 2, "label": "whole"}) + "\n")
    (tmp_path / "x.jsonl.gz").write_bytes(packed.getvalue()[:end])
    with pytest.raises(ConfigError, match="cannot be read"):
        write_labels(run.path, tmp_path / "x.jsonl.gz")


# --- in a run ------------------------------------------------------------------------------------


def test_a_labelled_run_is_read_verified_and_copied(
    run: fakes.FakeRun, table: Path, tmp_path: Path
) -> None:
    before = xr.open_datatree(run.path, engine="zarr")
    write_labels(run.path, table)
    xr.testing.assert_identical(xr.open_datatree(run.path, engine="zarr"), before)
    assert zt.verify(run.path) == []
    zt.copy(run.path, tmp_path / "copy")
    zt.copy(run.path, tmp_path / "copy")  # what arrived stays
    assert (tmp_path / "copy" / LABELLED).read_bytes() == (run.path / LABELLED).read_bytes()
    assert zt.verify(tmp_path / "copy") == []
    trace = tmp_path / "copy" / "Safe_1"
    assert names_of(trace, [(1, 2)]) == {(1, 2): "label 2 of 1"}  # a trace has its run's


def test_a_run_that_is_resumed_keeps_its_labels(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, drop={"Risky_2": [3]})
    write_labels(run.path, labels_of((3, 1, "from the trace that is complete")))
    assert [layer for _, layer in fakes.make_run(tmp_path).written] == [3]
    assert read_labels(run.path)["label"].tolist() == ["from the trace that is complete"]
    assert zt.verify(run.path) == []


def test_a_damaged_file_is_noticed_or_its_labels_are_right(
    run: fakes.FakeRun, table: Path, tmp_path: Path
) -> None:
    write_labels(run.path, table)
    whole, right = (run.path / LABELLED).read_bytes(), read_labels(run.path)
    noticed = 0
    for at in range(0, len(whole), 23):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        (run.path / LABELLED).write_bytes(damaged)
        try:
            check_labels(locate(run.path))
        except IntegrityError:
            noticed += 1
        else:
            pd.testing.assert_frame_equal(read_labels(run.path), right)
    assert noticed > len(whole) / 23 / 2
    (run.path / LABELLED).write_bytes(whole[: len(whole) // 2])
    assert LABELLED in {problem.array for problem in zt.verify(run.path)}
    with pytest.raises(IntegrityError, match="damaged"):
        zt.copy(run.path, tmp_path / "copy")
    with pytest.raises(IntegrityError, match="Remove it"):
        read_labels(run.path)
    write_labels(run.path, table, replace=True)
    assert zt.verify(run.path) == []


def test_a_run_in_an_object_store_has_labels(run: fakes.FakeRun, table: Path) -> None:
    zt.copy(run.path, "memory://bucket/labelled")
    write_labels("memory://bucket/labelled", table)
    assert len(read_labels("memory://bucket/labelled")) == 32
    assert zt.verify("memory://bucket/labelled") == []


# --- shown ---------------------------------------------------------------------------------------


def test_names_are_labels_else_the_strongest_words(run: fakes.FakeRun) -> None:
    assert names_of(run.path, [(1, 0)]) == names_of(run.path, []) == {}
    build_index(run.path)
    write_labels(run.path, labels_of((1, 0, "a label")))
    active = [n for n in range(16) if find_feature(run.path, 1, n).tokens]
    names = names_of(run.path, [(1, n) for n in range(16)])
    assert names[1, 0] == "a label"
    for feature in active[1:]:
        tokens = [token.token.strip() for token in find_feature(run.path, 1, feature).tokens]
        words = list(dict.fromkeys(filter(None, tokens)))[:3]
        assert names.get((1, feature), "") == ", ".join(f'"{word}"' for word in words)
    assert names_of(run.path, [(1, 0), (1, active[-1])], words=0) == {(1, 0): "a label"}


def call(*arguments: object) -> Any:
    return CliRunner().invoke(group, [str(one) for one in arguments], catch_exceptions=False)


def test_the_command_line_stores_counts_and_finds_labels(run: fakes.FakeRun, table: Path) -> None:
    assert call("labels", run.path).stdout.endswith("no labels\n")
    assert call("find", run.path, "--label", "x").exit_code == 2
    stored = call("labels", run.path, table)
    assert "32 labels read, 32 features have one" in stored.stdout
    assert "no row was left out" in stored.stdout
    assert call("labels", run.path).stdout.splitlines()[1].split() == ["features", "1", "16"]
    found = call("find", run.path, "--label", "OF 15 label", "--json")
    pairs = [(one["layer"], one["feature"]) for one in json.loads(found.stdout)]
    assert pairs == [(1, 15), (2, 15)]
    assert "label 15 of 2" in call("find", run.path, "--label", "15", "--layer", 2).stdout
    assert call("find", run.path, "--label", "15", "--feature", 2).exit_code == 2
    assert call("find", run.path, "--layer", 2).exit_code == 2
    build_index(run.path)
    shown = call("find", run.path, "--layer", 1, "--feature", 3)
    assert shown.stdout.startswith("label 3 of 1\nfeature 3 of layer 1:")


def test_analyses_name_their_features(run: fakes.FakeRun, table: Path, tmp_path: Path) -> None:
    write_labels(run.path, table)
    call("analyze", "word-associations", run.path, "-o", tmp_path / "words.csv")
    words = pd.read_csv(tmp_path / "words.csv", keep_default_na=False)
    layer, feature = words["layer"].astype(str), words["feature"].astype(str)
    expected = np.where(words["layer"] < 3, "label " + feature + " of " + layer, "")
    assert words["label"].tolist() == expected.tolist()
    shown = call("analyze", "feature-trajectory", run.path, "--feature", "1:4").stdout
    assert "label 4 of 1" in shown
    (run.path / LABELLED).write_bytes(b"PAR1 no more")
    again = call("analyze", "feature-trajectory", run.path, "--feature", "1:4")
    assert (again.exit_code, "features are not named" in again.stderr) == (0, True)


@pytest.mark.parametrize(
    ("analysis", "options", "dims"),
    [
        ("word-associations", (), ("row",)),
        ("feature-trajectory", ("--feature", "1:4", "--feature", "3:4"), ("pair",)),
        ("pathway-features", ("--source", "balance"), ("scenario", "rank", "layer")),
    ],
)
def test_netcdf_has_labels_where_the_run_has(
    table: Path, tmp_path: Path, analysis: str, options: Any, dims: Any
) -> None:
    run = fakes.make_run(tmp_path, scenarios=("Safe_1", "Risky_2"), active=0.6)

    def written() -> xr.Dataset:
        done = call("analyze", analysis, run.path, *options, "-o", tmp_path / "out.nc")
        assert done.exit_code == 0, done.stderr
        return xr.load_dataset(tmp_path / "out.nc", engine="h5netcdf")

    assert "label" not in written().variables
    write_labels(run.path, table)  # of layers 1 and 2
    found = written()
    assert "label" in found.coords
    assert set(found["label"].dims) <= set(dims)
    layer, feature, label = xr.broadcast(found["layer"], found["feature"], found["label"])
    named = [
        text == (f"label {number} of {at}" if at < 3 and number >= 0 else "")
        for at, number, text in zip(*map(np.ravel, (layer, feature, label)), strict=True)
    ]
    assert all(named)
    assert (label != "").any()
    assert (label == "").any()


def test_figures_name_their_features(run: fakes.FakeRun) -> None:
    label = "$ amounts, and a text that is longer than there is room for"
    write_labels(run.path, labels_of((1, 4, label)))
    (ax,) = features.feature_timeline(
        zt.open_trace(run.trace), [(1, 4), (2, 4)], labels=names_of(run.path, [(1, 4)])
    ).axes
    shown = [text.get_text() for text in ax.get_yticklabels()]
    assert shown == ["L1 · 4 $ amounts, and a text t…", "L2 · 4"]
    assert catalogue._labels(locate(run.path)) == {(1, 4): label}


def test_figures_of_a_run_take_its_labels(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, scenarios=("Safe_1", "Risky_2", "Safe_3", "Risky_4"), active=0.6)
    write_labels(
        run.path, labels_of(*((n, f, f"of {n}: {f}") for n in (1, 2, 3) for f in range(16)))
    )
    found = zt.open_run(run.path)
    for make in (catalogue._volcano, catalogue._trajectory):
        figure, _ = make(locate(run.path), found)
        (ax,) = figure.axes
        texts = [text.get_text() for text in (*ax.texts, *ax.get_xticklabels())]
        named = [re.fullmatch(r"L(\d) · (\d+) of (\d): (\d+)", text) for text in texts]
        numbers = [one.groups() for one in named if one]
        assert numbers
        assert all(one[:2] == one[2:] for one in numbers)


def test_the_viewer_serves_the_labels_of_a_layer(
    run: fakes.FakeRun, table: Path, tmp_path: Path
) -> None:
    assert "labels" not in json.loads(Layout(run.path).index)
    write_labels(run.path, table)
    layout = Layout(run.path, layers=[2, 3])
    assert json.loads(layout.index)["labels"] == {"features": [2]}
    (file,) = (name for name in layout.files() if "@labels" in name)
    assert file == "data/@labels/features/2.json.gz"
    found = json.loads(gzip.decompress(layout.read(file)))
    assert found == {str(n): f"label {n} of 2" for n in range(16)}
    write_bundle(layout, tmp_path / "bundle")
    assert (tmp_path / "bundle" / file).read_bytes() == layout.read(file)
    for name in ("features/1", "features/02", "features/../2", "other/2"):
        with pytest.raises(KeyError):
            layout.read(f"data/@labels/{name}.json.gz")


def test_the_page_reads_the_labels_of_a_layer(
    run: fakes.FakeRun, table: Path, tmp_path: Path
) -> None:
    if shutil.which("node") is None:
        if os.environ.get("ZARRTRACE_REQUIRE_NODE"):
            pytest.fail("node is not installed")
        pytest.skip("node is not installed")
    write_labels(run.path, table)
    layout = Layout(run.path)
    (tmp_path / "2.json.gz").write_bytes(layout.read("data/@labels/features/2.json.gz"))
    (tmp_path / "labels.mjs").write_bytes(page_file("labels.js"))
    script = f"""
        import {{ readFileSync }} from "node:fs";
        import {{ labelOf, readLabels }} from "./labels.mjs";
        const read = [];
        const file = async (path) => {{
          read.push(path);
          return new Response(readFileSync(path.split("/").pop()));
        }};
        const labelled = {json.dumps(json.loads(layout.index)["labels"])};
        const before = labelOf("features", 2, 5);
        for (const layer of [2, 2, 3]) await readLabels(labelled, "features", layer, file);
        await readLabels(labelled, "features_mlp", 2, file);
        const found = [[2, 5], [2, 16], [3, 5]].map(([l, f]) => labelOf("features", l, f));
        console.log(JSON.stringify([before, read, found]));
    """
    done = subprocess.run(
        ["node", "--input-type=module", "-e", script],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == [
        None,
        ["data/@labels/features/2.json.gz"],
        ["label 5 of 2", None, None],
    ]
