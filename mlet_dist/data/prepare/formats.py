"""The raw formats that mlet_dist knows: click logs of Criteo and of Avazu."""

from mlet_dist.data.prepare.raw_formats import DenseColumn, LabelColumn, SparseColumn, TableSpec, TextFormat
from mlet_dist.data.prepare.splits import PAPER_AVAZU, SplitRule

CRITEO_DENSE = tuple(f"I{i}" for i in range(1, 14))
CRITEO_SPARSE = tuple(f"C{i}" for i in range(1, 27))
CRITEO_COLUMNS = ("label", *CRITEO_DENSE, *CRITEO_SPARSE)

_AVAZU_PLACES = "C1 banner_pos site_id site_domain site_category app_id app_domain app_category"
_AVAZU_DEVICE = "device_id device_ip device_model device_type device_conn_type C14 C15 C16 C17 C18 C19 C20 C21"
AVAZU_SPARSE = ("hour", *_AVAZU_PLACES.split(), *_AVAZU_DEVICE.split())
AVAZU_COLUMNS = ("id", "click", *AVAZU_SPARSE)


def criteo(min_count: int = 1, split: SplitRule | None = None, max_malformed: float = 0.1) -> TableSpec:
    """Criteo-Kaggle, or day-files of Criteo-1TB: tab-separated, without header or quotes, in time order.

    A line holds a label, 13 integers I1-I13 (log1p; missing is 0) and 26 categorical values C1-C26.
    """
    return TableSpec(
        source="criteo",
        text=TextFormat(delimiter="\t", quote=None, header=False, columns=CRITEO_COLUMNS),
        label=LabelColumn("label"),
        dense=tuple(DenseColumn(name, name, "log1p", 0.0, integer=True) for name in CRITEO_DENSE),
        sparse=tuple(SparseColumn(name, name, min_count=min_count) for name in CRITEO_SPARSE),
        split=split or SplitRule("rows"),
        max_malformed=max_malformed,
    )


def avazu(min_count: int = 1, split: SplitRule | None = None, max_malformed: float = 0.1) -> TableSpec:
    """Avazu: comma-separated with a header; 22 categorical features, ``hour`` (YYMMDDHH) among them, none dense."""
    return TableSpec(
        source="avazu",
        text=TextFormat(delimiter=",", quote=None, header=True, columns=AVAZU_COLUMNS),
        label=LabelColumn("click"),
        dense=(),
        sparse=tuple(SparseColumn(name, name, min_count=min_count) for name in AVAZU_SPARSE),
        split=split or PAPER_AVAZU,
        max_malformed=max_malformed,
    )
