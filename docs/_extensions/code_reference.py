"""Sphinx extension: the reference of settings and of commands, generated from the code whenever the site is built.

It adds two directives, `settings-reference` and `commands-reference`, and makes `section.key` and `mlet COMMAND` in
backticks links to them, at their first place on each page.
"""

import argparse
import dataclasses
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

import yaml
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

from mlet_dist.cli.main import build_parser
from mlet_dist.config.byte_sizes import ByteSize
from mlet_dist.config.config_file import Config

_BY_NAME = "NAME"


def settings() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every setting with its key, as ``train.seed`` or, for single tables, ``sharding.tables.NAME.exchange``."""
    for section in dataclasses.fields(Config):
        for setting in dataclasses.fields(typing.cast(Any, section.type)):
            yield f"{section.name}.{setting.name}", setting
            by_name = typing.get_args(setting.type)[1] if typing.get_origin(setting.type) is dict else None
            if dataclasses.is_dataclass(by_name):
                for each in dataclasses.fields(by_name):
                    yield f"{section.name}.{setting.name}.{_BY_NAME}.{each.name}", each


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, by its name."""
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("the parser of `mlet` has no commands")


def describe_type(kind: Any) -> str:
    """A setting's type in words and its values, in Markdown."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join("null" if each is type(None) else describe_type(each) for each in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"list of {describe_type(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is dict:
        return "mapping"
    if kind is ByteSize:
        return "size or percentage"
    return {int: "integer", float: "number", str: "text", bool: "`true` or `false`"}[kind]


def describe_limits(metadata: typing.Mapping[str, Any]) -> str:
    """The limits of a setting's values, as far as its metadata give any."""
    names = ("at_least", "at_most", "above", "below", "multiple_of")
    texts = {name: name.replace("_", " ").replace("multiple", "a multiple") for name in names}
    found = [f"{text} {metadata[limit]:,.10g}" for limit, text in texts.items() if limit in metadata]
    if "min_length" in metadata:
        found.append(f"{metadata['min_length']} entry or more")
    return ", ".join(found)


def describe_default(setting: dataclasses.Field[Any]) -> str:
    """The default as YAML, in Markdown, or ``required``."""
    if setting.default is dataclasses.MISSING and setting.default_factory is dataclasses.MISSING:
        return "required"
    value = {} if setting.default is dataclasses.MISSING else setting.default
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True).removesuffix("...\n").strip()
    return f"default `{text}`"


def settings_as_markdown() -> str:
    """The reference of all settings: a section each, an object a setting."""
    lines = []
    for section in dataclasses.fields(Config):
        kind = typing.cast(Any, section.type)
        lines += [f"## {section.name}", "", str(kind.__doc__), ""]
        for key, setting in settings():
            if not key.startswith(f"{section.name}."):
                continue
            facts = [describe_type(setting.type), describe_limits(setting.metadata), describe_default(setting)]
            lines += [f":::{{setting}} {key}", "", "; ".join(filter(None, facts)), ""]
            lines += [_sentence(setting.metadata["meaning"]), ":::", ""]
    return "\n".join(lines)


def commands_as_markdown() -> str:
    """The reference of all commands: a section each, with its usage and its arguments."""
    lines = []
    for name, parser in commands().items():
        formatter = parser._get_formatter()
        lines += [f"(mlet-{name})=", f"## mlet {name}", "", _sentence(parser.description or ""), ""]
        lines += ["```bash", _synopsis(name, parser), "```", ""]
        lines += [f":::{{program}} mlet {name}", ":::", ""]
        for action in parser._actions:
            if action.dest in ("help", "json"):  # of every command: the page's introduction has them
                continue
            invocation = formatter._format_action_invocation(action)
            text = _sentence(formatter._expand_help(action)) if action.help else ""
            lines += [f":::{{option}} {invocation}", "", _escape(text), ":::", ""]
        lines += _epilog(parser.epilog or "")
    return "\n".join(lines)


def _epilog(text: str) -> list[str]:
    """A command's last paragraphs; what is indented is code, and the list of settings becomes a link."""
    lines = []
    for block in text.split("\n\n"):
        if "section.key=value or in the YAML file" in block:
            lines += ["Settings are those of the [settings reference](settings.md).", ""]
            break
        if block.startswith("  "):
            lines += ["```bash", textwrap.dedent(block).strip("\n"), "```", ""]
        else:
            lines += [_escape(block), ""]
    return lines


def _synopsis(name: str, parser: argparse.ArgumentParser) -> str:
    """The command with what it requires: short enough for a phone."""
    formatter = parser._get_formatter()
    words = [f"mlet {name}"]
    for action in parser._actions:
        if not action.option_strings:
            words.append(formatter._format_args(action, formatter._get_default_metavar_for_positional(action)))
        elif action.required:
            words.append(formatter._format_action_invocation(action))
    return " ".join([*words, "[OPTIONS]"])


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:] if re.match(r"[a-z]+ ", text) else text
    return text if not text or text.endswith((".", ")")) else f"{text}."


def _escape(text: str) -> str:
    """Plain text as Markdown; what is in backticks stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_<>\[\]{}$])", r"\\\1", part) for part in parts)


class _Generated(SphinxDirective):
    """A directive that stands for generated Markdown."""

    markdown: typing.ClassVar[typing.Callable[[], str]]

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(type(self).markdown(), allow_section_headings=True)


class SettingsReference(_Generated):
    """Every setting with type, limits, default and meaning."""

    markdown = staticmethod(settings_as_markdown)


class CommandsReference(_Generated):
    """Every command with its usage and arguments."""

    markdown = staticmethod(commands_as_markdown)


class LinkNames(SphinxTransform):
    """Make a setting or a command in backticks a link to its reference, once a page."""

    default_priority = 400

    def apply(self, **_: Any) -> None:
        if self.env.docname.startswith("reference/"):
            return
        targets = {key: ("setting", key) for key, _ in settings()}
        targets |= {f"mlet {name}": ("keyword", f"mlet-{name}") for name in commands()}
        for node in list(self.document.findall(nodes.literal)):
            text = node.astext().partition("=")[0]  # also `train.resume=never`
            if text not in targets or _within(node, nodes.reference, addnodes.pending_xref, nodes.title):
                continue
            kind, name = targets.pop(text)  # the first place on a page only
            where = {"refdoc": self.env.docname, "refwarn": True, "refexplicit": True}
            link = addnodes.pending_xref("", refdomain="std", reftype=kind, reftarget=name, **where)
            node.replace_self(link)
            link += node


def _within(node: nodes.Node, *kinds: type[nodes.Node]) -> bool:
    while (node := node.parent) is not None:
        if isinstance(node, kinds):
            return True
    return False


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directives, the object type `setting` and the links."""
    app.add_object_type("setting", "setting", indextemplate="pair: %s; setting")
    app.add_directive("settings-reference", SettingsReference)
    app.add_directive("commands-reference", CommandsReference)
    app.add_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
