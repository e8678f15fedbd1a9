"""A field of the config comes and goes with the code that reads it."""

import ast

from contracts.source_tree import FOLDERS, parse, python_files, relative

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig


CONFIGURATION = "modeling_vidllm/configuration_vidllm.py"
# Read by transformers itself: it ties `lm_head` to the input embedding when this is true.
READ_BY_TRANSFORMERS = {"tie_word_embeddings"}


def declared_fields() -> set[str]:
    """Fields that VidLLMConfig's own class body declares."""
    (body,) = (
        node.body
        for tree in [next(parse(p) for p in python_files("modeling_vidllm") if relative(p) == CONFIGURATION)]
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "VidLLMConfig"
    )
    names = {item.target.id for item in body if isinstance(item, ast.AnnAssign)}
    return {name for name in names if not name.startswith("_")}


def reads(tree: ast.AST) -> set[str]:
    """Names read as `config.<name>` or `<anything>.config.<name>`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            if (isinstance(owner, ast.Name) and owner.id == "config") or (
                isinstance(owner, ast.Attribute) and owner.attr == "config"
            ):
                found.add(node.attr)
    return found


def test_fields_are_those_of_the_class():
    config = VidLLMConfig()
    assert declared_fields() <= set(config.to_dict()), "a declared field is not saved"


def test_every_field_is_read_by_code():
    paths = [path for path in python_files(*FOLDERS) if relative(path) != CONFIGURATION]
    read = set().union(*(reads(parse(path)) for path in paths))
    unread = declared_fields() - read - READ_BY_TRANSFORMERS
    assert not unread, f"no code reads config.{{{', '.join(sorted(unread))}}}: use it or remove it"


def test_every_field_is_documented():
    docstring = VidLLMConfig.__doc__
    missing = [name for name in sorted(declared_fields()) if f"\n        {name} (`" not in docstring]
    assert not missing, f"VidLLMConfig's docstring does not describe {missing}"


def test_only_loading_counts_as_reading():
    text = "config.a = 1\nself.config.b\nother.c\nmodel.config.d.e\ngetattr(config, 'f')"
    assert reads(ast.parse(text)) == {"b", "d"}
