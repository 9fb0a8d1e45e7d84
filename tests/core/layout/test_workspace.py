"""The distributions, their files and their versions agree."""

import re
import subprocess

import pytest

REGISTRY = re.compile(r"https?://[^\s\"'`)]*(?:pypi|pythonhosted|/simple\b)")


def requirement_name(requirement):
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def tracked(root):
    """Files under version control; where there is no checkout, there is nothing to check."""
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True
    )
    return [name for name in listed.stdout.split("\0") if name and (root / name).is_file()]


@pytest.mark.parametrize("folder", ["kernels", "adapters", "plugins", "tests", "examples"])
def test_a_container_folder_is_no_package(root, folder):
    assert not (root / folder / "__init__.py").exists()


def test_no_test_folder_is_a_package(root):
    assert not list((root / "tests").rglob("__init__.py"))


def test_every_package_ships_its_types(packages):
    assert [package for package in packages if not (package / "py.typed").is_file()] == []


def test_members_are_listed_wherever_they_must_be(root, members, projects):
    settings = projects[root]["tool"]["uv"]
    folders = {str(member.relative_to(root)) for member in members}
    names = {projects[member]["project"]["name"] for member in members}
    dev = {requirement_name(r) for r in projects[root]["dependency-groups"]["dev"]}
    assert folders == set(settings["workspace"]["members"])
    assert names | {"pagedcore"} == settings["sources"].keys()
    assert names == {name for name in dev if name.startswith("pagedcore-")}


def test_members_are_found_by_the_type_checker(root, members, packages, projects):
    mypy = projects[root]["tool"]["mypy"]
    paths = {path.removeprefix("$MYPY_CONFIG_FILE_DIR").strip("/") for path in mypy["mypy_path"]}
    assert paths == {"", *(str(member.relative_to(root)) for member in members)}
    assert set(mypy["packages"]) == {package.name for package in packages}


def test_every_direct_dependency_has_one_exact_version(root, projects):
    needed, built = set(), set()
    for project in projects.values():
        needed.update(project["project"].get("dependencies", []))
        for extra in project["project"].get("optional-dependencies", {}).values():
            needed.update(extra)
        built.update(project["build-system"]["requires"])
    needed.update(projects[root]["dependency-groups"]["dev"])
    settings = projects[root]["tool"]["uv"]
    for requirements, pins in (
        (needed, settings["constraint-dependencies"]),
        (built, settings["build-constraint-dependencies"]),
    ):
        assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9.]+", pin)] == []
        names = {
            name for r in requirements if not (name := requirement_name(r)).startswith("paged")
        }
        assert names == {requirement_name(pin) for pin in pins}


def test_no_lock_file_and_no_registry_address_is_committed(root):
    files = tracked(root)
    assert "uv.lock" in (root / ".gitignore").read_text(encoding="utf-8").split()
    assert [name for name in files if name.endswith(".lock")] == []
    found = {
        f"{name}: {match[0]}"
        for name in files
        for match in REGISTRY.finditer((root / name).read_text("utf-8", errors="replace"))
    }
    assert not found


def test_every_distribution_has_the_licence(root, projects):
    assert "Apache License" in (root / "LICENSE").read_text(encoding="utf-8")
    assert {p["project"]["license"] for p in projects.values()} == {"Apache-2.0"}


def test_the_commands_that_documents_name_exist(root):
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text("utf-8"), re.M))
    for document in (root / "README.md", root / "CONTRIBUTING.md"):
        named = set(re.findall(r"^ *(?:\$ )?make ([a-z-]+)", document.read_text("utf-8"), re.M))
        assert named <= targets, document.name
