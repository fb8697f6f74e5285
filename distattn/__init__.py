"""Attention over million-token sequences that are sharded across processors.

It sends and computes what the pattern of attention needs, and nothing else:

    spec = distattn.presets.mistral(window=4096)
    plan = distattn.make_plan(spec, seq_len, heads=32, kv_heads=8, head_dim=128, mesh=mesh)
    out = distattn.attend(plan.shard(q), plan.shard(k), plan.shard(v), plan)

The names in `__all__` are loaded when they are first used: planning does not wait for what only running
needs.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distattn import nn, patterns, presets, reference
    from distattn.attend import Selection, attend, select
    from distattn.cache import Cache
    from distattn.errors import ConfigError, DistattnError, PeerLost, PlanMismatch, StepTimeout
    from distattn.extras import AttentionExtras, AttentionPool, Mlp, MlpPool
    from distattn.plan import Plan, make_plan
    from distattn.spec import AttentionSpec, Delta, Summaries, TopChunks, chunk_window

__version__ = "0.1.0"

__all__ = [
    "AttentionExtras",
    "AttentionPool",
    "AttentionSpec",
    "Cache",
    "ConfigError",
    "Delta",
    "DistattnError",
    "Mlp",
    "MlpPool",
    "PeerLost",
    "Plan",
    "PlanMismatch",
    "Selection",
    "StepTimeout",
    "Summaries",
    "TopChunks",
    "attend",
    "chunk_window",
    "make_plan",
    "nn",
    "patterns",
    "presets",
    "reference",
    "select",
]

_MODULE_OF = {
    "AttentionExtras": "extras",
    "AttentionPool": "extras",
    "AttentionSpec": "spec",
    "Cache": "cache",
    "ConfigError": "errors",
    "DistattnError": "errors",
    "PeerLost": "errors",
    "Plan": "plan",
    "PlanMismatch": "errors",
    "StepTimeout": "errors",
    "Delta": "spec",
    "Mlp": "extras",
    "MlpPool": "extras",
    "Selection": "attend",
    "Summaries": "spec",
    "TopChunks": "spec",
    "attend": "attend",
    "chunk_window": "spec",
    "make_plan": "plan",
    "select": "attend",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'distattn' has no attribute {name!r}")
    if name not in _MODULE_OF:
        return importlib.import_module(f"distattn.{name}")
    value = getattr(importlib.import_module(f"distattn.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Importing a submodule sets it as an attribute of a package; `distattn.attend` must stay a function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
