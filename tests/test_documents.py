"""Every document's examples run in order, its links exist, its install commands work."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
import zarr
from everyday import mostly_long

import zarrtrace as zt
from zarrtrace.analysis import attention_to
from zarrtrace.cli import group, main
from zarrtrace.errors import install_command
from zarrtrace.figures.drawing import cells_of_spans, span_colours

ROOT = Path(__file__).parent.parent
FOLDERS = ("zarrtrace", "schema", "scripts", "tests", ".github")
DOCUMENTS = sorted(
    [ROOT / "README.md", *(file for name in FOLDERS for file in (ROOT / name).rglob("*.md"))]
)
DOCUMENTS = [file for file in DOCUMENTS if "node_modules" not in file.parts]
NAMES = [file.relative_to(ROOT).as_posix() for file in DOCUMENTS]
# Folders of zarrtrace whose examples take several seconds.
LONGER = ("analysis", "extraction", "figures", "index", "npz", "store", "viewer")
# Words of the front page outside its code blocks.
FRONT_DOOR = 1_200

#: Commands that need a server, a download, a cluster, Ctrl-C or a minute; other tests run them.
ELSEWHERE = re.compile(r"s3://|tcp://|--scheduler-file|--workers|--model |^(view|figures) ")
#: Commands for a clone that are not zarrtrace's own.
FOR_A_CLONE = re.compile(
    r"source \.venv/bin/activate$|pip install '\.\[[a-z,]+\]'$|scripts/(?P<script>\w+)( |$)"
)
FROM_AN_INDEX = re.compile(r"pip install (--upgrade )?'?zarrtrace")


def blocks(text: str) -> list[tuple[str, str]]:
    """Return the code blocks of a document: language and content, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [(language, textwrap.dedent(content)) for language, content in found]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def commands(block: str) -> list[str]:
    """Return the commands of a console block, without their comments."""
    lines = block.splitlines()
    assert all(line.startswith("$ ") for line in lines), block
    return [shlex.join(shlex.split(line[2:], comments=True)) for line in lines]


def parse(command: str) -> None:
    """Have click accept a command of zarrtrace."""
    words = shlex.split(command)[1:]
    known, given, rest = group.resolve_command(group.make_context("zarrtrace", words[:1]), words)
    assert given is not None, known
    given.make_context(known, rest)


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of zarrtrace, or see that it can be run."""
    if not command.startswith("zarrtrace "):
        found = FOR_A_CLONE.match(command)
        assert found, f"no reader can run {command!r}"
        assert not found["script"] or (ROOT / "scripts" / found["script"]).is_file()
        return
    parse(command)
    if ELSEWHERE.search(command.removeprefix("zarrtrace ")):
        return
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None), command


@pytest.fixture
def folder(demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own with the demo's run in ``runs/demo``, as scripts/quickstart leaves it."""
    shutil.copytree(demo_run, tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runnable(name: str) -> bool:
    text = (ROOT / name).read_text(encoding="utf-8")
    return any(language in ("python", "console", "yaml") for language, _ in blocks(text))


@pytest.fixture
def zarr_settings() -> Iterator[None]:
    """Put the codec pipeline back that an example chooses."""
    with zarr.config.set({"codec_pipeline.path": zarr.config.get("codec_pipeline.path")}):
        yield


@pytest.mark.torch
@pytest.mark.parametrize(
    "name",
    mostly_long(
        lambda name: Path(name).parent.name not in LONGER and name != "README.md",
        [name for name in NAMES if runnable(name)],
    ),
)
@pytest.mark.usefixtures("zarr_settings", "hub_home")
@pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty model_from_pretrained_kwargs")
def test_examples_run_in_order(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace: dict[str, object] = {}
    for language, block in blocks((ROOT / name).read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(block, name, "exec"), namespace)  # noqa: S102 -- our own text
        elif language == "console":
            for command in commands(block):
                run(command, monkeypatch)
        elif language == "yaml" and (file := re.match(r"# (\w+\.yaml)\n", block)):
            (folder / file[1]).write_text(block, encoding="utf-8")
        for code, said in re.findall(r"^(\S+) +# token positions: (.*)$", block, re.M):
            assert repr(eval(code, namespace)) == said  # noqa: S307 -- our own text
    namespace.clear()  # the exits that run() caught hold it: its files would close in a later test


def test_every_language_is_one_that_runs() -> None:
    """A block that no test runs says so by having no language."""
    for name in NAMES:
        found = {language for language, _ in blocks((ROOT / name).read_text(encoding="utf-8"))}
        assert found <= {"", "python", "console", "yaml", "js"}, name


@pytest.mark.parametrize("name", NAMES)
def test_what_it_names_exists(name: str) -> None:
    text = prose((ROOT / name).read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert heading in [anchor(one) for one in headings], target
    for target in re.findall(r"`(scripts/\w[\w./]*)", text):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"`(test_[\w*]+\.py|fakes\.py|planted\.py|conftest\.py)`", text):
        assert list((ROOT / "tests").glob(target)), target


def anchor(heading: str) -> str:
    """Return what GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_script_is_in_the_list_of_scripts() -> None:
    for folder in (ROOT / "scripts", ROOT / "scripts" / "bench"):
        listed = (folder / "README.md").read_text(encoding="utf-8")
        asked = [file.name for file in folder.glob("*.py")]
        assert asked
        assert [name for name in asked if name not in listed] == []


def test_front_door_is_short() -> None:
    assert len(prose((ROOT / "README.md").read_text(encoding="utf-8")).split()) <= FRONT_DOOR


@pytest.mark.torch
def test_caption_agrees_with_the_picture(demo_run: Path) -> None:
    """``scripts/draw_pictures.py`` draws this trace, a colour for each span."""
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    ds = zt.open_trace(demo_run / "Bankruptcy_90_all_in")
    colours = span_colours(cells_of_spans(ds))
    for span, named in (("balance", "green"), ("goal", "orange")):
        said = re.search(rf"ayers ([\d, and]+) (?:attend )?to the {span} \({named}\)", text)
        assert said, span
        strong = attention_to(ds, span)
        assert [int(n) for n in re.findall(r"\d+", said[1])] == [
            int(layer) for layer in strong.layer[strong > 0.05]
        ]
        assert colours[span] == {"green": "#00795c", "orange": "#b35900"}[named]


def test_quickstart_ends_with_commands_that_parse() -> None:
    shown = (ROOT / "scripts" / "quickstart").read_text(encoding="utf-8").partition("Try next")[2]
    to_try = re.findall(r"^  (zarrtrace [^#\n]*)", shown, re.M)
    assert [shlex.split(command)[1:3] for command in to_try[:2]] == [
        ["view", "runs/demo"],
        ["figures", "runs/demo"],
    ]
    for command in to_try:
        parse(command)


def test_citation_says_what_the_package_says() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = yaml.safe_load((ROOT / ".github/CITATION.cff").read_text(encoding="utf-8"))
    assert cited["title"] == project["name"]
    assert cited["abstract"] == project["description"]
    for name in ("version", "license", "authors", "keywords"):
        assert cited[name] == project[name], name


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_have_the_keys_that_github_asks_for(name: str) -> None:
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8")
    form = yaml.safe_load(text)
    assert {"name", "description", "body"} <= form.keys()
    assert all(field["attributes"]["label"] for field in form["body"])


def test_what_is_installed_can_be_installed() -> None:
    """No package index has zarrtrace: messages and documents name the clone and its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    sources = [*(ROOT / "zarrtrace").rglob("*.py"), *DOCUMENTS]
    texts = {file: file.read_text(encoding="utf-8") for file in sources}
    assert [file for file, text in texts.items() if FROM_AN_INDEX.search(text)] == []
    asked = {
        extra
        for text in texts.values()
        for names in re.findall(r"(?:pip install '\.\[|install_command\([\"'])([a-z,-]+)", text)
        for extra in names.split(",")
    }
    assert {"extract", "cluster", "cloud"} <= asked <= set(project["optional-dependencies"])
    assert "pip install '.[cloud]'" in install_command("cloud")
    assert install_command().endswith("pip install .")
    assert FROM_AN_INDEX.search("pip install --upgrade zarrtrace")
    assert FROM_AN_INDEX.search("pip install 'zarrtrace[cloud]'")
