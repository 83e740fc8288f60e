"""Results to and from files of other tools: CSV, Parquet, inspect_ai's logs, lm-eval's samples, plain tables.

`to_csv`, `to_parquet`, `to_inspect` write; `read_results` reads any of them back as `Results`, and `joined` puts
results of several sources side by side on the same questions, so that every comparison stays paired. Not covered:
lm-eval's aggregate numbers (they can't be paired), and traces of agents and tools in inspect_ai's logs.
"""

from workbench.exchange.foreign import read_results
from workbench.exchange.inspect_logs import read_inspect, to_inspect
from workbench.exchange.joining import joined
from workbench.exchange.lm_eval_samples import read_lm_eval
from workbench.exchange.spreadsheets import read_parquet, to_csv, to_parquet
from workbench.exchange.tables import read_table

__all__ = [
    "joined",
    "read_inspect",
    "read_lm_eval",
    "read_parquet",
    "read_results",
    "read_table",
    "to_csv",
    "to_inspect",
    "to_parquet",
]
