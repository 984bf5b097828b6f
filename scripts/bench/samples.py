"""A table of many prompts: its cost beyond the model's own, its memory, its files, and reading it.

The embedded model and its 31 SAEs, prompts of 20 to 60 tokens made of words of the embedded suite,
ten columns of metadata, last position, features and residual stream. Each extraction runs in a
fresh process; CPU a prompt is that of the larger one beyond the smaller one. The floor is the
model's forward passes over the same batches, and the encoders on the rows that are stored. Reading
is plain xarray's.

    python scripts/bench/samples.py [--counts 1000 100000] [--floor 2048] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import common

COLUMNS = 10


def write_prompts(file: Path, count: int) -> None:
    """Write prompts with metadata, the same for the same count."""
    from zarrtrace import demo
    from zarrtrace.scenarios import load_suite

    words = " ".join(one.prompt for one in load_suite(demo.suite_path())).split(" ")
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            prompt = " ".join(draw.choices(words, k=draw.randint(10, 32)))
            metadata: dict[str, Any] = {f"column_{n}": draw.random() for n in range(COLUMNS - 2)}
            metadata |= {"game": f"game {number // 50}", "round": number % 50}
            stream.write(json.dumps({"prompt": prompt, "metadata": metadata}) + "\n")


def extract_once(prompts: str, output: str) -> None:
    """Extract in this process, and print what it took."""
    import zarrtrace as zt

    zt.extract(
        output, Path(prompts), model="demo", positions="last", residual=True, layout="table",
        quiet=True,
    )  # fmt: skip
    print(json.dumps({"cpu": time.process_time(), "peak": common.peak_bytes()}))


def floor_once(prompts: str, count: int) -> None:
    """Print CPU seconds of forward passes and encoders alone, in the batches of a table."""
    import torch

    from zarrtrace.extraction.options import Options, find_stream
    from zarrtrace.extraction.table import prepare_table
    from zarrtrace.scenarios import Scenario, stream

    some = [one for one, _ in zip(stream(Path(prompts)), range(count), strict=False)]
    texts = [Scenario(one.prompt, marks=False) for one in some]
    options = Options(model="demo", scenarios=texts, positions="last", residual=True)
    with prepare_table(options, find_stream(options)) as table:
        groups = table.groups(0)
    job, model = table.job, table.job.model
    assert job.source is not None  # noqa: S101 -- for mypy
    encoders = [job.source.load(job.saes[layer][0], model.device) for layer in job.layers]
    ids = [model.tokenizer(one.prompt)["input_ids"] for one in some]
    batches = []
    for first, stop in groups:
        group = sorted(ids[first:stop], key=len)
        batches += [group[at : at + job.batch_size] for at in range(0, len(group), job.batch_size)]
    spent = []
    for _ in range(2):  # the first warms up
        began = time.process_time()
        with torch.inference_mode():
            for batch in batches:
                longest = max(map(len, batch))
                rows = [one + [0] * (longest - len(one)) for one in batch]
                mask = [[1] * len(one) + [0] * (longest - len(one)) for one in batch]
                model.model(
                    input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask),
                    use_cache=False,
                )  # fmt: skip
                hidden = torch.randn(len(batch), model.d_model)
                for encoder in encoders:
                    encoder(hidden)
        spent.append(time.process_time() - began)
    print(json.dumps({"cpu": spent[-1] / count}))


def read(run: Path) -> list[tuple[str, float, float]]:
    """Time plain xarray, opening included."""
    import xarray as xr

    one = min(700, xr.open_zarr(run, chunks=None).sizes["sample"] - 1)

    def features(**chosen: int) -> None:
        _ = xr.open_zarr(run, chunks=None)["features"].isel(chosen).values

    acts = {
        "a layer of features": partial(features, layer=15),
        "one (layer, feature)": partial(features, layer=15, feature=100),
        "one sample of a layer": partial(features, layer=15, sample=one),
    }
    return [(what, *spent) for what, spent in common.turns(acts, 5).items()]


def main() -> None:
    """Print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs=2, default=[1000, 100_000])
    parser.add_argument("--floor", type=int, default=2048, help="prompts for the floor")
    parser.add_argument("--keep", type=Path, help="where the larger table stays")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        extract_once(*given.one)
        return
    if given.alone:
        floor_once(given.alone[0], int(given.alone[1]))
        return
    folder = Path(tempfile.mkdtemp(prefix="zarrtrace-samples-"))
    try:
        few, many = given.counts
        prompts = {count: folder / f"{count}.jsonl" for count in (few, many, given.floor)}
        for count, file in prompts.items():
            write_prompts(file, count)
        floors = [common.in_process(__file__, "--alone", prompts[given.floor], given.floor)["cpu"]]
        runs, walls = {}, {}
        for count in (few, many):
            began = time.perf_counter()
            runs[count] = common.in_process(
                __file__, "--one", prompts[count], folder / f"run_{count}"
            )
            walls[count] = time.perf_counter() - began
        floors.append(
            common.in_process(__file__, "--alone", prompts[given.floor], given.floor)["cpu"]
        )
        each = (runs[many]["cpu"] - runs[few]["cpu"]) / (many - few)
        floor = statistics.mean(floors)
        run = folder / f"run_{many}"
        print(
            f"CPU ms a prompt: {each * 1e3:.2f}, floor {floor * 1e3:.2f}: {each / floor:.2f} times"
        )
        for count in (few, many):
            peak = runs[count]["peak"] / 1e6
            print(f"{count:,} prompts: {walls[count]:.0f} s, peak memory {peak:.0f} MB")
        print(f"memory: {runs[many]['peak'] / runs[few]['peak'] - 1:+.1%}")
        files, total = sum(one.is_file() for one in run.rglob("*")), common.size_of(run)
        of_features, of_residual = (common.size_of(run / name) for name in ("features", "residual"))
        print(
            f"{files:,} files, {total / 1e6:.0f} MB: features {of_features / 1e6:.0f}, residual "
            f"{of_residual / 1e6:.0f}"
        )
        for what, wall, cpu in read(run):
            print(f"{what}: {wall * 1e3:.0f} ms wall, {cpu * 1e3:.0f} ms CPU")
        if given.keep:
            shutil.move(run, given.keep)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
