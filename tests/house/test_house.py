"""Rules of the house: packaging agrees with the tree, files stay small, no path of one machine is written down."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from tests.house.tree import (
    MAPPED,
    ROOT,
    constraints,
    link_modes,
    normalised,
    package_folders,
    project_files,
    pyproject,
)

CAP = 400
MACHINE_PATH = re.compile(r"(?<![\w.*~$}-])/(?:work|tmp|root)/")
ENTRY_POINTS = [
    (group, name, target)
    for group, entries in pyproject()["project"]["entry-points"].items()
    if group.startswith("lrcompile.")
    for name, target in entries.items()
]
ALL_REQUIREMENTS = [
    *pyproject()["project"]["dependencies"],
    *(each for extra in pyproject()["project"]["optional-dependencies"].values() for each in extra),
]


def python_files() -> list[Path]:
    return [path for path in project_files() if path.suffix == ".py"]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def top_level_imports(source: str) -> set[str]:
    """First components of all absolute imports in ``source``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_package_list_equals_the_tree():
    assert sorted(pyproject()["tool"]["setuptools"]["packages"]) == sorted(name for name, _ in package_folders())


def test_every_package_folder_has_an_init():
    assert [name for name, folder in package_folders() if not (folder / "__init__.py").is_file()] == []


def test_package_dir_maps_the_outer_folders():
    expected = {"lrcompile": "lrcompile"} | {f"lrcompile.{name}": folder for name, folder in MAPPED.items()}
    assert pyproject()["tool"]["setuptools"]["package-dir"] == expected


def test_the_typing_marker_is_shipped():
    assert (ROOT / "lrcompile" / "py.typed").is_file()
    assert "py.typed" in pyproject()["tool"]["setuptools"]["package-data"]["lrcompile"]


def test_package_data_reaches_the_trained_models():
    data = pyproject()["tool"]["setuptools"]["package-data"]
    folders = dict(package_folders())
    models = list((ROOT / "models_zoo").rglob("*.onnx"))
    assert models
    shipped = {path for name, patterns in data.items() for each in patterns for path in folders[name].glob(each)}
    assert [relative(path) for path in models if path not in shipped] == []


@pytest.mark.parametrize(("name", "folder"), MAPPED.items())
def test_links_point_at_the_outer_folders(name: str, folder: str):
    link = ROOT / "lrcompile" / name
    if link.is_symlink():
        assert str(link.readlink()) == f"../{folder}"
        assert link.resolve() == ROOT / folder
    else:  # a clone made with core.symlinks=false holds the target as text
        assert link.read_text(encoding="utf-8") == f"../{folder}"


def test_links_are_committed_as_links():
    modes = link_modes()
    if modes is None:
        pytest.skip("the links are not in a git index here")
    assert modes == {f"lrcompile/{name}": "120000" for name in MAPPED}


def test_no_file_is_longer_than_the_cap():
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    assert lengths
    assert {name: length for name, length in lengths.items() if length > CAP} == {}


def test_the_import_rule_sees_every_form():
    source = "import passes.clean\ndef f():\n    from backends import eager\n"
    assert top_level_imports(source) == {"passes", "backends"}
    assert top_level_imports("from lrcompile.passes import clean\nfrom . import passes") == {"lrcompile"}


def test_outer_folders_are_never_imported_by_their_own_name():
    found = {relative(path): top_level_imports(path.read_text(encoding="utf-8")) for path in python_files()}
    assert {name: bad for name, names in found.items() if (bad := names & set(MAPPED.values()))} == {}


def test_constraints_pin_torch_without_a_local_version():
    assert constraints()["torch"] == "2.13.0"
    assert [each for each in constraints().items() if re.search(r"[+@/]|file:", "==".join(each))] == []
    assert "lrcompile" not in constraints()


@pytest.mark.parametrize("requirement", ALL_REQUIREMENTS)
def test_every_requirement_is_pinned_by_the_constraints(requirement: str):
    match = re.fullmatch(r"([A-Za-z0-9_.-]+)(?:\[[a-z,]+\])?(?:(==|>=)([\w.]+))?", requirement)
    assert match, requirement
    name, relation, version = match.groups()
    if name == "lrcompile":
        return
    pin = constraints()[normalised(name)]
    assert pin == version if relation == "==" else release(pin) >= release(version)


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def test_the_all_extra_holds_every_run_time_extra():
    extras = pyproject()["project"]["optional-dependencies"]
    assert extras["all"] == [f"lrcompile[{','.join(sorted(set(extras) - {'all', 'dev'}))}]"]


@pytest.mark.parametrize(("group", "name", "target"), ENTRY_POINTS)
def test_entry_points_load_and_bear_their_names(group: str, name: str, target: str):
    module, _, attribute = target.partition(":")
    folder = "lrcompile.backends" if group == "torch_dynamo_backends" else group
    assert module.startswith(f"{folder}.")
    found = getattr(importlib.import_module(module), attribute)
    assert callable(found) if folder != group else found.name == name


def test_the_script_exists():
    module, _, attribute = pyproject()["project"]["scripts"]["lrcompile"].partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))


@pytest.mark.parametrize("bad", ["/work/main", "see /tmp/x", '"/root/.cache"'])
def test_the_machine_path_rule_catches(bad: str):
    assert MACHINE_PATH.search(bad)


@pytest.mark.parametrize("good", ["docs/work/x", "$HOME/tmp/x", "network/", "./tmp/"])
def test_the_machine_path_rule_lets_pass(good: str):
    assert not MACHINE_PATH.search(good)


def test_no_machine_path_is_written_down():
    found = []
    for path in project_files():
        if relative(path).startswith("tests/"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{relative(path)}: {line}" for line in text.splitlines() if MACHINE_PATH.search(line)]
    assert found == []
