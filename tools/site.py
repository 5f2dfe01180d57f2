"""What MkDocs is told about the pages that are made of the code, and of files outside docs/.

Markers in a page become what `zsfl COMMAND --help` says, and all settings. A link that leads out of docs/ leads
to a page or a picture of the site, as far as there is one.
"""

from __future__ import annotations

import argparse
import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from zsfl.cli import parser
from zsfl.settings import NODE_FLAGS, NodeSettings

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("ARCHITECTURE.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/METHODOLOGY.md")
PICTURES = "benchmarks/results/*.png"
SITE = "project"
"""Where on the site they are."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/."""
    for path in (*map(Path, OUTSIDE), *(found.relative_to(ROOT) for found in ROOT.glob(PICTURES))):
        files.append(File.generated(config, f"{SITE}/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Fill in what is made of the code, and turn links that lead out of docs/."""
    place = page.file.src_uri
    inside = place.removeprefix(f"{SITE}/") if place.startswith(f"{SITE}/") else f"docs/{place}"
    for marker, made in (("commands", _commands), ("settings", _settings)):
        if f"<!-- {marker} -->" in markdown:
            markdown = markdown.replace(f"<!-- {marker} -->", "\n".join(made()))

    def turned(link: re.Match[str]) -> str:
        shown, target, anchor = link.groups(default="")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(inside), target))
        there = path.removeprefix("docs/") if path.startswith("docs/") else f"{SITE}/{path}"
        if files.get_file_from_path(there) is None:
            return shown.strip("[]") if (ROOT / path).exists() else link[0]
        return f"{shown}({posixpath.relpath(there, posixpath.dirname(place))}{anchor})"

    return re.sub(r"(!?\[[^\]]*\])\((?!\w+:)([^)#\s]+)(#[^)]*)?\)", turned, markdown)


def _commands() -> Iterator[str]:
    os.environ["COLUMNS"] = "80"  # which argparse wraps at: what fits between the lists of pages and of headings
    yield from _helps(parser(), level=2)


def _helps(command: argparse.ArgumentParser, level: int) -> Iterator[str]:
    below = [action for action in command._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield f"{'#' * level} {command.prog}\n\n```{{ .text .help }}\n{command.format_help()}```\n"
    for action in below:
        for one in dict.fromkeys(action.choices.values()):
            yield from _helps(one, level)


def _settings() -> Iterator[str]:
    yield "| in zsfl.toml, flag | what it is | default |\n|---|---|---|"
    flagged = {name for names in NODE_FLAGS.values() for name in names}
    for one in fields(NodeSettings):
        flags = one.metadata["flags"] or (f"--{one.name.replace('_', '-')}",)
        flag = f"<br>`{flags[0]}`" if one.name in flagged else ""
        default = "" if one.default in (None, "", ()) else f"`{one.default}`"
        yield f"| `{one.name}`{flag} | {one.metadata['help']} | {default} |"
