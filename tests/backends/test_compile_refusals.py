"""The torch.compile backend: bad options and plans, limits of torch, files of plans, and released weights."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, Unsupported

import lrcompile
from lrcompile import Budget, Plan
from lrcompile.errors import (
    GateError,
    InvalidInputError,
    LrcompileWarning,
    PlanRequired,
    ReleasedError,
    UnsupportedError,
    UsageError,
)
from lrcompile.linop import same, tensors
from lrcompile.plans_state import on_device
from tests.backends.compiling import WIDTH, Watch, close, compressed, planned, reference, samples, stack
from tests.backends.test_compile import X, compiled, fresh

__all__ = ["fresh"]


def run(model: nn.Module, options: Any, **more: Any) -> Any:
    return torch.compile(model, backend="lrcompile", options=options, **more)(X)


def refused(model: nn.Module, options: Any, kind: type[Exception], text: str) -> None:
    """Torch wraps what a backend raises; the user reads our message in it."""
    with pytest.raises(BackendCompilerFailed, match=text) as caught:
        run(model, options)
    assert isinstance(caught.value.inner_exception, kind)


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"plam": 1}, "unknown option 'plam'.*did you mean 'plan'.*known: plan, keep, calibration"),
        ({"zzz": 1}, "unknown option 'zzz'.*known: .*release"),
        ({"plan": {"keep": 0.5}}, "the option 'plan' is a Plan, not a dict.*lrcompile.plan"),
        ({"plan": "plan/"}, "the option 'plan' is a Plan, not a str.*Plan.load"),
        ({"keep": "0.8", "calibration": []}, "the option 'keep' is a float or int, not a str"),
        ({"keep": True, "calibration": []}, "the option 'keep' is a float or int, not a bool"),
        ({"keep": 1.5, "calibration": []}, "at most 1, not 1.5"),
        ({"keep": 0.8}, "'keep' needs 'calibration' beside it"),
        ({"calibration": []}, "'calibration' needs 'keep' beside it"),
        ({"release": 1}, "the option 'release' is a bool, not a int"),
        ({"release": True}, "'release' needs a plan"),
        ({"inner": 3}, "the option 'inner' is a str or Callable, not a int"),
    ],
)
def test_options_that_are_unknown_wrong_or_alone(options: dict[str, Any], text: str):
    refused(stack(), options, UsageError, text)


def test_plan_and_budget_do_not_go_together():
    model = stack()
    options = {"plan": planned(model), "keep": 0.5, "calibration": []}
    refused(model, options, UsageError, "'plan' and 'keep' do not go together")


def test_keep_and_calibration_as_options():
    model, watch = stack(broken=True), Watch()
    options = {"keep": 0.6, "calibration": samples(), "inner": watch}
    found = run(model, options)
    plan = next(iter(options["calibration"].plans.values()))
    assert close(found, reference(model, plan)(X))
    assert compressed(watch, plan, model) == len(plan.compressed) >= 4
    again = {"keep": 0.6, "calibration": samples(), "inner": watch}
    run(model, again)  # torch compares both dictionaries, with tensors inside
    assert list(again["calibration"].plans.values()) != [plan]


def test_a_budget_is_not_split_over_parts():
    model = stack()
    options = {"keep": 0.6, "calibration": [{"input": X}], "inner": "eager"}
    for block in model.blocks:
        block.compile(backend="lrcompile", options=options)
    with pytest.raises(BackendCompilerFailed, match="do not fit Block, the part that is compiled") as caught:
        model(X)
    assert isinstance(caught.value.inner_exception, PlanRequired)
    function = torch.compile(lambda x: model.blocks[0](x), backend="lrcompile", options=options)
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match=r"lrcompile\.plan"):
        function(X)


# -- plans ---------------------------------------------------------------------------------------


def test_a_plan_for_another_model():
    plan = planned(stack())
    other = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
    refused(other, {"plan": plan}, UsageError, "plan is for another model: it knows none of the weights")
    wide = stack()
    wide.blocks[1].up = nn.Linear(WIDTH, 48)
    wide.blocks[1].down = nn.Linear(48, WIDTH, bias=False)
    torch._dynamo.reset()
    refused(wide, {"plan": plan}, UsageError, r"blocks.1.up.weight: the plan is for another model: .*\(48, 32\)")
    with pytest.raises(UsageError, match="another model"):
        plan.bind(other)


def test_weights_that_changed_their_type():
    model = stack()
    plan = planned(model)
    model.to(torch.bfloat16)
    with pytest.raises(BackendCompilerFailed, match="the weight is bfloat16 now, the plan was made for float32"):
        torch.compile(model, backend="lrcompile", options={"plan": plan, "inner": "eager"})(X.to(torch.bfloat16))


def test_weights_that_moved_to_another_device():
    """Factors follow their weight; one without values is refused. (Any device but the CPU would do here.)"""
    model = stack()
    plan = planned(model)
    held = next(entry.replacement for entry in plan.entries.values() if entry.replacement is not None)
    moved = on_device(held, torch.device("meta"))
    assert {tensor.device.type for _, tensor in tensors(moved.operator)} == {"meta"}
    assert moved.operator.shape == held.operator.shape
    model.to("meta")
    with pytest.raises(BackendCompilerFailed, match=r"lies on the meta device.*load the model first"):
        torch.compile(model, backend="lrcompile", options={"plan": plan, "inner": "eager"})(X.to("meta"))


def test_a_module_without_parameters():
    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x) @ x.mT

    with pytest.raises(UnsupportedError, match="no linear weight"):
        lrcompile.plan(Nothing(), Budget(keep=0.5), calibration=[{"x": X}])
    options = {"keep": 0.5, "calibration": samples(), "inner": "eager"}
    for given in ({"inner": "eager"}, options):
        assert close(torch.compile(Nothing(), backend="lrcompile", options=given)(X), Nothing()(X))


def test_a_module_without_linear_weights():
    for model in (nn.ReLU(), nn.LayerNorm(WIDTH)):
        with pytest.raises(UnsupportedError, match="no linear weight"):
            lrcompile.plan(model, Budget(keep=0.5), calibration=[{"input": X}])
        assert close(torch.compile(model, backend="lrcompile", options={"inner": "eager"})(X), model(X))
    options = {"keep": 0.5, "calibration": samples(), "inner": "eager"}
    assert close(run(nn.LayerNorm(WIDTH), options), nn.LayerNorm(WIDTH)(X))


def test_a_plan_that_drifts_too_far_is_not_returned():
    with pytest.raises(GateError, match="drift"):
        lrcompile.plan(
            stack(), Budget(keep=0.45), calibration=samples(), evaluation=samples(2, 7),
            options=lrcompile.Options(max_drift=0.01),
        )  # fmt: skip


def test_verified_only_with_evaluation_data():
    assert not planned(stack()).verified and "unverified" in repr(planned(stack()))
    plan = planned(stack(), evaluation=samples(2, 7))
    assert plan.verified and plan.drift is not None and plan.report is not None and plan.report.drift is not None
    model = stack()
    held = torch.cat([batch["x"] for batch in samples(2, 7)])
    exact, found = model(held).double(), reference(model, plan)(held).double()
    assert float((found - exact).norm() / exact.norm()) == pytest.approx(plan.drift, rel=1e-3)


# -- limits of torch -------------------------------------------------------------------------------


def test_fullgraph_with_a_break():
    model = stack(broken=True)
    plan = planned(model)
    with pytest.raises(Unsupported, match=r"graph_break\(\)"):
        run(model, {"plan": plan, "inner": "eager"}, fullgraph=True)


def test_never_silently_eager_at_the_recompilation_limit():
    model = stack(1)
    plan = planned(model)
    call = torch.compile(model, backend="lrcompile", options={"plan": plan, "inner": "eager"}, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        for rows in (2, 3):
            call(torch.randn(rows, WIDTH))
        with pytest.warns(LrcompileWarning, match=r"'forward' .*run eagerly, with dense weights\. Mark what varies"):
            call(torch.randn(4, WIDTH))


# -- files ---------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path: Path):
    model = stack()
    plan = planned(model, evaluation=samples(2, 7))
    plan.save(tmp_path / "plan")
    assert sorted(path.name for path in (tmp_path / "plan").iterdir()) == ["plan.json", "plan.safetensors"]
    loaded = Plan.load(tmp_path / "plan")
    assert (loaded.verified, loaded.drift, loaded.budget) == (True, plan.drift, {"keep": 0.6})
    for name, entry in plan.entries.items():
        twin = loaded.entries[name]
        if entry.replacement is not None and twin.replacement is not None:
            assert same(entry.replacement.operator, twin.replacement.operator)
        assert (entry.recipe, entry.sha256, entry.parameters) == (twin.recipe, twin.sha256, twin.parameters)
    fresh_model, watch = stack(), Watch()
    call = compiled(fresh_model, loaded, watch)
    assert close(call(X), reference(model, plan)(X))
    assert compressed(watch, loaded, fresh_model) == len(plan.compressed)
    fresh_model.blocks[0].up.weight.mul_(2)  # statistics came along: it can be factorised anew
    assert close(call(X), reference(fresh_model, loaded)(X)) and loaded.table.refits == 1
    with pytest.raises(UsageError, match="exists"):
        plan.save(tmp_path / "plan")


def test_a_loaded_plan_finds_single_layers_by_their_content(tmp_path: Path):
    model = stack(4)
    planned(model, 0.5).save(tmp_path)
    loaded, watch = Plan.load(tmp_path), Watch()
    for block in model.blocks:
        block.compile(backend="lrcompile", options={"plan": loaded, "inner": watch})
    assert close(model(X), reference(stack(4), loaded)(X))
    assert compressed(watch, loaded, model) == len(loaded.compressed)


def _text(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / "plan.json").read_text())
        change(content)
        (folder / "plan.json").write_text(json.dumps(content))

    return apply


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        held = {name: value.clone() for name, value in load_file(folder / "plan.safetensors").items()}
        change(held)
        save_file(held, folder / "plan.safetensors")

    return apply


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "plan.json").unlink(),
        lambda folder: (folder / "plan.json").write_text("{"),
        lambda folder: (folder / "plan.safetensors").write_bytes(b"\x00" * 40),
        lambda folder: (folder / "plan.safetensors").unlink(),
        _text(lambda content: content.update(schema="other/1")),
        _text(lambda content: content.pop("entries")),
        _text(lambda content: content["entries"][0].update(shape=[3, 3])),
        _text(lambda content: content["entries"][0].update(structure=["Evil", []])),
        _text(lambda content: content["entries"][0].update(tensors={})),
        _text(lambda content: content["entries"][0].update(parameters=[3])),
        _text(lambda content: content["entries"][0].update(shift="nowhere")),
        _text(lambda content: content.update(statistics=[["a"]] * 9)),
        _tensors(lambda held: held["factor.0"].fill_(float("nan"))),
        _tensors(lambda held: held.update({"moments.0.total": torch.zeros(3)})),
    ],
)
def test_damaged_files_are_refused(damage: Callable[[Path], Any], saved: Path, tmp_path: Path):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    with pytest.raises(InvalidInputError):
        Plan.load(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    with torch.no_grad():
        planned(stack(), passes=[lrcompile.LowRank(center=False)]).save(folder)
    return folder


def test_a_later_version_and_a_plan_of_a_file(saved: Path, tmp_path: Path):
    (tmp_path / "plan.json").write_text('{"schema": "lrcompile.compile-plan/9"}')
    with pytest.raises(UnsupportedError, match="this version reads"):
        Plan.load(tmp_path)
    with pytest.raises(UsageError, match="onnx"):
        Plan({}, graph="onnx").save(tmp_path / "x")
    refused(stack(), {"plan": Plan({}, graph="onnx")}, UsageError, "made from an onnx model")


# -- released weights ------------------------------------------------------------------------------


class Tied(nn.Module):
    """One weight in two layers, one that forward reads raw, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.raw, self.own = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.own(torch.tanh(self.raw(x)) * self.raw.weight.mean())


def bytes_of(model: nn.Module) -> int:
    return sum(p.untyped_storage().nbytes() for p in model.parameters() if p.ndim == 2)


@pytest.mark.parametrize("broken", [False, True])
def test_released_weights(broken: bool):
    model, watch = stack(4, broken), Watch()
    plan = planned(model, 0.5)
    expected, before = reference(model, plan)(X), bytes_of(model)
    call = compiled(model, plan, watch, release=True)
    for _ in range(2):
        watch.clear()
        assert close(call(X), expected)
        assert compressed(watch, plan, model) == len(plan.compressed)
    left = sum(entry.replacement is None for entry in plan.entries.values()) * 4 * 2 * WIDTH * WIDTH
    assert bytes_of(model) == left < before / 2
    assert watch.graphs <= 4
    call(torch.randn(3, WIDTH))  # other sizes: torch captures the graph anew, without the values
    assert close(call(X), expected)
    name = plan.compressed[0]
    weight = model.get_submodule(name).weight
    pattern = f"{re.escape(name)}: its dense values were released"
    uses: list[Callable[[], Any]] = [
        lambda: model(X), lambda: weight.sum(), lambda: weight + 1, lambda: weight.detach(), lambda: weight.data,
        lambda: weight.numpy(), lambda: str(weight), lambda: model.state_dict(), lambda: weight.copy_(weight),
        lambda: model.load_state_dict(stack(4).state_dict()), lambda: weight.T,
    ]  # fmt: skip
    for use in uses:
        with pytest.raises((ReleasedError, RuntimeError), match="its dense values were released"):
            use()
    with pytest.raises(ReleasedError, match=pattern):
        weight.tolist()
    assert weight.shape in ((64, WIDTH), (WIDTH, 64)) and weight.dtype == torch.float32
    with torch.enable_grad(), pytest.raises(BackendCompilerFailed, match="gradients need its dense values"):
        call(X)


def test_what_somebody_else_reads_is_kept():
    torch.manual_seed(0)
    model = Tied().eval()
    plan = planned(model, 0.6)
    assert plan.entries["raw"].replacement is None  # read outside of its layer
    friend = nn.Linear(WIDTH, WIDTH)
    friend.weight = model.own.weight
    call = compiled(model, plan, "eager", release=True)
    expected = reference(model, plan)(X)
    assert close(call(X), expected) and close(call(X), expected)
    assert plan.status()["own"] == "compressed, dense values kept: also held by a Linear"
    assert friend(X).isfinite().all() and model.raw(X).isfinite().all()
    assert plan.status()["a"] == "compressed, dense values released"  # tied, but every place of it runs as factors


def test_an_optimiser_keeps_its_weights():
    model = stack()
    plan = planned(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled(model, plan, "eager", release=True)(X)
    assert all("kept: held by a SGD" in plan.status()[name] for name in plan.compressed)
    assert model(X).isfinite().all() and optimiser is not None


def test_a_caught_warning_is_ours():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = stack()
        plan = planned(model)
        with torch.enable_grad():
            compiled(model, plan, "eager")(X)
    assert [item.category for item in caught if issubclass(item.category, LrcompileWarning)] == [LrcompileWarning]
