"""Play a newcomer: clone, set up, README's examples in order, own prompts, a notebook.

Everything happens in a fresh clone of the last commit with a virtual environment of its own, and
the output of each step is printed as a newcomer sees it. Models and SAEs that README downloads are
small random ones in a local cache of the hub's layout (``tests/hub_cache.py``).

    python scripts/newcomer.py [--folder FOLDER]   # kept afterwards if given
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Commands that need a server or a second machine, or were run before.
NOT_HERE = re.compile(r"s3://|tcp://|scripts/quickstart|source ")
#: Characters of a step's output that are printed; the middle of more is left out.
SHOWN = 4_000

PROMPTS = """prompt,name,outcome
"You hold $90, the goal is $200. 1) Bet 2) Stop:",poor,lost
"You hold $190, the goal is $200. 1) Bet 2) Stop:",rich,won
"""

#: Cells of the notebook, and what the output of each must hold.
CELLS = [
    ("import zarrtrace as zt\nzt.__version__", r"\d+\.\d+"),
    (
        """
from transformers import AutoModelForCausalLM, AutoTokenizer
from zarrtrace import demo
model = AutoModelForCausalLM.from_pretrained(demo.model_path())
tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
text = "You hold [[balance:${}]], the goal is [[goal:$200]]. 1) Bet 2) Stop:"
prompts = [
    zt.Scenario(text.format(balance), name=name, tags=[tag], metadata={"balance": float(balance)})
    for name, balance, tag in (("poor", 90, "risky"), ("rich", 190, "safe"))
]
run = zt.extract(
    "runs/loaded", prompts, model=model, tokenizer=tokenizer, saes=demo.sae_path()
)
run
""",
        "DataTree",
    ),
    ("ds = run['poor'].to_dataset()\nds", "attention"),
    ("ds.zt.span('balance'), list(ds.zt.tokens[:5]), ds.zt.prompt", "You hold"),
    ("zt.analysis.attention_to(run, 'balance').to_dataframe().head()", "balance"),
    ("zt.plot.attention(ds.attention.sel(layer=25, head=2))", "image/png"),
    ("run.zt.view()", "iframe"),
]


class Newcomer:
    """A fresh clone, and what is typed there."""

    def __init__(self, folder: Path) -> None:
        self.clone = folder / "zarrtrace"
        self.clone.mkdir()
        # Not "git clone": it refuses a repository that another user owns, as in a container.
        archive = subprocess.run(
            ["git", "-c", "safe.directory=*", "archive", "HEAD"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        subprocess.run(["tar", "--extract"], cwd=self.clone, input=archive, check=True)
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.environment = {
            **kept,
            "PATH": f"{self.clone / '.venv' / 'bin'}:{os.environ['PATH']}",
            "HF_HOME": str(folder / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "80",
        }

    def enter(self, command: str) -> str:
        """Run a command in the clone, print its output and return it; end if it fails."""
        print(f"\n$ {command}", flush=True)
        start = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.clone,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        text = done.stdout.rstrip()
        if len(text) > SHOWN:
            text = f"{text[: SHOWN // 2]}\n[…]\n{text[-SHOWN // 2 :]}"
        print(f"{text}\n[{time.monotonic() - start:.1f} s]", flush=True)
        if done.returncode:
            sys.exit(f"a newcomer is stuck: exit code {done.returncode} of {command}")
        return done.stdout

    def python(self, code: str, name: str) -> str:
        """Run a script of this environment."""
        (self.clone / name).write_text(code, encoding="utf-8")
        return self.enter(f"python {name}")

    def view(self, command: str) -> None:
        """Start the viewer, fetch its page, and end it."""
        print(f"\n$ {command}", flush=True)
        process = subprocess.Popen(
            [*shlex.split(command), "--no-browser"],
            cwd=self.clone,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said, found = "", None
        for line in process.stdout or ():
            said += line
            if found := re.search(r"http://\S+", line):
                break
        if found is None:
            sys.exit(f"the viewer said no address: {said}")
        with urllib.request.urlopen(found[0], timeout=60) as page:  # noqa: S310 -- our own server
            size = len(page.read())
        process.terminate()
        process.wait(timeout=60)
        print(f"{said.rstrip()}\n[its page has {size:,} bytes]", flush=True)


def blocks(text: str) -> list[tuple[str, str]]:
    """Return the code blocks of a document: language and content, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [(language, textwrap.dedent(content)) for language, content in found]


def play_readme(newcomer: Newcomer) -> None:
    """Run README's blocks in order; its Python in one process, as a notebook would."""
    python: list[str] = []
    for language, block in blocks((newcomer.clone / "README.md").read_text(encoding="utf-8")):
        if language == "python":
            python.append(block)
            newcomer.python("\n".join(python), "readme.py")
        elif language == "yaml" and (file := re.match(r"# (\w+\.yaml)\n", block)):
            (newcomer.clone / file[1]).write_text(block, encoding="utf-8")
        elif language == "console":
            for line in block.splitlines():
                command = shlex.join(shlex.split(line.removeprefix("$ "), comments=True))
                if command.startswith("zarrtrace view"):
                    newcomer.view(command)
                elif not NOT_HERE.search(command):
                    newcomer.enter(command)


def play_notebook(newcomer: Newcomer) -> None:
    """Execute a notebook with a loaded model; each cell's output must hold what it should."""
    newcomer.enter("python -m pip install --quiet --disable-pip-version-check nbclient ipykernel")
    code = f"""
import json, nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
notebook = new_notebook(cells=[new_code_cell(cell) for cell, _ in {CELLS!r}])
NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
nbformat.write(notebook, "newcomer.ipynb")
"""
    newcomer.python(code, "play_notebook.py")
    cells = json.loads((newcomer.clone / "newcomer.ipynb").read_text(encoding="utf-8"))["cells"]
    for (source, wanted), cell in zip(CELLS, cells, strict=True):
        output = json.dumps(cell["outputs"], ensure_ascii=False)
        print(f"\nIn: {source.strip()}\nOut: {shown(cell['outputs'])}", flush=True)
        if not re.search(wanted, output):
            sys.exit(f"no {wanted} in the output of: {source}")


def shown(outputs: list[dict[str, Any]]) -> str:
    """Return outputs of a cell as plain text."""
    texts = ["".join(one.get("text", one.get("data", {}).get("text/plain", ""))) for one in outputs]
    return "\n".join(texts)[:SHOWN]


def play(folder: Path) -> None:
    """Do what a newcomer does in the first half hour."""
    newcomer = Newcomer(folder)
    newcomer.enter("scripts/quickstart")
    newcomer.enter("PYTHONPATH=tests python -c 'import hub_cache; hub_cache.fill(\"'$HF_HOME'\")'")
    play_readme(newcomer)
    newcomer.enter(
        "zarrtrace extract --model demo --prompt 'You hold $90.' --prompt 'You hold $190.' "
        "-o runs/typed"
    )
    (newcomer.clone / "prompts.csv").write_text(PROMPTS, encoding="utf-8")
    newcomer.enter("zarrtrace extract --model demo --scenarios prompts.csv -o runs/table")
    newcomer.enter("zarrtrace analyze decision runs/mine")
    newcomer.enter("zarrtrace info runs/table")
    play_notebook(newcomer)
    print("\nThe newcomer came to the end.")


def main() -> None:
    """Play in a folder that is given, or in one that is removed afterwards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="to be kept; must not exist")
    folder = parser.parse_args().folder
    if folder is not None:
        folder.mkdir(parents=True)
        play(folder.resolve())
        return
    with tempfile.TemporaryDirectory(prefix="zarrtrace-newcomer-") as temporary:
        play(Path(temporary))


if __name__ == "__main__":
    main()
