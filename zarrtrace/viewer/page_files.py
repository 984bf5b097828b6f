"""The page's own files: HTML, style and script."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
import re
from importlib import resources

#: The page's files in a bundle.
PAGE_FILES = ("index.html", "style.css", "main.js")
#: Attributes of the element that holds a single page's data.
DATA_ELEMENT = 'type="application/json" id="bundle-files"'
# A bundle in a folder asks for its index while the script is read; a page that holds it does not.
_PRELOAD = '<link rel="preload" href="index.json" as="fetch" crossorigin="anonymous">\n'


@functools.cache
def page_file(name: str) -> bytes:
    """Return a file of the page; its script holds all modules."""
    return _joined(name).encode() if name == "main.js" else _source(name).encode()


def _source(name: str) -> str:
    return resources.files("zarrtrace.viewer").joinpath("page", name).read_text(encoding="utf-8")


def single_page(files: dict[str, str], view: str = "", *, from_kernel: bool = False) -> bytes:
    """Return the page as one file.

    Parameters
    ----------
    files
        Files of the bundle that the page holds, base64 by name.
    view
        First view, written like the part of an address behind ``#``.
    from_kernel
        Whether the page asks the notebook around it for files instead.
    """
    page = page_file("index.html").decode()
    style, script = page_file("style.css").decode(), page_file("main.js").decode()
    # JSON of base64 and names: '<' is escaped, so that no name ends the element.
    data = json.dumps(files, separators=(",", ":")).replace("<", "\\u003c")
    policy = (
        "default-src 'none'; "
        f"script-src {_hash(script)}; style-src {_hash(style)}; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    page = re.sub(
        r'(http-equiv="Content-Security-Policy" content=")[^"]*',
        lambda found: found[1] + policy,
        page,
    )
    if from_kernel:
        page = page.replace("<title>", '<meta name="files" content="kernel">\n<title>')
    if view:
        page = page.replace("<title>", f'<meta name="view" content="{html.escape(view)}">\n<title>')
    page = (
        page.replace(_PRELOAD, "")
        .replace('<link rel="stylesheet" href="style.css">', f"<style>{style}</style>")
        .replace(
            '<script type="module" src="main.js"></script>',
            ("" if from_kernel else f"<script {DATA_ELEMENT}>{data}</script>\n")
            + f'<script type="module">{script}</script>',
        )
    )
    return page.encode()


def _joined(main: str) -> str:
    """Return a module with all that it imports as one.

    Each has a scope of its own; imports come first.
    """
    done: dict[str, str] = {}

    def add(name: str) -> None:
        if name in done:
            return
        source = _source(name)
        imports = re.findall(r'^import \{([^}]*)\} from "\./([\w.]+)";\n', source, re.MULTILINE)
        for _, module in imports:
            add(module)
        body = re.sub(r'^import \{[^}]*\} from "[^"]*";\n', "", source, flags=re.MULTILINE)
        names = re.findall(r"^export (?:async )?(?:function|const|class) (\w+)", body, re.MULTILINE)
        body = re.sub(r"^export (?=async|function|const|class)", "", body, flags=re.MULTILINE)
        taken = "".join(
            f"const {{ {imported.strip()} }} = {_variable(module)};\n"
            for imported, module in imports
        )
        done[name] = (
            f"const {_variable(name)} = (() => {{\n{taken}{body}\n"
            f"return {{ {', '.join(names)} }};\n}})();\n"
        )

    add(main)
    return "".join(done.values())


def _variable(module: str) -> str:
    return "module_" + module.removesuffix(".js")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
