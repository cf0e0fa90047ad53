"""What ``options={…}`` of ``torch.compile`` may say."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lrcompile.budget import Budget
from lrcompile.errors import UsageError, nearest
from lrcompile.plans import Plan

KNOWN: dict[str, tuple[type, ...]] = {
    "plan": (Plan,),
    "keep": (float, int),
    "calibration": (object,),
    "evaluation": (object,),
    "release": (bool,),
    "inner": (str, Callable),  # type: ignore[dict-item]
    "inductor": (dict,),
}
"""Every option with its types:

* ``plan``: from :func:`lrcompile.plan`;
* ``keep`` with ``calibration`` (and ``evaluation``): a plan is made when the model is compiled as a whole;
* ``release``: give back the memory of the dense weights that the plan replaces;
* ``inner``: the compiler behind, ``inductor`` by default;
* ``inductor``: settings of ``torch._inductor.config``.
"""


class Held:
    """Samples that are compared by identity: torch compares options, and tensors cannot be compared.

    Attributes:
        plans: made from these samples, by the module.
    """

    def __init__(self, samples: Any) -> None:
        self.samples = samples
        self.plans: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Chosen:
    """Options, verified."""

    plan: Plan | None = None
    keep: float | None = None
    calibration: Held | None = None
    evaluation: Held | None = None
    release: bool = False
    inner: str | Callable[..., Any] = "inductor"
    inductor: dict[str, Any] = field(default_factory=dict)
    mode: str | None = None

    @property
    def budget(self) -> Budget:
        return Budget(keep=self.keep)


def read(options: Mapping[str, Any] | None, mode: str | None) -> Chosen:
    """The options in force.

    Samples in a dictionary are wrapped in place, so that torch can compare it with others.

    Raises:
        UsageError: an unknown option, a wrong type, or options that do not go together.
    """
    given = {} if options is None else options
    if not isinstance(given, Mapping):
        raise UsageError(f"options is a dictionary, not a {type(given).__name__}", hint=_known())
    for name, value in given.items():
        if name not in KNOWN:
            close = nearest(str(name), KNOWN)
            hint = close if close.startswith("known") else f"{close} {_known()}"
            raise UsageError(f"unknown option '{name}'", where='backend "lrcompile"', hint=hint)
        _check(name, value)
    _together(given)
    return Chosen(**{name: _wrapped(given, name) for name in given}, mode=mode)


def _known() -> str:
    return f"known: {', '.join(KNOWN)}"


def _check(name: str, value: Any) -> None:
    kinds = KNOWN[name]
    if isinstance(value, bool) and bool not in kinds and object not in kinds:
        kinds = ()
    if not kinds or not isinstance(value, kinds):
        wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in KNOWN[name])
        hint = "make one with lrcompile.plan, or read it with lrcompile.Plan.load" if name == "plan" else ""
        raise UsageError(f"the option '{name}' is a {wanted}, not a {type(value).__name__}", hint=hint or _known())


def _together(given: Mapping[str, Any]) -> None:
    sugar = [name for name in ("keep", "calibration", "evaluation") if name in given]
    if "plan" in given and sugar:
        raise UsageError(f"'plan' and '{sugar[0]}' do not go together", hint="the plan has its own budget")
    if sugar and ("keep" not in given or "calibration" not in given):
        missing = "keep" if "keep" not in given else "calibration"
        raise UsageError(f"'{sugar[0]}' needs '{missing}' beside it", hint=_known())
    if given.get("release") and not ("plan" in given or sugar):
        raise UsageError("'release' needs a plan: exact rewrites alone give nothing back", hint=_known())
    if "keep" in given:
        Budget(keep=given["keep"])


def _wrapped(given: Any, name: str) -> Any:
    value = given[name]
    if name in ("calibration", "evaluation") and not isinstance(value, Held):
        value = Held(value)
        if isinstance(given, dict):
            given[name] = value
    return value
