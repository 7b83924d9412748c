"""A corpus that is asked for by name comes split and detokenized as in the literature, wherever it lies."""

import dataclasses
import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.splits import SplitDict, SplitInfo

from bd3lm_hf.cli.train import DataArguments, _load_splits, train_arguments
from bd3lm_hf.data import corpora
from bd3lm_hf.data.corpora import CORPORA, detokenize, load_corpus


PTB = {
    "train": "the index fell N N to $ N \n he did n't say \n",
    "validation": " it 's the traders ' choice \n <unk> and\\/or # N \n",
    "test": " no it was n't black monday \n\n",
}
PTB_WRITTEN = {
    "train": ["the index fell 1 1 to $ N", "he didn't say"],
    "validation": ["it's the traders' choice", "? and/or # N"],
    "test": ["no it wasn't black monday", ""],
}
PTB_LINES = {split: [line.strip() for line in text.split("\n")[:-1]] for split, text in PTB.items()}


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def texts(*args, **kwargs):
    return load_corpus(*map(str, args), **kwargs)["text"][:]


# Detokenizers


@pytest.mark.parametrize(
    "corpus, tokenized, written",
    [
        ("wikitext2", " a guest @-@ star of 1 @,@ 500 or 2 @.@ 5 % \n", " a guest-star of 1,500 or 2.5 %\n"),
        ("wikitext103", ' the " Craig " ( 24 in ) said : yes ; no . \n', ' the "Craig" (24 in) said: yes; no.\n'),
        ("wikitext103", " = Title = \n", " = Title =\n"),
        ("wikitext103", " = = = Part = = = \n", " === Part ===\n"),
        ("wikitext103", " Teddy 's dogs ' 5 ° C N times \n", " Teddy's dogs' 5°C 1 times\n"),
        ("wikitext103", " \n", ""),
        ("ptb", " it 's the traders ' N N % of $ N a year <unk> \n", "it's the traders' 1 1 % of $1 a year ?"),
        ("ptb", "they did n't sell either\\/or for # N each in N", "they didn't sell either/or for #1 each in N"),
        ("lm1b", "He 'd paid $ 5 , or £ 4 , she said .", "He'd paid $5, or £4, she said."),
        ("lm1b", 'Why ? " It is ( was ) so . " Oh !', 'Why? "It is (was) so." Oh!'),
        ("lm1b", "See http : / / a.org [ now ] and / or : b ; c", "See http://a.org [now] and/or: b; c"),
        ("lambada", "  “ well , ” he said , “ go \n", '\n" well , " he said , " go'),
        ("scientific_papers_arxiv", "fig . ( a ) , as 5 @-@ 6 shows .", "fig. (a), as 5-6 shows."),
        ("ag_news", "Oil prices ( AP ) AP - up", "Oil prices ( AP ) AP - up"),
    ],
)
def test_tokenized_text_is_written_as_the_literature_does(corpus, tokenized, written):
    assert detokenize(tokenized, corpus) == written


def test_the_numbers_of_ptb_are_replaced_however_many_follow_each_other():
    for number in range(1, 12):
        assert detokenize("a" + " N" * number + " b", "ptb") == "a" + " 1" * number + " b"


@pytest.mark.parametrize("corpus, file", [("wikitext2", "wikitext2_test.txt"), ("ptb", "ptb_valid.txt")])
def test_a_real_corpus_loses_its_marks_and_no_word(shared_dir, corpus, file):
    path = shared_dir / "corpora" / file
    documents = texts(path, "test", corpus=corpus)
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    assert len(documents) == len(lines)
    assert sum(not document for document in documents) == sum(not line.strip() for line in lines)
    text = "".join(documents)
    for mark in {"wikitext2": (" @-@ ", " @,@ ", " @.@ ", " , "), "ptb": (" n't", " 's ", "<unk>", " N ")}[corpus]:
        assert mark in "\n".join(lines)
        assert mark not in text
    kept = [letter for letter in text if letter.isalpha() and letter != "N"]
    unchanged = (letter for letter in "".join(lines).replace("<unk>", "" if corpus == "ptb" else "<unk>"))
    assert kept == [letter for letter in unchanged if letter.isalpha() and letter != "N"]


# Copies that lie here


def test_the_lines_of_a_wikitext_file_are_the_rows_of_the_hub(tmp_path):
    rows = ["", " = Title = \n", "", " One , two . \n", " Three \n"]
    path = tmp_path / "wiki.test.raw"
    path.write_text("".join(row or " \n" for row in rows), encoding="utf-8")
    Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "saved")
    expected = ["", " = Title =\n", "", " One, two.\n", " Three\n"]
    assert texts(path, "test", corpus="wikitext103") == expected
    assert texts(tmp_path / "saved", "test", corpus="wikitext103") == expected


def write_folder(folder, suffix):
    """The three splits of `PTB` as users have them."""
    folder.mkdir()
    columns = {split: {"sentence": lines} for split, lines in PTB_LINES.items()}
    for split, text in PTB.items():
        table = Dataset.from_dict(columns[split])
        if suffix == ".txt":
            name = {"validation": "valid"}.get(split, split)
            (folder / f"ptb.{name}.txt").write_text(text, encoding="utf-8")
        elif suffix == ".jsonl":
            rows = [json.dumps({"text": line, "id": 7}) for line in PTB_LINES[split]]
            (folder / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
        elif suffix == ".csv":
            table.to_csv(folder / f"{split}.csv")
        elif suffix == ".parquet":
            (folder / "penn_treebank" / split).mkdir(parents=True)
            table.select([0]).to_parquet(folder / "penn_treebank" / split / "0000.parquet")
            table.select([1]).to_parquet(folder / "penn_treebank" / split / "0001.parquet")
        elif suffix == "saved splits":
            DatasetDict({name: Dataset.from_dict(rows) for name, rows in columns.items()}).save_to_disk(folder)
            return
        elif suffix == "saved split":
            table.save_to_disk(folder / split)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet", "saved splits", "saved split"])
def test_every_layout_of_a_copy_gives_the_same_documents(tmp_path, suffix):
    folder = tmp_path / "copy"
    write_folder(folder, suffix)
    for split, written in PTB_WRITTEN.items():
        source = folder / split if suffix == "saved split" else folder
        assert [text or "" for text in texts(source, split, corpus="ptb")] == written


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", "saved splits"])
def test_a_copy_streams(tmp_path, suffix):
    write_folder(tmp_path / "copy", suffix)
    documents = load_corpus(str(tmp_path / "copy"), "train", corpus="ptb", streaming=True)
    assert isinstance(documents, IterableDataset)
    assert [row["text"] for row in documents] == PTB_WRITTEN["train"]


def test_a_file_is_taken_for_the_split_that_is_asked_for_and_can_be_sliced(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"line {number} .\n" for number in range(10)), encoding="utf-8")
    assert texts(path, "test", corpus="lm1b") == [f"line {number}." for number in range(10)]
    assert texts(path, "train[:20%]", corpus="lm1b") == ["line 0.", "line 1."]
    assert texts(path, "train[-1:]", corpus="lm1b") == ["line 9."]


def test_a_folder_of_a_corpus_name_is_a_copy_of_it(tmp_path, monkeypatch):
    write_folder(tmp_path / "ptb", ".txt")
    monkeypatch.chdir(tmp_path)
    assert texts("ptb", "validation") == PTB_WRITTEN["validation"]


def test_the_parts_of_lm1b_are_read_in_order(tmp_path):
    for kind in ("training", "heldout"):
        (tmp_path / f"{kind}-monolingual.tokenized.shuffled").mkdir()
    for number in range(3):
        path = tmp_path / "training-monolingual.tokenized.shuffled" / f"news.en-{number:05}-of-00100"
        path.write_text(f"part {number} .\n", encoding="utf-8")
    path = tmp_path / "heldout-monolingual.tokenized.shuffled" / "news.en.heldout-00000-of-00050"
    path.write_text("held out .\n", encoding="utf-8")
    assert texts(tmp_path, "train", corpus="lm1b") == ["part 0.", "part 1.", "part 2."]
    assert texts(tmp_path, "test", corpus="lm1b") == ["held out."]


def test_whatever_has_no_name_is_read_as_ever(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one , two\nthree\n", encoding="utf-8")
    assert texts(path) == ["one , two\nthree\n"]
    Dataset.from_dict({"body": ["x", "y"]}).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved", text_column="body", split="train[1:]") == ["y"]


# Corpora that are cut here


@pytest.fixture
def small_openwebtext(monkeypatch):
    monkeypatch.setitem(CORPORA, "openwebtext", dataclasses.replace(CORPORA["openwebtext"], held_out=3))


@pytest.mark.parametrize("layout", ["jsonl", "folder of texts", "saved"])
def test_the_last_documents_of_openwebtext_are_held_out(tmp_path, small_openwebtext, layout):
    pages = [f"page {number}\n\nof two lines , as written" for number in range(8)]
    source = tmp_path / "owt"
    if layout == "jsonl":
        source = tmp_path / "owt.jsonl"
        source.write_text("\n".join(json.dumps({"text": page}) for page in pages), encoding="utf-8")
    elif layout == "saved":
        Dataset.from_dict({"text": pages}).save_to_disk(source)
    else:
        source.mkdir()
        for number, page in enumerate(pages):
            (source / f"{number:04}-{'abc'[number % 3]}.txt").write_text(page, encoding="utf-8")
    assert texts(source, "train", corpus="openwebtext") == pages[:5]
    assert texts(source, "validation", corpus="openwebtext") == pages[5:]


def test_openwebtext_streams_from_the_hub_without_its_held_out_documents(small_openwebtext, monkeypatch):
    def load_dataset(*args, streaming, **kwargs):
        assert streaming
        table = Dataset.from_dict({"text": [f"page {number}" for number in range(8)]}).to_iterable_dataset()
        table.info.splits = SplitDict({"train": SplitInfo("train", num_examples=8)})
        return table

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for split, numbers in (("train", range(5)), ("validation", range(5, 8))):
        pages = [row["text"] for row in load_corpus("openwebtext", split, streaming=True)]
        assert pages == [f"page {number}" for number in numbers]


def test_an_excerpt_of_openwebtext_has_nothing_to_hold_out(shared_dir):
    with pytest.raises(ValueError, match="must have more than the 100,000 documents .* but has 1,000; an excerpt"):
        load_corpus(str(shared_dir / "corpora" / "owt_excerpts.jsonl"), "validation", corpus="openwebtext")


def test_text8_is_cut_by_characters_and_loses_none(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "TEXT8_SPLITS", {"train": 90, "validation": 5, "test": 7})
    monkeypatch.setattr(corpora, "TEXT8_DOCUMENT_LENGTH", 40)
    text = "".join(chr(ord("a") + number % 23) for number in range(102))
    (tmp_path / "text8").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    splits = {split: texts("text8", split) for split in ("train", "validation", "test")}
    assert [len(document) for document in splits["train"]] == [40, 40, 10]
    assert "".join(splits["train"]) == text[:90]
    assert splits["validation"] == [text[90:95]]
    assert splits["test"] == [text[95:]]

    Dataset.from_dict({"text": [text[95:]]}).to_json(tmp_path / "test.jsonl")  # as the Hub has them: a row per split
    assert texts(tmp_path / "test.jsonl", "test", corpus="text8") == [text[95:]]
    with pytest.raises(ValueError, match="must have the 102 characters of text8, or the 5 of its split .* but has 7"):
        texts(tmp_path / "test.jsonl", "validation", corpus="text8")


def test_the_splits_of_text8_are_those_of_the_literature():
    assert corpora.TEXT8_SPLITS == {"train": 90_000_000, "validation": 5_000_000, "test": 5_000_000}
    assert CORPORA["openwebtext"].held_out == 100_000


# The Hub


@pytest.mark.parametrize(
    "corpus, split, column, asked",
    [
        ("wikitext2", "test", "text", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
        ("wikitext103", "validation", "text", ("Salesforce/wikitext", "wikitext-103-raw-v1", "validation")),
        ("ptb", "test", "sentence", "ptb-text-only/ptb_text_only@refs/convert/parquet/penn_treebank/test/"),
        ("lm1b", "train", "text", "billion-word-benchmark/lm1b@refs/convert/parquet/plain_text/train/"),
        ("lambada", "test", "text", ("EleutherAI/lambada_openai", "default", "test")),
        ("ag_news", "test", "text", ("fancyzhx/ag_news", None, "test")),
        (
            "scientific_papers_pubmed",
            "validation",
            "article",
            "armanc/scientific_papers@refs/convert/parquet/pubmed/validation/",
        ),
        ("scientific_papers_arxiv", "test", "article", "armanc/scientific_papers@refs/convert/parquet/arxiv/test/"),
    ],
)
def test_a_name_is_looked_up_on_the_hub(monkeypatch, corpus, split, column, asked):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return Dataset.from_dict({column: [" = = = a , b . ", "c"], "other": ["", ""]})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert texts(corpus, split) == [detokenize(text, corpus) for text in (" = = = a , b . ", "c")]
    ((args, kwargs),) = calls
    if isinstance(asked, tuple):
        assert (*args, kwargs["split"]) == asked
    else:
        assert args == ("parquet",)
        assert kwargs["data_files"] == [f"hf://datasets/{asked}*.parquet"]


def test_another_dataset_of_the_hub_can_be_named_as_a_copy(monkeypatch):
    def load_dataset(*args, split, **kwargs):
        assert (args, split) == (("org/name", "v1"), "test")
        return Dataset.from_dict({"text": ["a , b ."]})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert texts("org/name", "test", corpus="lm1b", dataset_config="v1") == ["a, b."]


# Mistakes


def test_unknown_names_and_splits_are_refused_with_what_there_is():
    with pytest.raises(ValueError, match="corpus='wiki' is not known; it takes wikitext2, wikitext103, ptb"):
        load_corpus("corpus.txt", corpus="wiki")
    with pytest.raises(ValueError, match="split='validation' is not a split of lm1b; it takes train, test"):
        load_corpus("lm1b", "validation")
    with pytest.raises(ValueError, match=r"split='train\[:5\]': a stream has no slices"):
        load_corpus("lm1b", "train[:5]", streaming=True)
    with pytest.raises(ValueError, match="dataset_config='v1' goes with the id of a dataset, not with 'ptb'"):
        load_corpus("ptb", dataset_config="v1")
    with pytest.raises(ValueError, match="split='train' of scientific_papers_arxiv is not on the Hub as a whole"):
        load_corpus("scientific_papers_arxiv", "train")


def test_a_folder_whose_files_do_not_tell_the_split_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("a", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold one file of the split 'test' of ptb.*it has none"):
        load_corpus(str(tmp_path), "test", corpus="ptb")
    for name in ("ptb.test.txt", "wiki.test.txt"):
        (tmp_path / name).write_text("a", encoding="utf-8")
    with pytest.raises(ValueError, match="or numbered parts of one.*it has ptb.test.txt, wiki.test.txt"):
        load_corpus(str(tmp_path), "test", corpus="ptb")


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    def refused(name, content, message, corpus="lm1b"):
        path = Path(tmp_path, name)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            load_corpus(str(path), corpus=corpus)

    latin = "Größe\n".encode("latin-1")
    refused("latin.txt", latin, "is not UTF-8 text.* in position 2")
    refused("latin.csv", b"text\n" + latin, "is not UTF-8 text")
    refused("latin.jsonl", b'{"text": "good"}\n{"text": "' + latin[:-1] + b'"}\n', "is not UTF-8 text")
    refused("cut.jsonl", b'{"text": "a"}\n{"te', "cannot be read as json")
    refused("cut.parquet", b"PAR1", "cannot be read as parquet")
    refused("empty.txt", b"", "holds no text")
    refused("empty.jsonl", b"", "holds no text")
    refused("blank.txt", b" \n\n", "holds no text")
    refused("plain.txt", b"a", "is no table; ag_news takes .csv, .json, .jsonl, .parquet", corpus="ag_news")
    refused("other.jsonl", b'{"body": "a"}', "it has .*body")


def test_a_split_that_a_saved_dataset_lacks_is_refused(tmp_path):
    DatasetDict(train=Dataset.from_dict({"text": ["a"]})).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="split='test' is not a split of .*saved.*it has train"):
        load_corpus(str(tmp_path / "saved"), "test", corpus="lm1b")


# bd3lm train


def test_train_takes_a_copy_of_a_corpus_with_its_splits(tmp_path):
    write_folder(tmp_path / "copy", ".txt")
    source = str(tmp_path / "copy")
    splits = _load_splits(DataArguments(data=source, eval_data=source, corpus="ptb", eval_split="validation"), seed=0)
    assert splits["train"]["text"][:] == PTB_WRITTEN["train"]
    assert splits["held_out"]["text"][:] == PTB_WRITTEN["validation"]


def test_train_names_all_corpora_and_refuses_what_does_not_go_together(capsys):
    with pytest.raises(SystemExit):
        train_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    listed = text[text.index("split as in papers:") :].partition(". --data")[0]
    assert listed.partition(": ")[2].replace(" or ", ", ").replace(",,", ",").split(", ") == list(CORPORA)
    with pytest.raises(ValueError, match="--corpus=ptb goes with --data"):
        train_arguments(["--examples", "a.jsonl", "--corpus", "ptb"])
    with pytest.raises(ValueError, match="--eval_split=test is the split of --eval_data, which must be given"):
        train_arguments(["--data", "ptb", "--eval_split", "test"])
