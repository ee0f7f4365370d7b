import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import flax_transformer
from flax_transformer.attention import dot_product_attention
from flax_transformer.checking import check_shapes

ROOT = Path(__file__).parents[1]
PACKAGE = "flax_transformer"
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
ABOVE = "every row above"

# The rows of the library from the bottom of the dependencies up, and the rows that each may import. The name of a
# folder stands for all its files. The `__init__` of a folder runs before any file in it, so it imports nothing.
LAYOUT = {
    "checking": "",
    "files": "",
    "errors": "",
    "atomic_files": "files",
    "tokens": "",
    "masks": "tokens",
    "positions": "tokens",
    "ranges": "",
    "bleu": "",
    "config": "ranges",
    "moved_settings": "",
    "text.symbols": "",
    "experiment": "config moved_settings ranges text.symbols",
    "dropout": "",
    "projections": "",
    "attention": "masks dropout projections",
    "recurrence": "projections",
    "layers": "attention config dropout projections recurrence",
    "stacks": "config positions dropout attention layers",
    "model": "config masks positions attention projections stacks tokens",
    "packaged_font": "",
    "fonts": "packaged_font",
    "figures": "",
    "charts": "figures fonts",
    "plots": "figures fonts",
    "text.__init__": "",
    "text.languages": "",
    "text.spelling": "",
    "text.sentences": "",
    "text.splitting": "text.sentences",
    "text.documents": "text.sentences text.splitting",
    "text.alignment": "text.spelling text.symbols",
    "text.unknown": "text.alignment text.symbols",
    "text.markup_tokens": "",
    "text.markup_places": "text.alignment text.markup_tokens",
    "text.markup_runs": "text.spelling text.documents text.markup_tokens text.markup_places",
    "text.markup": "text.splitting text.documents text.alignment text.markup_tokens text.markup_places "
    "text.markup_runs",
    "data.__init__": "",
    "data.sentencepiece_model": "",
    "data.vocabulary_training": "experiment text data.sentencepiece_model",
    "data.sentencepiece_vocabulary": "experiment text data.sentencepiece_model data.vocabulary_training",
    "data.marian_vocabulary": "text data.sentencepiece_model data.sentencepiece_vocabulary",
    "data.fairseq_vocabulary": "text data.sentencepiece_vocabulary data.marian_vocabulary",
    "data.vocabulary": "atomic_files experiment data.sentencepiece_vocabulary data.marian_vocabulary "
    "data.fairseq_vocabulary",
    "data.locale_phrases": "",
    "data.lines": "files",
    "data.tfds_pairs": "files",
    "data.corpus": "files text data.lines data.locale_phrases data.tfds_pairs",
    "data.batch": "tokens",
    "data.cache": "atomic_files",
    "data.pipeline": "experiment text tokens data.vocabulary data.corpus data.batch data.cache",
    "data.subword_sampling": "text data.sentencepiece_model data.sentencepiece_vocabulary data.pipeline",
    "data.epochs": "experiment atomic_files data.vocabulary data.sentencepiece_vocabulary data.corpus data.batch "
    "data.cache data.pipeline data.subword_sampling",
    "data.cleaning": "ranges text",
    "data.seen": "",
    "orbax_paths": "files",
    "processes.__init__": "",
    "processes.hosts": "",
    "scores": "atomic_files processes.hosts",
    "preservation": "scores",
    "checkpoints": "atomic_files orbax_paths preservation scores processes.hosts",
    "workdir": "config experiment moved_settings data.vocabulary checkpoints files atomic_files",
    "decoding.__init__": "",
    "decoding.shortlist": "config",
    "interop.__init__": "",
    "interop.marian_shortlist": "atomic_files decoding.shortlist",
    "trained_model": "config model workdir data.vocabulary decoding.shortlist interop.marian_shortlist",
    "new_languages": "data.vocabulary trained_model",
    "interop.folders": "files atomic_files workdir",
    "interop.downloaded": "",
    "interop.fields": "config",
    "interop.yaml_text": "",
    "interop.tensor_files": "files interop.downloaded",
    "interop.parameters": "config trained_model interop.tensor_files",
    "interop.transformers_fields": "config interop.downloaded interop.fields",
    "interop.transformers_files": "config data.vocabulary interop.downloaded interop.fields interop.tensor_files "
    "interop.transformers_fields",
    "interop.transformers_tensors": "config interop.parameters interop.tensor_files",
    "interop.marian_native_files": "data.marian_vocabulary interop.downloaded interop.yaml_text",
    "interop.marian_native_vocabulary": "data interop.downloaded interop.yaml_text",
    "interop.marian_native_items": "interop.downloaded interop.tensor_files",
    "interop.marian_native_options": "config interop.fields interop.yaml_text",
    "interop.marian_native_tensors": "config interop.parameters interop.tensor_files",
    "interop.marian_native": "config data trained_model interop.folders interop.marian_native_files "
    "interop.marian_native_vocabulary interop.marian_native_items interop.marian_native_options "
    "interop.marian_native_tensors interop.marian_shortlist",
    "interop.marian_fields": "config interop.fields interop.transformers_fields",
    "interop.marian": "config data trained_model interop.downloaded interop.folders interop.tensor_files "
    "interop.transformers_files interop.transformers_tensors interop.marian_fields interop.marian_native_files "
    "interop.marian_native",
    "interop.language_codes": "",
    "interop.nllb_fields": "config interop.fields interop.transformers_fields",
    "interop.nllb_vocabulary": "data interop.downloaded interop.fields interop.language_codes "
    "interop.transformers_files",
    "interop.nllb": "config data trained_model interop.fields interop.folders interop.tensor_files "
    "interop.transformers_files interop.transformers_tensors interop.nllb_fields interop.nllb_vocabulary",
    "interop.hub": "data interop.tensor_files interop.transformers_fields interop.transformers_files "
    "interop.nllb_vocabulary",
    "interop.ctranslate2": "config ranges data.marian_vocabulary stacks trained_model interop.fields "
    "interop.folders interop.parameters",
    "interop.stablehlo_example": "",
    "interop.stablehlo": "model data.marian_vocabulary trained_model interop.folders",
    "decoding.settings": "ranges",
    "decoding.results": "",
    "decoding.mbr": "decoding.results",
    "decoding.texts": "decoding.results",
    "decoding.unreadable": "data.sentencepiece_vocabulary text.spelling",
    "decoding.sources": "data.sentencepiece_vocabulary text decoding.unreadable",
    "decoding.next_token": "decoding.settings",
    "decoding.search": "decoding.settings decoding.next_token",
    "decoding.transposed": "config model projections",
    "decoding.ensemble": "config model stacks decoding.transposed",
    "decoding.slots": "attention config stacks tokens decoding.settings decoding.search decoding.transposed "
    "decoding.ensemble",
    "decoding.listed_rows": "decoding.ensemble",
    "decoding.moving": "attention stacks decoding.search decoding.ensemble",
    "decoding.sizes": "decoding.shortlist decoding.next_token decoding.slots",
    "decoding.requests": "",
    "decoding.waiting": "decoding.requests",
    "decoding.machine": "tokens decoding.settings decoding.ensemble decoding.slots decoding.listed_rows "
    "decoding.moving decoding.requests decoding.waiting",
    "decoding.programs": "decoding.settings decoding.shortlist decoding.ensemble decoding.sizes decoding.machine",
    "decoding.scheduler": "decoding.settings decoding.requests decoding.waiting decoding.machine decoding.programs",
    "decoding.engine": "positions decoding.settings decoding.shortlist decoding.ensemble decoding.sizes "
    "decoding.requests decoding.programs decoding.scheduler",
    "decoding.batching": "",
    "decoding.scoring": "decoding.transposed decoding.ensemble decoding.requests decoding.batching",
    "decoding.writing": "text data decoding.requests decoding.results decoding.settings",
    "decoding.unknown": "text data decoding.requests decoding.writing",
    "decoding.inspection": "config model positions stacks decoding.transposed decoding.ensemble decoding.requests "
    "decoding.batching decoding.scoring",
    "decoding.drafts": "ranges text data.sentencepiece_vocabulary data.vocabulary decoding",
    "decoding.translator": "config ranges text trained_model data.sentencepiece_vocabulary data.vocabulary decoding",
    "decoding.documents": "text decoding.results decoding.settings decoding.texts decoding.translator",
    "processes.interruption": "",
    "processes.lock": "files",
    "processes.memory": "",
    "monitoring.__init__": "",
    "monitoring.utilization": "config experiment",
    "monitoring.profile": "",
    "monitoring.provenance": "",
    "monitoring.tensorboard": "",
    "monitoring.report": "text.spelling workdir monitoring.tensorboard",
    "training.__init__": "",
    "training.loss": "",
    "training.loss_scale": "",
    "training.optimizer": "experiment",
    "training.step": "projections experiment model data.batch training.loss training.loss_scale training.optimizer",
    "training.parallel": "monitoring.utilization",
    "training.step_statistics": "data.batch monitoring.utilization training.step",
    "training.early_checks": "experiment workdir processes.hosts",
    "training.notices": "experiment data.corpus training.optimizer",
    "training.resuming": "experiment workdir new_languages processes.hosts monitoring.provenance",
    "training.inputs": "bleu experiment files text data workdir processes.hosts training.parallel "
    "training.early_checks training.notices training.resuming",
    "training.evaluation": "bleu config experiment text data decoding trained_model processes.hosts "
    "monitoring.report training.loss",
    "training.loop": "experiment text model checkpoints workdir trained_model new_languages processes monitoring "
    "training",
    "serving.__init__": "",
    "serving.refusals": "",
    "serving.limits": "serving.refusals",
    "serving.metrics": "",
    "serving.languages": "data.corpus text.languages",
    "serving.models": "decoding serving.languages serving.refusals",
    "serving.preparing": "decoding serving.models",
    "serving.desk": "decoding serving.refusals",
    "serving.parameters": "serving.limits serving.refusals",
    "serving.service": "errors decoding serving.desk serving.limits serving.metrics serving.models "
    "serving.parameters serving.refusals",
    "serving.texts": "text decoding serving.models serving.refusals serving.service",
    "serving.libretranslate": "text decoding.documents serving.languages serving.models serving.refusals "
    "serving.service serving.texts",
    "serving.exploring": "text data.sentencepiece_vocabulary decoding serving.libretranslate serving.models "
    "serving.parameters serving.refusals serving.service serving.texts",
    "serving.openapi": "decoding.inspection serving.exploring serving.libretranslate serving.limits",
    "serving.application": "packaged_font serving",
    "serving.server": "serving.service",
    "planning.__init__": "",
    "planning.hlo": "",
    "planning.plan": "errors experiment tokens data.batch monitoring.utilization training.step training.parallel "
    "planning.hlo",
    "__init__": ABOVE,
    "commands": ABOVE,
    "__main__": ABOVE,
}


def covers(row, name):
    return name == row or name.startswith(row + ".")


def row_of(name):
    """The row that a dotted name inside the package belongs to, or None."""
    return next((row for row in LAYOUT if covers(row, name)), None)


def imported_names(source, importer):
    """The dotted names inside the package that `source`, the text of the module `importer`, imports anywhere in it."""
    folder = [PACKAGE, *importer.split(".")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            full = [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
        else:
            continue
        yield from (name.removeprefix(PACKAGE).removeprefix(".") for name in full if covers(PACKAGE, name))


def forbidden_imports(source, importer):
    """The rows that `source`, the text of the module `importer`, imports against the table."""
    rows = list(LAYOUT)
    own = row_of(importer)
    if own is None:
        raise LookupError(f"{importer} has no row in LAYOUT: add one that says where it stands and what it may import")
    allowed = rows[: rows.index(own)] if LAYOUT[own] == ABOVE else LAYOUT[own].split()
    # A name without a row, such as the class in `from flax_transformer import Transformer`, is one of `__init__`'s.
    imported = {row_of(name) or "__init__" for name in imported_names(source, importer)} - {own}
    return sorted(row for row in imported if not any(covers(entry, row) for entry in allowed))


def module_name(path):
    return ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_file_imports_only_what_its_row_allows(path):
    assert forbidden_imports(path.read_text(), module_name(path)) == []


@pytest.mark.parametrize("row", LAYOUT)
def test_the_table_has_no_upward_import(row):
    rows = list(LAYOUT)
    above = rows[: rows.index(row)]
    for entry in LAYOUT[row].split() if LAYOUT[row] != ABOVE else []:
        assert any(covers(entry, other) for other in above), f"{row} may import {entry}, which does not stand above it"
    assert not row.startswith("decoding") or "training" not in LAYOUT[row]


@pytest.mark.parametrize(
    ("importer", "source", "forbidden"),
    [
        ("attention", "from flax_transformer.model import Transformer", ["model"]),
        ("attention", "from flax_transformer import masks, model", ["model"]),
        ("attention", "def f():\n    import flax_transformer.training.loop as loop", ["training.loop"]),
        ("attention", "from flax_transformer import Transformer", ["__init__"]),
        ("attention", "from .layers import FeedForward", ["layers"]),
        ("decoding.search", "from ..training.step import TrainState", ["training.step"]),
        ("data.vocabulary", "from . import pipeline", ["data.pipeline"]),
        ("attention", "import jax\nfrom flax_transformer.masks import causal_mask\nfrom . import masks", []),
        ("training.evaluation", "from flax_transformer.data.pipeline import Batch", []),
        ("commands.train", "from flax_transformer.commands import translate\nfrom ..training import loop", []),
    ],
)
def test_the_checker_sees_an_upward_import(importer, source, forbidden):
    assert forbidden_imports(source, importer) == forbidden


def test_the_checker_names_a_file_without_a_row():
    with pytest.raises(LookupError, match=r"data\.helpers has no row"):
        forbidden_imports("import jax", "data.helpers")


def packages_loaded_by(statement):
    listing = f"{statement}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", listing], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_importing_the_library_loads_no_other_package():
    cost = packages_loaded_by(f"import {PACKAGE}") - packages_loaded_by("pass")
    assert cost - sys.stdlib_module_names == {PACKAGE}


def test_the_public_names_load_only_jax_flax_and_jaxtyping():
    cost = packages_loaded_by(f"from {PACKAGE} import *") - packages_loaded_by("import jax, flax.linen, jaxtyping")
    assert cost - sys.stdlib_module_names == {PACKAGE}


def test_lazily_loaded_names_are_those_in_the_stub_file():
    stub = ast.parse((ROOT / PACKAGE / "__init__.pyi").read_text())
    homes = {alias.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    declared = [ast.literal_eval(node.value) for node in stub.body if isinstance(node, ast.Assign)]
    assert declared == [flax_transformer.__all__] and sorted(homes) == sorted(flax_transformer.__all__)
    assert set(flax_transformer.__all__) <= set(dir(flax_transformer))
    for name, home in homes.items():
        assert getattr(flax_transformer, name) is getattr(importlib.import_module(home), name)


def test_the_public_interface_has_not_changed():
    """Adding or removing a name changes the version: see CONTRIBUTING.md."""
    assert sorted(flax_transformer.__all__) == [
        "KVCache",
        "MultiHeadAttention",
        "Tokens",
        "Transformer",
        "TransformerConfig",
        "causal_mask",
        "combine_masks",
        "dot_product_attention",
        "padding_mask",
        "segment_mask",
    ]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'flax_transformer' has no attribute 'Transfomer'"):
        flax_transformer.Transfomer  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Transfomer'"):
        exec("from flax_transformer import Transfomer")


def test_a_module_of_the_library_is_an_attribute_once_it_is_imported():
    statement = f"import {PACKAGE}; assert not hasattr({PACKAGE}, 'masks'); from {PACKAGE} import masks"
    packages_loaded_by(f"{statement}; assert {PACKAGE}.masks is masks and {PACKAGE}.causal_mask is masks.causal_mask")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_annotations_are_evaluated_so_that_shapes_are_checked(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
        assert not names & {"annotations", "TYPE_CHECKING"}, f"line {node.lineno} leaves annotations unevaluated"
        assert not (isinstance(node, ast.Attribute) and node.attr == "TYPE_CHECKING"), f"line {node.lineno}"


def test_a_wrong_shape_is_an_error_while_tests_run():
    memory = jnp.zeros((2, 7, 3, 4))
    assert dot_product_attention(jnp.zeros((2, 5, 3, 4)), memory, memory).shape == (2, 5, 3, 4)
    with pytest.raises(jaxtyping.TypeCheckError):
        dot_product_attention(jnp.zeros((5, 3, 4)), memory, memory)


def test_without_the_checks_a_wrong_rank_is_an_error_that_says_what_to_give():
    query, memory = jnp.zeros((2, 5, 3, 4)), jnp.zeros((2, 7, 3, 4))
    unchecked = inspect.unwrap(dot_product_attention)
    for arguments in ((query[0], memory, memory), (query, memory[0], memory[0]), (query, memory[..., :3], memory)):
        with pytest.raises(ValueError, match=r"give \[B, Q, H, K\] and twice \[B, M, H, K\]"):
            unchecked(*arguments)
    split = inspect.unwrap(flax_transformer.MultiHeadAttention._split_heads)
    with pytest.raises(ValueError, match=r"give \[B, positions, D\]"):
        split(flax_transformer.MultiHeadAttention(d_model=4, num_heads=2), jnp.zeros((5, 4)))


def test_checks_are_switched_on_only_before_the_modules_that_they_check():
    with pytest.raises(RuntimeError, match="is imported already and would not be checked"):
        check_shapes()


def test_a_wrong_shape_in_a_tree_is_an_error_too_and_a_placeholder_of_jaxs_is_none():
    cache = flax_transformer.KVCache(key=jnp.zeros((2, 3, 4, 7)), value=jnp.zeros((2, 3, 7, 4)))
    leaves, structure = jax.tree.flatten(cache)
    for wrong in (leaves[:1] * 2, [leaves[0], 0.0], [leaves[0], None]):
        with pytest.raises(jaxtyping.TypeCheckError):
            jax.tree.unflatten(structure, wrong)
    for placeholder in (object(), None, jax.ShapeDtypeStruct((5,), "int32"), leaves[0].sharding):
        assert jax.tree.unflatten(structure, [placeholder] * 2).value is placeholder


def test_training_does_not_import_pytorch():
    code = "import sys, flax_transformer.training.loop; print('torch' in sys.modules, 'tensorboardX' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"
