"""The usual evaluation corpora by name: where they lie, how they are split, and how their text is detokenized."""

import re
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Features, IterableDataset, Value

from .documents import column_names, load_documents, load_table, map_batches, require_text, select_text
from .tables import load_saved_dataset, read_files, slice_rows
from .text_files import TABLE_FORMATS, is_saved_dataset


Rules = tuple[tuple[str, str], ...]

# The Hub's branch of conversions: `datasets` no longer runs the loading scripts that these repositories consist of.
CONVERTED_FILES = "hf://datasets/{path}@refs/convert/parquet/{config}/{split}/*.parquet"
# How the files of a split are called: words of their paths.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "heldout"},
}
# Characters of each split, in the order in which they stand in the file.
TEXT8_SPLITS = {"train": 90_000_000, "validation": 5_000_000, "test": 5_000_000}
# A document is tokenized at once, for which a whole split would need tens of gigabytes.
TEXT8_DOCUMENT_LENGTH = 1_000_000
DETOKENIZE_BATCH_SIZE = 1000


def _literal(*pairs: tuple[str, str]) -> Rules:
    """Rules that replace strings as they are."""
    return tuple((re.escape(old), new) for old, new in pairs)


def _space_after(marks: str) -> Rules:
    """A mark between two spaces loses the one before it; one kind of mark after the other."""
    return _literal(*((f" {mark} ", f"{mark} ") for mark in marks))


BLANK_LINE = ((r"\A\s+\Z", ""),)
STRIP = ((r"\A\s+", ""), (r"\s+\Z", ""))

WIKITEXT_RULES = (
    BLANK_LINE
    + _literal(("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))
    + _space_after(":;.!?,")
    # What stands in brackets or quotes keeps no space beside them.
    + tuple(
        (rf"{re.escape(opening)}\s*([^{re.escape(closing)}]*?)\s*{re.escape(closing)}", rf"{opening}\1{closing}")
        for opening, closing in ("()", "[]", "{}", '""', "''")
    )
    + _literal(*((" ".join("=" * level), "=" * level) for level in (4, 3, 2)))
    + _literal((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"))
)
PTB_RULES = (
    STRIP
    + _literal((" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), (r"\/", "/"))
    # A number between spaces; the last word of a line stays an N in the literature, too.
    + ((r"(?<= )N(?= )", "1"),)
    + _literal(("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?"))
)
LM1B_RULES = (
    STRIP
    + _literal(("http : / / ", "http://"), ("https : / / ", "https://"))
    + ((r" '(\w+)", r"'\1"), (r" (\w+) \. ", r" \1. "), (r" (\w+) \.$", r" \1."))
    + _space_after("?")
    + ((r" \?$", "?"),)
    + _space_after("!")
    + ((r" !$", "!"),)
    + _space_after(",:;")
    + _literal((" / ", "/"))
    + ((r'" ([^"]+) "', r'"\1"'), (r"' ([^']+) '", r"'\1'"))
    + ((r"\( ([^()]+) \)", r"(\1)"), (r"\[ ([^\[\]]+) \]", r"[\1]"))
    + _literal(("$ ", "$"), ("£ ", "£"))
)
LAMBADA_RULES = (("[“”]", '"'), (r"\s+\Z", ""), (r"\A\s*", "\n"))


@dataclass(frozen=True)
class Corpus:
    """
    A corpus of the literature.

    Attributes:
        path: Id of the dataset on the Hub.
        config: Its configuration.
        splits: Names of its splits.
        text_column: The column that holds the text.
        rules: Regular expressions and what they are replaced by, one after the other: the detokenizer.
        converted: Whether only the Hub's own conversion of the dataset can be read.
        missing: Splits that the Hub does not hold as a whole.
        held_out: How many documents at the end of the split `train` make the split `validation`; 0 if it has files of
            its own.
        documents: What is one document of a plain text file: a "line", the "file", or None if the corpus is a table.
    """

    path: str
    splits: tuple[str, ...]
    config: str | None = None
    text_column: str = "text"
    rules: Rules = ()
    converted: bool = False
    missing: tuple[str, ...] = ()
    held_out: int = 0
    documents: str | None = "line"


def _wikitext(config: str) -> Corpus:
    return Corpus("Salesforce/wikitext", ("train", "validation", "test"), config, rules=WIKITEXT_RULES)


def _scientific_papers(config: str, missing: tuple[str, ...] = ()) -> Corpus:
    return Corpus(
        "armanc/scientific_papers",
        ("train", "validation", "test"),
        config,
        text_column="article",
        rules=WIKITEXT_RULES + LM1B_RULES[len(STRIP) :],
        converted=True,
        missing=missing,
        documents=None,
    )


# The corpora that papers report likelihoods on, by the names that `load_corpus` and `--data` take.
CORPORA = {
    "wikitext2": _wikitext("wikitext-2-raw-v1"),
    "wikitext103": _wikitext("wikitext-103-raw-v1"),
    "ptb": Corpus(
        "ptb-text-only/ptb_text_only",
        ("train", "validation", "test"),
        "penn_treebank",
        text_column="sentence",
        rules=PTB_RULES,
        converted=True,
    ),
    "lm1b": Corpus("billion-word-benchmark/lm1b", ("train", "test"), "plain_text", rules=LM1B_RULES, converted=True),
    "lambada": Corpus("EleutherAI/lambada_openai", ("test",), "default", rules=LAMBADA_RULES),
    "ag_news": Corpus("fancyzhx/ag_news", ("train", "test"), documents=None),
    "scientific_papers_pubmed": _scientific_papers("pubmed"),
    # The Hub converts the first 5 GB of a split only.
    "scientific_papers_arxiv": _scientific_papers("arxiv", missing=("train",)),
    "openwebtext": Corpus("Skylion007/openwebtext", ("train", "validation"), held_out=100_000, documents="file"),
    "text8": Corpus("afmck/text8", tuple(TEXT8_SPLITS), documents="file"),
}


def detokenize(text: str, corpus: str) -> str:
    """
    The text of a tokenized corpus as it is written, or nearly so: the detokenizer of the literature.

    What SEDD (arXiv 2310.16834), MDLM (arXiv 2406.07524) and BD3-LM (arXiv 2503.09573) do before they tokenize, rule
    by rule and with its oddities (in Penn Treebank, the number `N` becomes 1 and `<unk>` a question mark), since
    perplexities are comparable only on the same text. One rule of theirs, for a year after an apostrophe, is left out:
    as written, it matches nothing that occurs.

    Args:
        text: A document of the corpus: a line of WikiText, Penn Treebank or LM1B.
        corpus: A name in `CORPORA`.

    Raises:
        ValueError: if there is no such corpus.
    """
    return _apply(text, _find(corpus).rules)


def load_corpus(
    source: str,
    split: str = "train",
    *,
    corpus: str | None = None,
    text_column: str | None = None,
    dataset_config: str | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """
    Read a corpus of the literature by its name, detokenized and split as there, or any other as `load_documents` does.

    | name | splits | the literature scores | a document is |
    |---|---|---|---|
    | `wikitext2`, `wikitext103` | train, validation, test | validation | a line; blank ones are empty |
    | `ptb` | train, validation, test | validation | a line |
    | `lm1b` | train, test | test | a line |
    | `lambada` (OpenAI's version) | test | test | a passage |
    | `ag_news` | train, test | test | title and description |
    | `scientific_papers_pubmed`, `scientific_papers_arxiv` | train, validation, test | validation | an article |
    | `openwebtext` | train, validation: the last 100,000 documents | validation | a page |
    | `text8` | train, validation, test: 90, 5 and 5 million characters | test | a million characters |

    Args:
        source: A name above, for the Hub's copy, or whatever `load_documents` takes. A file or folder here that has
            such a name is read as a copy of that corpus.
        split: A split, or a slice of one in `datasets`' notation (`"train[:10%]"`, not of a stream).
        corpus: A name above: `source` is a copy of it, to be split and detokenized likewise. It may be

            - a file, of text or a table (`.jsonl`, `.json`, `.csv`, `.parquet`), that holds the split; for
              `openwebtext`, which is cut here, the whole corpus; for `text8` either;
            - a folder of such files, whose paths tell the splits (`wiki.valid.tokens`, `test/0000.parquet`);
            - a folder that `save_to_disk` wrote, of one split or several;
            - the id of another dataset on the Hub.
        text_column: The column of a table that holds the text. (default: the corpus' own, or `text`)
        dataset_config: The configuration of a Hub dataset that is given by its id.
        streaming: Return a stream, which is read (and downloaded) as it is iterated over.

    Returns:
        One document per row in the column `text`.

    Raises:
        ValueError: if there is no such corpus, split, source or column, a file cannot be read or is not UTF-8, the
            corpus has not the length that its splits take, or there is no text.
    """
    if corpus is None and source in CORPORA:
        corpus = source
    options = {"text_column": text_column, "dataset_config": dataset_config}
    if corpus is None:
        given = {name: value for name, value in options.items() if value is not None}
        return load_documents(source, split=split, streaming=streaming, **given)
    entry = _find(corpus)
    name = split.partition("[")[0]
    if name not in entry.splits:
        raise ValueError(f"split={split!r} is not a split of {corpus}; it takes {', '.join(entry.splits)}")
    if streaming and name != split:
        raise ValueError(f"split={split!r}: a stream has no slices; it takes {', '.join(entry.splits)}")

    stored_split = "train" if entry.held_out else name
    path = Path(source).expanduser()
    if path.exists():
        table = _load_copy(path, corpus, stored_split, streaming)
    elif source == corpus:
        if dataset_config is not None:
            raise ValueError(f"dataset_config={dataset_config!r} goes with the id of a dataset, not with {corpus!r}")
        table = _load_from_hub(corpus, stored_split, streaming)
    else:
        table = load_table(source, split=stored_split, dataset_config=dataset_config, streaming=streaming)

    documents = select_text(table, source, text_column or _column_of(table, entry))
    if corpus == "text8":
        documents = _cut_text8(documents, name, source, streaming)
    elif entry.held_out:
        documents = _cut_held_out(documents, name, entry.held_out, source)
    if name != split:
        documents = slice_rows(documents, split)
    if entry.rules:
        features = Features({"text": Value("string")})
        documents = map_batches(
            documents,
            _detokenize_batch,
            features,
            batch_size=DETOKENIZE_BATCH_SIZE,
            desc="Detokenizing",
            rules=entry.rules,
        )
    return documents if streaming else require_text(documents, f"data={source!r}, split={split!r}")


def _find(corpus: str) -> Corpus:
    if corpus not in CORPORA:
        raise ValueError(f"corpus={corpus!r} is not known; it takes {', '.join(CORPORA)}")
    return CORPORA[corpus]


def _apply(text: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _detokenize_batch(batch: dict, rules: Rules) -> dict:
    return {"text": [_apply(text or "", rules) for text in batch["text"]]}


def _load_from_hub(corpus: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    entry = CORPORA[corpus]
    if split in entry.missing:
        raise ValueError(
            f"split={split!r} of {corpus} is not on the Hub as a whole; it takes a copy of it, as the data, with "
            f"corpus={corpus!r}"
        )
    if entry.converted:
        files = CONVERTED_FILES.format(path=entry.path, config=entry.config, split=split)
        return read_files("parquet", [files], f"data={corpus!r}", streaming)
    return load_table(entry.path, split=split, dataset_config=entry.config, streaming=streaming)


def _load_copy(path: Path, corpus: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    """A split of a copy that lies here: its table, or lines or files of text in the column `text`."""
    if is_saved_dataset(path):
        return load_saved_dataset(path, split, streaming)
    documents = CORPORA[corpus].documents
    files = [path] if path.is_file() else _files_of_split(path, corpus, split)
    name = f"data={str(path)!r}"
    table_format = TABLE_FORMATS.get(files[0].suffix)
    if table_format is None and documents is None:
        raise ValueError(f"{name}: {files[0].name} is no table; {corpus} takes {', '.join(TABLE_FORMATS)}")
    # The lines of a file keep their ends, as those of the Hub's WikiText do.
    options = {"sample_by": "line", "keep_linebreaks": True} if documents == "line" else {"sample_by": "document"}
    if table_format is None:
        return read_files("text", files, name, streaming, features=Features({"text": Value("string")}), **options)
    return read_files(table_format, files, name, streaming)


def _files_of_split(folder: Path, corpus: str, split: str) -> list[Path]:
    """The files of one split, in the order of their names; all files if their names tell no splits apart."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    words = {file: set(re.split("[^a-z]+", str(file.relative_to(folder)).lower())) for file in files}
    of_split = [file for file in files if words[file] & SPLIT_WORDS[split]]
    entry = CORPORA[corpus]
    if entry.documents == "file" and not any(words[file] & set().union(*SPLIT_WORDS.values()) for file in files):
        of_split = files
    # Parts of one file differ in their numbers; pages, each a file, in anything.
    kinds = {file.suffix if entry.documents == "file" else re.sub(r"\d+", "", file.name) for file in of_split}
    if len(kinds) != 1:
        found = ", ".join(str(file.relative_to(folder)) for file in of_split[:5]) or "none"
        raise ValueError(
            f"data={str(folder)!r} must hold one file of the split {split!r} of {corpus}, or numbered parts of one, "
            f"with one of {', '.join(sorted(SPLIT_WORDS[split]))} as a word of the path; it has {found}"
        )
    return of_split


def _column_of(table: Dataset | IterableDataset, entry: Corpus) -> str:
    """Copies often call the column `text`, which plain files always do."""
    columns = column_names(table)
    return "text" if entry.text_column not in columns and "text" in columns else entry.text_column


def _cut_held_out(documents, split: str, held_out: int, source: str):
    if isinstance(documents, Dataset):
        number = len(documents)
    else:
        splits = documents.info.splits or {}
        if "train" not in splits or not splits["train"].num_examples:
            raise ValueError(f"data={source!r} does not say how many documents it has; streaming must be off")
        number = splits["train"].num_examples
    if number <= held_out:
        raise ValueError(
            f"data={source!r} must have more than the {held_out:,} documents at its end that are held out, but has "
            f"{number:,}; an excerpt is read without naming the corpus"
        )
    return documents.take(number - held_out) if split == "train" else documents.skip(number - held_out)


def _cut_text8(documents, split: str, source: str, streaming: bool):
    """Documents of a million characters, of a table that holds the whole corpus or the split."""
    text = "".join(row["text"] for row in documents)
    if len(text) == sum(TEXT8_SPLITS.values()):
        start = 0
        for name, length in TEXT8_SPLITS.items():
            if name == split:
                break
            start += length
        text = text[start : start + TEXT8_SPLITS[split]]
    if len(text) != TEXT8_SPLITS[split]:
        raise ValueError(
            f"data={source!r} must have the {sum(TEXT8_SPLITS.values()):,} characters of text8, or the "
            f"{TEXT8_SPLITS[split]:,} of its split {split!r}, but has {len(text):,}"
        )
    starts = range(0, len(text), TEXT8_DOCUMENT_LENGTH)
    cut = Dataset.from_dict({"text": [text[start : start + TEXT8_DOCUMENT_LENGTH] for start in starts]})
    return cut.to_iterable_dataset() if streaming else cut
