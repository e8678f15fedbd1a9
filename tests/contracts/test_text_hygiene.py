"""What the text of the repository must not contain, whoever wrote it."""

import ast
import re

import pytest
from contracts.source_tree import is_saved_code, parse, relative, source_files


# The patterns are written so that this file does not match itself: one letter of each stands in brackets.
MACHINE_PATHS = re.compile(r"(?<![\w.~$}])/(?:wor[k]|roo[t]|hom[e]|User[s]|op[t]|mn[t])/|\b[C]:\\\\?\w")
REGISTRY_HOSTS = re.compile(
    r"pyp[i]\.org|pythonhoste[d]\.org|npmj[s]\.|deb\.debia[n]\.org|download\.pytorc[h]\.org|cond[a]\.anaconda"
)
PROCESS = re.compile(
    r"\b(?:this|another|previous|last|later|earlier|next) sessio[n]\b|\bsession['s]* (?:report|brie[f])\b"
    r"|\bissues? #?\d{1,2}\b|\bhelper agen[t]|\bworkplac[e]\b|\bacceptance (?:lis[t]|lin[e]|criteri[a])"
    r"|\bCONTRAC[T]\.md|\bdesig[n]\.md|\b(?:design|brief)(?: page)?,? (?:sectio[n]|par[t])|\bpart [ABCD] o[f]\b"
    r"|\.\./share[d]\b|\bshare[d]/(?:fixtures|realdata|reference|house|design)",
    re.IGNORECASE,
)
TEXT_SUFFIXES = {".py", ".md", ".toml", ".cff", ".jinja", ".txt", ".yml", ".yaml", ".cfg"}
TEXT_NAMES = {"Makefile", "run", ".gitignore"}
LICENCE_TEXT = {"LICENSE"}
MAX_LINES = 800
EMPTY_NAMES = re.compile(r"^(?:utils?|misc|common|helpers?)(?:_vidllm)?$|_(?:v2|new|old|tmp)$")

TEXTS = [p for p in source_files() if (p.suffix in TEXT_SUFFIXES or p.name in TEXT_NAMES) and not is_saved_code(p)]
PYTHON = [p for p in TEXTS if p.suffix == ".py"]
# Numbers and strings of others: frozen references and shipped weights are data.
PROSE = [p for p in TEXTS if "goldens" not in p.parts and p.name not in LICENCE_TEXT]


def lines_matching(path, pattern):
    """`file:line: text` for every line of a file that a pattern matches."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [f"{relative(path)}:{n}: {line.strip()[:120]}" for n, line in enumerate(lines, 1) if pattern.search(line)]


def test_there_is_something_to_read():
    assert {"pyproject.toml", "README.md", "vidllm/__init__.py"} <= {relative(path) for path in TEXTS}


@pytest.mark.parametrize("path", PROSE, ids=relative)
def test_ascii_only(path):
    wrong = lines_matching(path, re.compile(r"[^\x00-\x7f]"))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("a path of one machine", MACHINE_PATHS), ("a registry's host", REGISTRY_HOSTS), ("how it was made", PROCESS)],
    ids=["path", "registry", "process"],
)
def test_text_stands_on_its_own(name, pattern):
    wrong = [line for path in PROSE for line in lines_matching(path, pattern)]
    assert not wrong, f"names {name}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_files_stay_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES, f"{relative(path)}: split it"
    assert not EMPTY_NAMES.search(path.stem), f"{relative(path)}: a file is named after what is in it"


@pytest.mark.parametrize("path", [p for p in TEXTS if p.suffix == ".py" and "tests" not in p.parts], ids=relative)
def test_nothing_is_left_open(path):
    wrong = lines_matching(path, re.compile(r"\b(?:TOD[O]|FIXM[E]|XX[X])\b"))
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Name) and node.id in ("eval", "exec", "NotImplementedError", "breakpoint"):
            wrong.append(f"{relative(path)}:{node.lineno}: {node.id}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("pattern", "text", "matches"),
    [
        (MACHINE_PATHS, "see /wor" + "k/main", True),
        (MACHINE_PATHS, "`--data-root ~/scannet`, outputs/demo, a/work" + "/b", False),
        (REGISTRY_HOSTS, "from https://py" + "pi.org/simple", True),
        (PROCESS, "as issu" + "e 2 says", True),
        (PROCESS, "by the des" + "ign section 4", True),
        (PROCESS, "as the last ses" + "sion found", True),
        (PROCESS, "see transformers issue 29714; a chat session; the encoder is shared/unshared", False),
    ],
    ids=lambda value: "" if isinstance(value, re.Pattern) else None,
)
def test_the_patterns_match_what_they_are_for(pattern, text, matches):
    assert bool(pattern.search(text)) == matches
