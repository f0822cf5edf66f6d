"""What a run minimises: one short file per family of objectives, and the table of them."""

from bbopd.objectives.base import Facts, Objective
from bbopd.objectives.table import FACTS, OBJECTIVES, check_offer, fitting, make_objective, plugin_facts, signal_for

__all__ = ["FACTS", "OBJECTIVES", "Facts", "Objective", "check_offer", "fitting", "make_objective", "plugin_facts", "signal_for"]
