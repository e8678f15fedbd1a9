"""The wheel holds everything and works by itself, away from the source tree."""

import ast
import fnmatch
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml
from contracts.source_tree import FOLDERS, ROOT, parse, relative, shipped_files, source_files


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
PACKAGED = (*FOLDERS, "model_cards")
NOT_PACKAGED = {"README.md"}  # notes to readers of the source
SHIPPED_MODEL = "model_cards/vidllm-nano"


def package_of(folder: Path) -> str:
    """Import name of a folder of the tree: train/ -> vidllm.train, vidllm/ -> vidllm; checkpoints are data of vidllm.model_cards."""
    parts = folder.relative_to(ROOT).parts
    if parts[0] == "model_cards":
        return "vidllm.model_cards"
    return ".".join(parts if parts[0] == "vidllm" else ("vidllm", *parts))


def files_by_package() -> dict[str, list[Path]]:
    """Files of every package folder by import name; a folder with Python files is a package. Pictures for the README are none."""
    found = {}
    for path in source_files():
        parts = path.relative_to(ROOT).parts
        if parts[0] in PACKAGED and len(parts) > 1 and parts[:2] != ("model_cards", "pictures"):
            found.setdefault(package_of(path.parent), []).append(path)
    return found


def in_wheel(path: Path) -> str:
    """Where a file of the tree stands in the wheel."""
    name = relative(path)
    return name if name.startswith("vidllm/") else f"vidllm/{name}"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built offline as a release is: source distribution from a copy of the tree, wheel from that."""
    copy = tmp_path_factory.mktemp("source")
    for path in source_files():
        if path.relative_to(ROOT).parts[0] not in ("tests", ".ci"):
            target = copy / relative(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    out = tmp_path_factory.mktemp("dist")
    build = subprocess.run(
        [sys.executable, "-I", "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)],
        capture_output=True,
        text=True,
        check=False,
        cwd=out,
    )
    assert build.returncode == 0, build.stdout[-2000:] + build.stderr[-2000:]
    (wheel,) = out.glob("*.whl")
    assert len(list(out.glob("*.tar.gz"))) == 1
    return wheel


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel, unpacked by pip into a folder of its own."""
    target = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target, wheel],
        check=True,
        capture_output=True,
    )
    return target


def run_installed(installed: Path, cwd: Path, code: str) -> subprocess.CompletedProcess:
    """Run code that sees the unpacked wheel and the environment's other packages, but not the editable install.

    `-S` leaves out the .pth files, through which the source tree would fill whatever the wheel lacks.
    """
    libraries = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    head = f"import sys; sys.path[:0] = {[str(installed)]!r}; sys.path += {libraries!r}\n"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", head + code], capture_output=True, text=True, check=False, cwd=cwd
    )


def test_every_package_is_listed():
    with_code = {name for name, paths in files_by_package().items() if any(p.suffix == ".py" for p in paths)}
    listed = set(SETUPTOOLS["packages"])
    assert with_code <= listed, f"missing from [tool.setuptools] packages: {sorted(with_code - listed)}"
    for name in listed:
        parent = name.rpartition(".")[0]
        assert not parent or parent in listed, f"{name} is listed, {parent} is not"
        top = ".".join(name.split(".")[:2])
        folder = ROOT / SETUPTOOLS["package-dir"][top] / "/".join(name.split(".")[2:])
        assert folder.is_dir(), f"{name} is listed, {folder.relative_to(ROOT)}/ does not exist"
        assert name in files_by_package(), f"{name} is listed and empty"


def test_every_package_has_an_init():
    for name, paths in files_by_package().items():
        if any(path.suffix == ".py" for path in paths):
            assert any(path.name == "__init__.py" for path in paths), f"{name} has no __init__.py"


def test_wheel_holds_every_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = [path for paths in files_by_package().values() for path in paths if path.name not in NOT_PACKAGED]
    missing = [relative(path) for path in wanted if in_wheel(path) not in names]
    assert not missing, f"not in the wheel (packages or package-data in pyproject.toml): {missing}"
    assert "vidllm/py.typed" in names


NOT_YET = pytest.mark.skipif(not (ROOT / SHIPPED_MODEL).is_dir(), reason="no trained weights ship yet")


@NOT_YET
def test_wheel_holds_the_shipped_model(wheel):
    sizes = {info.filename: info.file_size for info in zipfile.ZipFile(wheel).infolist()}
    inside = {
        name.rpartition("/")[2]: size for name, size in sizes.items() if name.startswith(f"vidllm/{SHIPPED_MODEL}/")
    }
    needed = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
        "demo.mp4",
        "demo.json",
        *(path.name for path in shipped_files()),
    }
    assert needed <= set(inside), f"not in the wheel: {sorted(needed - set(inside))}"
    assert 20_000_000 < inside["model.safetensors"] < 24_500_000


def test_wheel_holds_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    own = {in_wheel(path) for paths in files_by_package().values() for path in paths}
    extra = [name for name in names if name not in own and not fnmatch.fnmatch(name, "vidllm-*.dist-info/*")]
    assert not extra, f"the wheel would take other names of everybody's environment: {extra}"


def test_wheel_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = message_from_string(archive.read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    needed = {re.split(r"[^\w.-]", line)[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert not needed & {"torchvision", "torchcodec", "flash-attn", "bitsandbytes", "torchao"}


def test_wheel_works_away_from_the_source(installed, tmp_path):
    modules = [
        "vidllm.modeling_vidllm.configuration_vidllm",
        "vidllm.modeling_vidllm.layers_vidllm",
        "vidllm.processing",
    ]
    code = f"""
import importlib, importlib.metadata, pathlib, vidllm
for name in {modules!r}:
    place = pathlib.Path(importlib.import_module(name).__file__)
    assert place.is_relative_to({str(installed)!r}), (name, place)
assert importlib.metadata.version("vidllm") == vidllm.__version__
print(vidllm.VidLLMConfig(adapter_type="none").adapter_type)
"""
    run = run_installed(installed, tmp_path, code)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["none"]


@NOT_YET
def test_demo_finds_the_shipped_model_in_the_wheel(installed, tmp_path):
    code = """
from vidllm.demo_truth import clip_folder, read_truth, shipped_folder
from vidllm.loading import load
model, processor = load(shipped_folder())
print(shipped_folder(), clip_folder(None), read_truth(clip_folder(None))["clip"]["num_frames"], model.device, sep="\\n")
"""
    run = run_installed(installed, tmp_path, code)
    assert run.returncode == 0, run.stderr[-2000:]
    folder = str(installed / "vidllm" / SHIPPED_MODEL)
    assert run.stdout.split()[:3] == [folder, folder, "24"]


def test_every_installed_module_imports(installed, tmp_path):
    modules = [
        ".".join(path.relative_to(installed).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted(installed.glob("vidllm/**/*.py"))
        # The code inside a checkpoint is loaded by transformers, from a folder that is no package.
        if path.name != "__main__.py" and not path.is_relative_to(installed / "vidllm" / SHIPPED_MODEL)
    ]
    assert len(modules) > 5
    code = f"""
import importlib
failed = []
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed.append(f"{{name}}: {{type(error).__name__}}: {{error}}")
print("\\n".join(failed))
"""
    run = run_installed(installed, tmp_path, code)
    assert run.returncode == 0, run.stderr[-2000:]
    assert not run.stdout.strip(), run.stdout


def test_editable_install_is_this_tree(tmp_path):
    names = ("vidllm", *(name for name in SETUPTOOLS["package-dir"] if name != "vidllm"))
    code = f"import importlib\nfor name in {names}: print(importlib.import_module(name).__file__)"
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    places = [Path(place) for place in run.stdout.splitlines()]
    assert places == [ROOT / SETUPTOOLS["package-dir"][name] / "__init__.py" for name in names]


def test_console_scripts_exist():
    for name, target in PROJECT["project"]["scripts"].items():
        module, _, function = target.partition(":")
        path = ROOT / (module.replace(".", "/") + ".py")
        assert path.is_file(), f"{name}: {relative(path)} does not exist"
        defined = {node.name for node in parse(path).body if isinstance(node, ast.FunctionDef)}
        assert function in defined, f"{name}: {relative(path)} does not define {function}()"


def test_one_version_everywhere():
    (version,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "vidllm/__init__.py").read_text(), flags=re.M)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["project"]["version"] == version == citation["version"]


def test_citation_names_the_paper_and_the_independence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Chen", "Xu", "Zhang", "Liu", "Lin", "Wang"]
    assert "2509.24385" in str(paper["identifiers"])
    assert "independent implementation" in citation["message"]
    assert not {author.get("family-names") for author in citation["authors"]} & {"Chen", "Xu", "Zhang"}


def test_constraints_are_exact_and_cover_what_is_declared():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[\w.-]+==[\w.]+", line), f"constraints.txt: {line!r} is no exact version"
            name, _, version = line.partition("==")
            pins[re.sub(r"[-_.]+", "-", name).lower()] = version
    declared = list(PROJECT["project"]["dependencies"])
    for extra in PROJECT["project"]["optional-dependencies"].values():
        declared += extra
    names = {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line).group()).lower() for line in declared} - {
        "vidllm",
        "tomli",
    }
    assert names <= set(pins), f"constraints.txt lacks {sorted(names - set(pins))}"
    assert {"torch", "torchvision", "setuptools", "wheel"} <= set(pins)


def test_installed_versions_meet_the_declared_ranges():
    """`pip check` over the environment: also that the constraints and the ranges of pyproject.toml agree."""
    run = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
