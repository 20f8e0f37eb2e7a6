# SPDX-License-Identifier: GPL-2.0-or-later
"""A configuration as a file that people edit: every key, with a comment on each.

The keys and their comments are those of :mod:`migrate.service.config`, and no others.  This program
writes the configuration that the package installs (``systemd/config.toml``):

    python -m migrate.service.template > systemd/config.toml
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from typing import Any

from migrate.options import OnTimeout, Strategy
from migrate.service.config import Config

COLUMNS = 100
INSTALLED = (
    "SPDX-License-Identifier: GPL-2.0-or-later",
    "xen-postcopy: see xen-postcopy.toml(5).  Every key may be left out.  What is behind a # has "
    "no effect: remove the # of a key and of its section, or append both.  The values are the "
    "defaults (bandwidth, postcopy_bandwidth and timeout_s: examples).",
)
"""The first lines of the configuration that the package installs."""


def configuration(heading: tuple[str, ...], given: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the text of a configuration.  ``heading``: the first comments, each a paragraph.
    ``given``: values by section and key.  Every other key is a comment with its default, and so is
    a section without values: people append sections to this file.
    """
    unknown = {
        f"[{section}] {key}"
        for section, values in given.items()
        for key in values
        if key not in _keys(section)
    }
    if unknown:
        raise ValueError(f"no keys of the configuration: {', '.join(sorted(unknown))}")
    lines = [line for paragraph in heading for line in _comment(paragraph)]
    for section in dataclasses.fields(Config):
        values = given.get(section.name, {})
        lines += ["", *_comment(section.metadata["about"])]
        lines.append(f"{'' if values else '#'}[{section.name}]")
        for key, declared in _keys(section.name).items():
            is_given = key in values
            value = values[key] if is_given else declared["example"]
            lines += ["", *_comment(declared["about"])]
            lines.append(f"{'' if is_given else '#'}{key} = {written(value)}")
    return "".join(f"{line}\n" for line in lines)


def _keys(section: str) -> dict[str, Mapping[str, Any]]:
    """Return what is declared of each key of a section."""
    default = getattr(Config(), section)
    return {key.name: key.metadata for key in dataclasses.fields(default)}


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text, COLUMNS, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
    )


def written(value: Any) -> str:
    """Return a value as TOML has it."""
    match value:
        case bool():
            return "true" if value else "false"
        case float():
            return f"{value:.15g}"
        case Strategy() | OnTimeout():
            return json.dumps(value.value)
        case (str() as host, int() as port):
            return json.dumps(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        case tuple():
            return f"[{', '.join(map(written, value))}]"
        case _:
            return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    print(configuration(INSTALLED, {}), end="")
