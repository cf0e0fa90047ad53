"""lrcompile: passes that make trained models smaller and faster without retraining, with proof.

The face is lazy: nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_FACE = {
    "optimize": "lrcompile.api",
    "plan": "lrcompile.api",
    "to_program": "lrcompile.bridge",
    "save": "lrcompile.artifact",
    "load": "lrcompile.artifact",
    "refresh": "lrcompile.plans_state",
    "Plan": "lrcompile.plans",
    "Pipeline": "lrcompile.pipeline",
    "Result": "lrcompile.pipeline",
    "Options": "lrcompile.options",
    "Settings": "lrcompile.planning",
    "Budget": "lrcompile.budget",
    "Batches": "lrcompile.data",
    "GraphPass": "lrcompile.rewrite",
    "NodeRewrite": "lrcompile.node_rewrite",
    "LinearPass": "lrcompile.rewrite",
    "Proposal": "lrcompile.rewrite",
    "Context": "lrcompile.rewrite",
    "LinearSite": "lrcompile.sites",
    "LinearOperator": "lrcompile.linop",
    "Dense": "lrcompile.linop",
    "Product": "lrcompile.linop",
    "Sum": "lrcompile.linop",
    "low_rank": "lrcompile.linop",
    "densify": "lrcompile.linop",
    "apply": "lrcompile.linop",
    "LowRank": "lrcompile.passes.low_rank",
    "ScheduleMemory": "lrcompile.passes.schedule_memory",
    "LrcompileError": "lrcompile.errors",
}

__all__ = [
    "Batches",
    "Budget",
    "Context",
    "Dense",
    "GraphPass",
    "LinearOperator",
    "LinearPass",
    "LinearSite",
    "LowRank",
    "LrcompileError",
    "NodeRewrite",
    "Options",
    "Pipeline",
    "Plan",
    "Product",
    "Proposal",
    "Result",
    "ScheduleMemory",
    "Settings",
    "Sum",
    "__version__",
    "apply",
    "densify",
    "load",
    "low_rank",
    "optimize",
    "plan",
    "refresh",
    "save",
    "to_program",
]

if TYPE_CHECKING:
    from lrcompile.api import optimize, plan
    from lrcompile.artifact import load, save
    from lrcompile.bridge import to_program
    from lrcompile.budget import Budget
    from lrcompile.data import Batches
    from lrcompile.errors import LrcompileError
    from lrcompile.linop import Dense, LinearOperator, Product, Sum, apply, densify, low_rank
    from lrcompile.node_rewrite import NodeRewrite
    from lrcompile.options import Options
    from lrcompile.passes.low_rank import LowRank
    from lrcompile.passes.schedule_memory import ScheduleMemory
    from lrcompile.pipeline import Pipeline, Result
    from lrcompile.planning import Settings
    from lrcompile.plans import Plan
    from lrcompile.plans_state import refresh
    from lrcompile.rewrite import Context, GraphPass, LinearPass, Proposal
    from lrcompile.sites import LinearSite


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'lrcompile' has no attribute '{name}'")
    value = getattr(importlib.import_module(_FACE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_FACE])
