"""The command line: what goes to stdout and stderr, and exit codes."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import click
import fakes
import numpy as np
import pandas as pd
import pytest
import reading
import xarray as xr
from command_line import call
from processes import extracting, said_after

import zarrtrace as zt
from zarrtrace import cli
from zarrtrace.cli import analyze_, main
from zarrtrace.storage import locate
from zarrtrace.store import refuse_inside

COMMAND = [sys.executable, "-m", "zarrtrace"]


def test_help_lists_every_command() -> None:
    done = call("--help")
    assert done.returncode == 0
    for name in ("extract", "info", "verify", "export", "import", "analyze", "figures"):
        assert f"\n  {name} " in done.stdout
        assert call(name, "--help").returncode == 0


def test_min_count_of_words_says_what_is_counted() -> None:
    found = " ".join(call("analyze", "word-associations", "--help").stdout.split())
    assert "words at which the feature fires less often" in found


def test_version() -> None:
    assert call("--version").stdout.startswith("zarrtrace 0.")


def test_a_misspelt_command_is_recognised() -> None:
    done = call("extrct")
    assert done.returncode == 2
    assert "Did you mean 'extract'?" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layers", "x"], "1,5,20-31"),
        (["--layers", "5-2"], "not a range"),
        (["--layers", "1-99999999"], "not a range"),
        (["--layers", "1", "--layer-start", "2"], "both choose layers"),
        (["--layers", "32"], "the model has blocks 0 to 31"),
        (["--prompt", "a", "--scenarios", "b.yaml"], "either --prompt or"),
        (["--prompt", " ", "--model", "demo"], "prompt is empty"),
        (["--prompt", "a", "--prompt", "b"], "no model given"),
        (["--scenario", "Desperate10"], "Did you mean 'Desperate_10'?"),
        (["--model", "gpt2", "--prompt", "a"], "no SAEs given for gpt2"),
        (["--overwrite", "--repair"], "either --overwrite or --repair"),
        (["--workers", "2", "--scheduler", "tcp://127.0.0.1:9"], "Give one of --workers"),
        (["--layer-start", "5", "--layer-end", "2"], "is before --layer-start"),
        (["--gpu", "0", "--device", "cpu"], "either --device or --gpu"),
        (["--positions", "0,"], "0,5,-1"),
        (["--positions", "balanc"], "Did you mean"),
        (["--dtype", "int8"], "'int8'"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = call("extract", "-o", tmp_path / "run", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert not done.stdout
    assert not (tmp_path / "run").exists()


def test_info(shared_run: fakes.FakeRun) -> None:
    text = call("info", shared_run.path)
    assert text.returncode == 0
    assert "complete     yes, 2 of 2 scenarios" in text.stdout
    assert "attention (3 × 2 × 7 × 7)" in text.stdout
    found = json.loads(call("info", shared_run.path, "--json").stdout)
    assert [trace["scenario"] for trace in found["traces"]] == list(fakes.SCENARIOS)
    on_disk = sum(file.stat().st_size for file in shared_run.path.rglob("*") if file.is_file())
    run_itself = (shared_run.path / "zarr.json").stat().st_size
    assert found["bytes_on_disk"] == on_disk - run_itself
    assert found["traces"][0]["arrays"]["attention"] == [3, 2, 7, 7]


def test_info_of_a_partial_run(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, drop={"Safe_1": (2,)})
    done = call("info", run.path)
    assert done.returncode == 3
    assert "complete     NO, 1 of 2 scenarios" in done.stdout


def test_copy_of_a_partial_run_names_what_it_lacks(tmp_path: Path) -> None:
    run, target = fakes.make_run(tmp_path, drop={"Safe_1": (2,)}), tmp_path / "copy"
    done = call("copy", run.path, target)
    assert done.returncode == 3
    assert "copy: 1 of 2 scenarios, " in done.stdout
    assert "left out of the copy: Safe_1\nResume the extraction first" in done.stderr
    assert zt.copy(run.path, target).missing == ("Safe_1",)
    fakes.make_run(tmp_path)
    done = call("copy", run.path, target)
    assert (done.returncode, done.stderr) == (0, "")
    assert "copy: 2 scenarios, " in done.stdout
    assert fakes.files_in(target) == fakes.files_in(run.path)


def test_copy_of_a_run_without_any_complete_trace_is_refused(tmp_path: Path) -> None:
    run = fakes.make_run(tmp_path, drop=dict.fromkeys(fakes.SCENARIOS, (2,)))
    done = call("copy", run.path, tmp_path / "copy")
    assert done.returncode == 3
    assert "none of its 2 scenarios is complete; nothing to copy" in done.stderr
    assert "'zarrtrace extract' again" in done.stderr
    assert not (tmp_path / "copy").exists()


def test_verify(run: fakes.FakeRun) -> None:
    assert call("verify", run.path).returncode == 0
    reading.flip_byte_of_layer(run.trace, "features", 1)
    done = call("verify", run.path)
    assert done.returncode == 1
    assert "Safe_1" in done.stdout
    assert "features" in done.stdout
    (problem,) = json.loads(call("verify", run.path, "--json").stdout)
    assert (problem["scenario"], problem["array"], problem["layer"]) == ("Safe_1", "features", 2)


def test_export_and_import(shared_run: fakes.FakeRun, tmp_path: Path) -> None:
    done = call("export", shared_run.path, "-o", tmp_path / "npz", "--layers", "2-3")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_file()
    with np.load(tmp_path / "npz" / "Safe_1" / "layer_3.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["features"], shared_run.truth["Safe_1"]["features"][2])
    done = call("import", tmp_path / "npz", "-o", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert "2-3" in done.stdout


def test_errors_have_no_traceback(tmp_path: Path) -> None:
    for command in (
        ["info"],
        ["verify"],
        ["export", "-o", tmp_path / "x"],
        ["analyze", "decision"],
    ):
        done = call(*command, tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith("zarrtrace: error: ")
        assert "Traceback" not in done.stderr
        assert not done.stdout


@pytest.mark.parametrize(
    ("command", "output"),
    [
        (["analyze", "attention-to", "RUN", "--source", "balance"], "/proc/x.csv"),
        (["figures", "RUN"], "FILE"),
        (["figures", "RUN"], "FILE/below"),
        (["bundle", "RUN"], "/proc/x.html"),
        (["export", "RUN"], "FILE"),
        (["import", "NPZ"], "/proc/x"),
        (["import", "NPZ"], "FILE/below"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_an_output_that_cannot_be_written(
    shared_run: fakes.FakeRun, tmp_path: Path, command: list[str], output: str
) -> None:
    (tmp_path / "file").write_text("precious")
    call("export", shared_run.path, "-o", tmp_path / "npz")
    places = {"RUN": shared_run.path, "NPZ": tmp_path / "npz"}
    done = call(
        *(places.get(word, word) for word in command),
        "-o",
        output.replace("FILE", str(tmp_path / "file")),
    )
    assert done.returncode in (1, 2)
    _, error, said = done.stderr.partition("zarrtrace: error: ")  # bundle says its size before
    assert error
    assert ("/proc/" if output.startswith("/proc/") else str(tmp_path / "file")) in said
    assert 2 <= len(said.splitlines()) <= 3
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.torch
def test_a_run_where_nothing_can_be_written() -> None:
    done = call("extract", "-o", "/proc/x", "--layers", "1", "--scenario", "Risky_40", "-q")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("zarrtrace: error: ")
    assert "/proc/" in done.stderr


def test_unexpected_exceptions_propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ConnectionError("a bug of ours")

    monkeypatch.setattr("zarrtrace.cli.group", broken)
    monkeypatch.setattr(sys, "argv", ["zarrtrace", "info", "x"])
    with pytest.raises(ConnectionError):
        main()


@pytest.mark.parametrize("ending", ["csv", "parquet", "nc", "json"])
def test_analyze_writes_by_ending(shared_run: fakes.FakeRun, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"out.{ending}"
    done = call("analyze", "attention-to", shared_run.path, "--source", "balance", "-o", file)
    assert done.returncode == 0, done.stderr
    if ending == "nc":
        with xr.open_dataset(file, engine="h5netcdf") as ds:
            values = ds.attention.sel(scenario="Safe_1").to_numpy().ravel()
    else:
        frame = {
            "csv": pd.read_csv,
            "parquet": pd.read_parquet,
            "json": lambda path: pd.DataFrame(json.loads(path.read_text())["rows"]),
        }[ending](file)
        values = frame[frame.scenario == "Safe_1"].sort_values("layer").attention.to_numpy()
    truth = shared_run.truth["Safe_1"]["attention"]
    expected = truth[:, :, -1, 1:3].mean((1, 2), dtype=np.float64)
    np.testing.assert_allclose(values, expected)


def test_long_prompts_are_analysed_in_blocks(shared_run: fakes.FakeRun) -> None:
    def is_in_blocks(**limit: int) -> bool:
        data = analyze_._open(locate(shared_run.path), on_cluster=False, **limit)
        return data["Safe_1"]["attention"].chunks is not None

    layer = zt.open_trace(shared_run.path / "Safe_1")["attention"][:1].nbytes
    assert not is_in_blocks()
    assert not is_in_blocks(large_layer=layer)
    assert is_in_blocks(large_layer=layer - 1)
    trace = locate(shared_run.path / "Safe_1")
    single = analyze_._open(trace, on_cluster=False, large_layer=layer - 1)
    assert single["attention"].chunks is not None


def test_analyze_prints_a_table(shared_run: fakes.FakeRun) -> None:
    done = call("analyze", "decision", shared_run.path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["scenario", "option"] or "scenario" in done.stdout
    assert call("analyze", "decision", shared_run.path, "-o", "x.xls").returncode == 2


def test_a_closed_pipe_is_no_error_message(shared_run: fakes.FakeRun) -> None:
    command = " ".join([*COMMAND, "info", str(shared_run.path), "--json", "| head -1"])
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr


@pytest.mark.torch
def test_a_dry_run_says_what_a_run_needs(tmp_path: Path, demo_run: Path) -> None:
    arguments = ["extract", "-o", tmp_path / "run", "--dry-run"]
    assert "Nothing was written." in call(*arguments).stdout
    plan = json.loads(call(*arguments, "--json").stdout)
    assert list(tmp_path.iterdir()) == []
    run = zt.open_run(demo_run)
    assert plan["tokens"] == {name: ds.sizes["query"] for name, ds in run.children.items()}
    stored = sum(file.stat().st_size for file in demo_run.rglob("*") if file.is_file())
    assert 0.5 < plan["disk_bytes"] / stored < 2
    dense = sum(array.nbytes for ds in run.children.values() for array in ds.data_vars.values())
    assert plan["dense_bytes"] == pytest.approx(dense, rel=0.01)  # coordinates come on top
    assert plan["device_bytes"] == 0


@pytest.mark.torch
def test_low_memory_needs_two_blocks_on_the_device() -> None:
    from zarrtrace.extraction import Options, estimate, prepare

    job = prepare(Options(layers=(1,), features=False), weights=False)

    def needs(*, low_memory: bool) -> int:
        options = replace(job.options, device="cuda:0", low_memory=low_memory)
        return estimate(replace(job, options=options)).device_bytes

    sizes = [sum(p.numel() * p.element_size() for p in b.parameters()) for b in job.model.blocks]
    assert needs(low_memory=False) - needs(low_memory=True) == sum(sizes) - 2 * max(sizes)


@pytest.mark.long
@pytest.mark.torch
def test_progress_bars_are_not_drawn_without_a_terminal(tmp_path: Path) -> None:
    arguments = ["--layers", "1-2", "--scenario", "Risky_40", "--no-features"]
    piped = call("extract", *arguments, "-o", tmp_path / "a")
    assert piped.returncode == 0
    first, last = piped.stderr.strip().split("\n\n")
    assert first.endswith("loading torch and transformers …")
    assert last == f"Look at it: zarrtrace view {tmp_path / 'a'}"
    assert "complete     yes" in piped.stdout
    assert call("extract", *arguments, "-o", tmp_path / "a", "--quiet").stderr == ""


@pytest.mark.torch
@pytest.mark.long
def test_bars_on_a_terminal(tmp_path: Path) -> None:
    arguments = ["--layers", "1-2", "--scenario", "Risky_40", "--no-features"]
    shown = on_a_terminal(*arguments, "-o", tmp_path / "b")
    assert "layers" in shown
    assert "scenarios" in shown


def on_a_terminal(*arguments: str | Path) -> str:
    """Extract with a terminal for stderr; return what was shown there."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    shown = b""
    with extracting(*arguments, terminal=Path(os.ttyname(follower))) as process:
        # Read while it runs: a terminal nobody reads blocks who writes to it after 4 kB.
        ended = False
        while select.select([leader], [], [], 0.05)[0] or not ended:
            ended = process.poll() is not None
            if select.select([leader], [], [], 0)[0]:
                shown += os.read(leader, 4096)
    os.close(follower)
    os.close(leader)
    assert process.returncode == 0
    return shown.decode()


@pytest.mark.torch
@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_says_where_to_go_on(tmp_path: Path, number: int, code: int) -> None:
    names = ("Risky_40", "Bankruptcy_90_all_in", "Safe_140_near_goal")
    arguments = ["-o", str(tmp_path / "run"), "--no-features"]
    arguments += [part for name in names for part in ("--scenario", name)]
    with extracting(*arguments) as process:
        staged = tmp_path / "run/.staged/Bankruptcy_90_all_in"
        while not (staged / "attention/c.0.0.0.0").exists():
            time.sleep(0.02)
            assert process.poll() is None
        stderr = said_after(process, number)
    assert process.returncode == code
    assert re.search(r"stopped after \d+ of 93 layers, .*; the same command resumes there", stderr)
    assert signal.Signals(number).name in stderr
    assert "Traceback" not in stderr
    if number == signal.SIGINT:
        assert call("extract", *arguments).returncode == 0
        assert call("verify", tmp_path / "run").returncode == 0


def test_an_ignored_interrupt_stays_ignored() -> None:
    code = """
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from zarrtrace.cli.interruption import interruptible
with interruptible() as came:
    os.kill(os.getpid(), signal.SIGINT)
    assert came == []
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        assert came == [signal.SIGTERM]
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        ImportError("libblas.so: cannot allocate memory in static TLS block"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_a_memory_limit_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    """Also if it is reached while a command's module is imported."""

    def fail(_name: str) -> None:
        raise error

    monkeypatch.setattr(cli.importlib, "import_module", fail)
    monkeypatch.setattr(sys, "argv", ["zarrtrace", "info", "run"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # main() sets its own
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "memory" in said
    assert "ulimit" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("error", [ImportError("no module"), RuntimeError("odd"), LookupError()])
def test_other_errors_stay_errors(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(_name: str) -> None:
        raise error

    monkeypatch.setattr(cli.importlib, "import_module", fail)
    monkeypatch.setattr(sys, "argv", ["zarrtrace", "info", "run"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(type(error)):
        cli.main()


def test_memory_that_runs_out_while_libraries_are_imported() -> None:
    """With 4 MB left, less than NumPy's shared objects take."""
    code = (
        "import resource, pathlib; from zarrtrace.cli import main; "
        "held = int(pathlib.Path('/proc/self/statm').read_text().split()[0]); "
        "limit = held * resource.getpagesize() + 4 * 2**20; "
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit)); main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "info", "nothing"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "no more memory" in ended.stderr
    assert "Traceback" not in ended.stderr


# --- help and options --------------------------------------------------------------------------


def commands() -> dict[str, click.Command]:
    """Return every command of the command line by its words."""
    found: dict[str, click.Command] = {}

    def walk(command: click.Command, words: str) -> None:
        found[words] = command
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                child = command.get_command(context, name)
                assert child is not None
                walk(child, f"{words} {name}".strip())

    walk(cli.group, "")
    return found


COMMANDS = commands()
#: Options whose values differ between commands, and what they say of that.
DIFFERENT = {
    "--output": "a folder, a file, or the address of a run",
    "--at": "one place, repeatable, of an analysis; positions of an export in one word",
}


@pytest.mark.parametrize("words", COMMANDS)
def test_help_fits_and_shows_an_example(words: str) -> None:
    done = call(*words.split(), "--help")
    assert done.returncode == 0
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    _, heading, shown = done.stdout.partition("\nExample")
    assert heading, "no example"
    lines = re.findall(r"^  \$ zarrtrace (.*)", shown.replace("\\\n", ""), re.MULTILINE)
    assert [shlex.split(line) for line in lines] == [
        shlex.split(line) for line, _ in COMMANDS[words].examples
    ]
    for line in lines:
        arguments = shlex.split(line)
        if "--help" not in arguments:
            name, found, rest = cli.group.resolve_command(click.Context(cli.group), arguments)
            assert name == (words.split() or arguments)[0]
            found.make_context(name, rest)


def test_a_word_means_the_same_in_every_command() -> None:
    """Each option has one type and takes one or several values wherever it is."""
    kinds: dict[str, set[tuple[str, object]]] = {}
    for command in COMMANDS.values():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, parameter.opts
                for name in parameter.opts:
                    kinds.setdefault(name, set()).add((parameter.type.name, parameter.nargs))
    assert {name for name, found in kinds.items() if len(found) > 1} <= {*DIFFERENT, "-o"}
    assert {type_ for type_, _ in kinds["--scenario"]} == {"text"}
    assert {type_ for type_, _ in kinds["--scenarios"]} == {"path"}


def test_storage_options_are_the_last_thing_in_help() -> None:
    for words, command in COMMANDS.items():
        if any("--storage-option" in parameter.opts for parameter in command.params):
            shown = call(*words.split(), "--help").stdout
            assert "Object stores:" in shown
            assert shown.index("--help  ") < shown.index("--storage-option")


# --- names that do not exist -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["info", "rnu"], "run"),
        (["info", "run/Safe1"], "run/Safe_1"),
        (["infos", "run"], "info"),
        (["analyze", "decison", "run"], "decision"),
        (["analyze", "attention-to", "run", "--source", "balence"], "balance"),
        (["analyze", "contrast", "run", "--group-a", "riskky"], "risky"),
        (["analyze", "relate", "run", "--option", "bett", "--source", "balance"], "bet"),
        (["export", "run", "-o", "npz", "--scenario", "safe_1"], "Safe_1"),
        (["bundle", "run", "-o", "b.html", "--scenario", "Safe1"], "Safe_1"),
        (["bundle", "run", "-o", "b.html", "--scenarios", "Safe_1"], "--scenario"),
        (["figures", "run", "--scenario", "Safe_11"], "Safe_1"),
        (["import", "nzp", "-o", "again"], "npz"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_the_name_that_was_meant(
    run: fakes.FakeRun, arguments: list[str], meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.path.parent)
    run.path.rename("run") if run.path.name != "run" else None
    Path("npz").mkdir()
    done = call(*arguments)
    assert done.returncode in (1, 2)
    assert f"Did you mean '{meant}'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["extract", "-o", "x", "--model", "./nowhere", "--prompt", "a", "--no-features"],
            "./nowhere: no such folder",
        ),
        (["info", "notes.txt"], "is a file, not the folder of a run"),
        (["info", "."], "Did you mean './run'?"),
        (["import", "run", "-o", "again"], "is a run already"),
        (["copy", "run", "run"], "are the same"),
        (["export", "run", "-o", "run"], "is in a run"),
        (["figures", "run", "-o", "run/figures"], "is in a run"),
        (["analyze", "decision", "run", "-o", "run/x.csv"], "is in a run"),
        (["analyze", "run"], "give a command before it"),
        (["card", "run/Safe_1"], "is the trace of one scenario"),
        (["export", "run", "-o", "npz", "--layers", "9"], "has layers 1-3"),
        (["bundle", "run", "-o", "b.html", "--layers", "9"], "It has layers 1-3."),
        (["analyze", "decision", "run", "-o", "nowhere/x.csv"], "there is no folder nowhere"),
        (["analyze", "decision", "run", "-o", "x.csv", "--threads", "0"], "--threads"),
        (["analyze", "decision", "run", "--threads", "1", "--workers", "2"], "Give one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_of_a_newcomer(
    run: fakes.FakeRun, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.path.parent)
    run.path.rename("run") if run.path.name != "run" else None
    Path("notes.txt").write_text("mine")
    done = call(*arguments)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert Path("notes.txt").read_text() == "mine"


def test_another_suite_for_a_run_is_told_without_torch(run: fakes.FakeRun) -> None:
    code = f"""
import sys
sys.argv = ["zarrtrace", "extract", "-o", {str(run.path)!r}]
from zarrtrace.cli import main
try:
    main()
finally:
    assert "torch" not in sys.modules and "xarray" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{run.path}: was started with other scenarios" in done.stderr or (
        f"{run.path}: holds 2 other scenarios: " in done.stderr
    )
    assert "AssertionError" not in done.stderr
    assert "loading" not in done.stderr


def test_figures_are_drawn_beside_the_run(
    run: fakes.FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Path] = []

    def draw(_run: object, output: Path, **_: object) -> Path:
        drawn.append(output.resolve())
        return output / "index.html"

    monkeypatch.setattr("zarrtrace.figures.draw_run", draw)
    assert call("figures", run.path).returncode == 0
    assert call("figures", ".", cwd=run.path).returncode == 0
    beside = run.path.with_name(f"{run.path.name}-figures")
    assert drawn == [beside, beside]
    drawn.clear()
    for given, folder in (
        (run.trace, None),
        ("Safe_1", run.path),
        (".", run.trace),
        (f"{run.path.name}/Safe_1", run.path.parent),
    ):
        assert call("figures", given, cwd=folder).returncode == 0
    beside = beside.with_name(f"{beside.name}-Safe_1")
    assert drawn == [beside] * 4
    refuse_inside(beside)
    said = call("figures", run.trace, "--scenario", "Risky_2").stderr
    assert "Risky_2" in said
    assert "Safe_1" in said
    assert "Give --output" in call("figures", "s3://bucket/run").stderr


def test_import_takes_tags_and_model_from_export(run: fakes.FakeRun, tmp_path: Path) -> None:
    npz, again = tmp_path / "npz", tmp_path / "again"
    call("export", run.path, "-o", npz)
    done = call("import", npz, "-o", again)
    assert done.returncode == 0, done.stderr
    for name in fakes.SCENARIOS:
        before, after = zt.open_trace(run.path / name).attrs, zt.open_trace(again / name).attrs
        for key in ("tags", "model", "prompt"):
            assert after[key] == before[key]
    assert "names no" not in done.stderr


def test_import_says_what_other_folders_lack(run: fakes.FakeRun, tmp_path: Path) -> None:
    npz = tmp_path / "npz"
    file = Path(call("export", run.path, "-o", npz).stdout.strip())
    foreign = json.loads(file.read_text())
    del foreign["zarrtrace"]
    file.write_text(json.dumps(foreign))
    done = call("import", npz, "-o", tmp_path / "bare")
    assert "The run has no tags" in done.stderr
    assert "The run names no model" in done.stderr
    suite = tmp_path / "suite.jsonl"
    lines = [{"name": name, "prompt": "x", "tags": [f"of {name}"]} for name in fakes.SCENARIOS]
    suite.write_text("\n".join(map(json.dumps, lines)))
    done = call("import", npz, "-o", tmp_path / "tagged", "--scenarios", suite)
    assert done.returncode == 0, done.stderr
    assert "no tags" not in done.stderr
    for name in fakes.SCENARIOS:
        assert zt.open_trace(tmp_path / "tagged" / name).attrs["tags"] == [f"of {name}"]
    suite.write_text(json.dumps(lines[0]))
    done = call("import", npz, "-o", tmp_path / "x", "--scenarios", suite)
    assert done.returncode == 2
    assert f"no scenario {fakes.SCENARIOS[1]!r}" in done.stderr


def test_decision_shows_texts(shared_run: fakes.FakeRun, tmp_path: Path) -> None:
    ds = zt.open_trace(shared_run.path / "Safe_1")
    text = str(ds["next_token_text"].isel(query=-1, rank=0).values)
    shown = call("analyze", "decision", shared_run.path).stdout
    assert repr(text) in shown
    assert "top_token_text" not in shown
    file = tmp_path / "decision.csv"
    call("analyze", "decision", shared_run.path, "-o", file)
    frame = pd.read_csv(file, dtype=str, keep_default_na=False)
    row = frame[frame["scenario"] == "Safe_1"].iloc[0]
    assert row["top_token_text"] == text
    assert int(row["top_token"]) == int(ds["next_token"].isel(query=-1, rank=0))


# --- the Hugging Face hub ----------------------------------------------------------------------


@pytest.mark.torch
def test_a_model_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens there: one message, without torch's import and without a wait."""
    for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    arguments = ["--model", "no-such/model", "--no-features", "--prompt", "Hello"]
    start = time.monotonic()
    done = call("extract", "-o", tmp_path / "run", *arguments)
    assert time.monotonic() - start < 10
    assert done.returncode == 1
    first, error, *rest = done.stderr.splitlines()
    assert first.startswith("zarrtrace: 1 scenario into ")
    assert error.startswith("zarrtrace: error: no-such/model: not in the local cache")
    assert len(rest) == 2
    assert not (tmp_path / "run").exists()
