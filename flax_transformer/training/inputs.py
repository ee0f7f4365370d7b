"""Prepares everything that a training needs: texts, vocabulary, packed corpora."""

import dataclasses
from typing import Any

from flax_transformer.bleu import DEFAULT, choose_tokenizer, make_bleu, warn_of_missing_spaces
from flax_transformer.data.corpus import ParallelText, corpus_files, corpus_tags, load_corpus
from flax_transformer.data.epochs import ChangingCorpus, training_corpus
from flax_transformer.data.pipeline import PackedCorpus
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import Experiment
from flax_transformer.files import Named, check_inputs, same_file, work_directory_of
from flax_transformer.processes import hosts
from flax_transformer.text.symbols import without_language
from flax_transformer.training.early_checks import check_ahead
from flax_transformer.training.notices import notice_of_rows, notice_of_tags, warn_of_settings, warn_of_texts
from flax_transformer.training.parallel import Parallelism
from flax_transformer.training.resuming import as_begun, check_config, check_fingerprints, check_processes
from flax_transformer.workdir import WorkDirectory


@dataclasses.dataclass(frozen=True)
class Materials:
    """The inputs of a training.

    Attributes:
        experiment: with the vocabulary's sizes and BLEU's tokeniser filled in.
        before: the experiment as it was when training last started; `None` if it is new.
        texts: the corpora by name: "train", and "valid" and "test" if there are any.
        train: the training corpus, tokenised and packed.
        held_out: the others, tokenised and packed, by name.
        vocabularies: of both sides.
        micro_batches: into how many micro-batches a device divides its rows of a batch.
    """

    experiment: Experiment
    before: Experiment | None
    texts: dict[str, ParallelText]
    train: PackedCorpus | ChangingCorpus
    held_out: dict[str, PackedCorpus]
    vocabularies: VocabularyPair
    micro_batches: int


def check_paths(experiment: Experiment, workdir: WorkDirectory) -> None:
    """Checks that the work directory can be written, and that training will not overwrite a file that it reads.

    Raises:
        ValueError: one of these is not so; names the file or folder.
    """
    workdir.check_place()
    if experiment.training.start_from and same_file(experiment.training.start_from, str(workdir.path)):
        raise ValueError(
            f"training.start_from and --workdir are both {workdir.path}: give another --workdir to train the model "
            "further, or leave training.start_from empty to go on with a training"
        )
    named: list[Named] = []
    for name in ("train", "valid", "test"):
        named += [(f"data.{name}", file) for file in corpus_files(getattr(experiment.data, name))]
    check_inputs(named)
    for setting, file in named:
        owner = work_directory_of(file, [str(workdir.path)])
        if owner is not None and same_file(owner, str(workdir.path)):
            raise ValueError(
                f"{setting} names {file}, which training would write over with a file of its own: move the text, or "
                "give another --workdir"
            )


def load_texts(experiment: Experiment) -> dict[str, ParallelText]:
    """Loads the experiment's corpora, by "train", "valid" and "test"; raises ValueError if one cannot be loaded."""
    if not experiment.data.train:
        raise ValueError("data.train is empty: name a corpus, e.g. --config.data.train=files:train.en,train.de")
    texts = {"train": load_corpus(experiment.data.train, experiment.data.temperature)}
    held_out = {"valid": experiment.data.valid, "test": experiment.data.test}
    return texts | {name: load_corpus(spec) for name, spec in held_out.items() if spec}


def prepare(
    experiment: Experiment,
    texts: dict[str, ParallelText],
    workdir: WorkDirectory,
    parallelism: Parallelism,
    *,
    accept_changed_corpus: bool,
) -> Materials:
    """Trains or loads the vocabulary, packs the corpora, and records both in the work directory.

    Args:
        experiment: the experiment to run.
        texts: the corpora from `load_texts`.
        workdir: the work directory; if it is not new, it must belong to the same experiment.
        parallelism: the devices that share a batch.
        accept_changed_corpus: whether a text may differ from the one that the training started with.

    Raises:
        ValueError: the work directory belongs to another experiment, vocabulary or text, or the settings would make the
            end of the training fail.
    """
    experiment = as_begun(experiment, workdir)
    check_processes(experiment, workdir)
    experiment = _fill_in_tokenizer(experiment, workdir, texts)
    check_ahead(experiment, workdir)
    if hosts.is_first():
        warn_of_settings(experiment)
        warn_of_texts(texts)
    vocabularies = _vocabularies(experiment, workdir, texts["train"])
    experiment = _fill_in_vocabulary_sizes(experiment, vocabularies)
    before = check_config(experiment, workdir)
    fingerprints = {name: text.fingerprint() for name, text in texts.items()}
    begun, changed = check_fingerprints(experiment, before, workdir, fingerprints, accept_changed_corpus)
    micro_batches = parallelism.micro_batches(experiment.data.rows, experiment.training.parallelism.rows_per_device)
    options: dict[str, Any] = {
        "max_length": experiment.model.max_length,
        "multiple": parallelism.num_devices * micro_batches,
        "host": hosts.index(),
        "num_hosts": hosts.count(),
        "cache": workdir.path / "cache",
    }
    train = training_corpus(texts["train"], vocabularies, experiment.data, **options)
    held_out = {
        name: PackedCorpus.from_text(text, vocabularies, experiment.data, name=name, **options)
        for name, text in texts.items()
        if name != "train"
    }
    # Recorded last, so that after an error the same work directory can be used with corrected settings.
    if hosts.is_first():
        if "valid" in changed:
            workdir.forget_scores()
        # The fingerprint of a corpus that the experiment no longer names stays recorded; the test corpus may change.
        recorded = {name: fingerprint for name, fingerprint in fingerprints.items() if name != "test"}
        workdir.write_fingerprints(begun | recorded | {"vocabulary": vocabularies.fingerprint()})
        workdir.write_config(experiment.to_mapping())
    hosts.wait("the first process has written what the training is")
    for name, corpus in {"train": train, **held_out}.items():
        hosts.say(_describe(name, texts[name], corpus, experiment.training.steps))
    if told := notice_of_tags(experiment.data, vocabularies.source.all_pieces()):
        hosts.say(told)
    if told := notice_of_rows(experiment.data.rows, train.batch_rows, parallelism.num_devices):
        hosts.say(told)
    return Materials(experiment, before, texts, train, held_out, vocabularies, micro_batches)


def _vocabularies(experiment: Experiment, workdir: WorkDirectory, text: ParallelText) -> VocabularyPair:
    if hosts.is_first() and not (workdir.exists and workdir.has_vocabularies()):
        if experiment.training.start_from:
            vocabularies = WorkDirectory(experiment.training.start_from).read_vocabularies()
        else:
            symbols = dict.fromkeys([*experiment.vocabulary.user_symbols, *corpus_tags(experiment.data.train)])
            config = dataclasses.replace(experiment.vocabulary, user_symbols=tuple(symbols))
            vocabularies = VocabularyPair.train(text.source, text.target, config)
        data = experiment.data
        vocabularies = vocabularies.speaking(
            data.source_language, data.target_language, add=bool(data.new_language_like)
        )
        if not workdir.exists:
            workdir.forget_fingerprints()
        workdir.write_vocabularies(vocabularies)
    hosts.wait("the first process has written the vocabulary")
    if not workdir.has_vocabularies():
        raise ValueError(
            f"process {hosts.index()} does not see the vocabulary that process 0 wrote to {workdir.path}: give a "
            "--workdir that all hosts share, e.g. gs://BUCKET/FOLDER"
        )
    return workdir.read_vocabularies()


def _fill_in_vocabulary_sizes(experiment: Experiment, vocabularies: VocabularyPair) -> Experiment:
    target = vocabularies.target
    # The vocabulary of a converted model leaves it to the model from which id it starts.
    start_id = experiment.model.start_id if target.start_id is None else target.start_id
    for name, id_ in (("pad_id", target.pad_id), ("start_id", start_id), ("eos_id", target.eos_id)):
        if getattr(experiment.model, name) != id_:
            raise ValueError(
                f"model.{name} is {getattr(experiment.model, name)}, but the vocabulary has {id_}: "
                f"set model.{name}={id_}"
            )
    model = dataclasses.replace(
        experiment.model, source_vocab_size=vocabularies.source.size, target_vocab_size=target.size
    )
    return dataclasses.replace(experiment, model=model)


def _fill_in_tokenizer(experiment: Experiment, workdir: WorkDirectory, texts: dict[str, ParallelText]) -> Experiment:
    """Replaces the tokeniser "auto" by the one that this training used before, or by one that suits the references."""
    scored = [texts[name] for name in ("valid", "test") if name in texts]
    if not scored:
        return experiment
    setting = "training.evaluation.tokenize"
    references = [without_language(target) for target in scored[0].target]
    tokenize = experiment.training.evaluation.tokenize
    if tokenize == "auto":
        begun = (workdir.read_config() if workdir.exists else {}).get("training", {})
        tokenize = begun.get("evaluation", {}).get("tokenize", tokenize)
        tokenize = choose_tokenizer(references) if tokenize == "auto" else tokenize
        # The choice depends on installed packages, which may differ between hosts.
        tokenize = hosts.gather(tokenize)[0]
        if tokenize != DEFAULT:
            hosts.say(f"BLEU with sacrebleu's tokeniser {tokenize}, by the script of the references ({setting})")
    make_bleu(tokenize, setting)
    if hosts.is_first():
        warn_of_missing_spaces(tokenize, references, setting)
    return experiment.changed({setting: tokenize})


def _describe(name: str, text: ParallelText, packed: PackedCorpus | ChangingCorpus, steps: int) -> str:
    line = (
        f"{name}: {len(text):,} sentence pairs in {packed.num_rows:,} rows, {packed.fill_rate:.1%} of the slots filled"
    )
    if len(packed.too_long):
        line += f"; {len(packed.too_long):,} pairs too long for a row are left out of the loss"
    if len(packed.blank):
        line += f"; {len(packed.blank):,} pairs with a blank side are left out of the loss"
    if name == "train":
        line += f"; {packed.epoch_steps:,.1f} steps an epoch, {steps / packed.epoch_steps:,.1f} epochs"
    return line
