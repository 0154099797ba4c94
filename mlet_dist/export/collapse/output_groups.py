"""Outputs that hold the same rows, whose work units are therefore the same."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlet_dist.export.collapse.units import Unit, units_of
from mlet_dist.export.outputs import Output
from mlet_dist.export.served_layout import Form
from mlet_dist.export.served_sources import ServedSources, served_sources
from mlet_dist.stored_tables.table_source import TableSource


@dataclass(frozen=True)
class OutputGroup:
    """Outputs whose tables have the same rows and columns.

    Attributes:
        name: empty for outputs of all rows.
        outputs: all of one form; for mixed widths, which are chosen by bytes, of one encoding, too.
        served: what they hold.
    """

    name: str
    outputs: tuple[Output, ...]
    served: ServedSources

    @property
    def form(self) -> Form:
        return self.served.layout.form

    @property
    def units(self) -> list[Unit]:
        """The units of all tables."""
        return [dataclasses.replace(unit, group=self.name) for unit in units_of(self.served.tables.values())]


def group_outputs(tables: Mapping[str, TableSource], outputs: Sequence[Output]) -> dict[str, OutputGroup]:
    """Return the outputs in groups, by name."""
    groups: dict[str, OutputGroup] = {}
    for output in outputs:
        name = {"all": "", "kept": "kept", "mixed": f"mixed-{output.encoding.name}"}[output.form]
        if name in groups:
            groups[name] = dataclasses.replace(groups[name], outputs=(*groups[name].outputs, output))
        else:
            groups[name] = OutputGroup(name, (output,), served_sources(tables, output.form, output.encoding))
    return groups
