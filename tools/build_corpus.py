"""Builds the text and the tokenizer that the package carries.

  python tools/build_corpus.py SOURCE_FOLDER [OUTPUT_FOLDER]

SOURCE_FOLDER holds austen.txt.xz, moby_dick.txt.xz and sotu.txt.xz (UTF-8):
Jane Austen's six novels one after the other, Moby-Dick, and the State of the
Union addresses of 1790 (December) to 2021, one a paragraph, oldest first.
Writes documents.jsonl.xz and tokenizer.json; the same input gives the same bytes.
"""

import argparse
import collections
import dataclasses
import json
import lzma
import pathlib
import re
from collections.abc import Iterator

import tokenizers

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
HELD_OUT_NOVEL = "Persuasion"
HELD_OUT_FROM_YEAR = 2019
MAX_ADDRESS_BYTES = 50_000  # longer ones are written reports, with tables, not speeches
MAX_TABLE_CELLS = 10
OUTPUT = pathlib.Path(__file__).parents[1] / "tlm_jax" / "data" / "corpus"

NOVELS = ("Emma", "Mansfield Park", "Northanger Abbey", "Persuasion", "Pride and Prejudice",
          "Sense and Sensibility")  # fmt: skip
NOVEL_CHAPTERS = {"Emma": 55, "Mansfield Park": 48, "Northanger Abbey": 31, "Persuasion": 24,
                  "Pride and Prejudice": 61, "Sense and Sensibility": 50}  # fmt: skip
MOBY_DICK_CHAPTERS = 135

# (president, years of the addresses); every paragraph of sotu.txt is one of these, in order.
ADDRESSES = (
    ("George Washington", (1790, 1796)), ("John Adams", (1797, 1800)),
    ("Thomas Jefferson", (1801, 1808)), ("James Madison", (1809, 1816)),
    ("James Monroe", (1817, 1824)), ("John Quincy Adams", (1825, 1828)),
    ("Andrew Jackson", (1829, 1836)), ("Martin Van Buren", (1837, 1840)),
    ("John Tyler", (1841, 1844)), ("James K. Polk", (1845, 1848)),
    ("Zachary Taylor", (1849, 1849)), ("Millard Fillmore", (1850, 1852)),
    ("Franklin Pierce", (1853, 1856)), ("James Buchanan", (1857, 1860)),
    ("Abraham Lincoln", (1861, 1864)), ("Andrew Johnson", (1865, 1868)),
    ("Ulysses S. Grant", (1869, 1876)), ("Rutherford B. Hayes", (1877, 1880)),
    ("Chester A. Arthur", (1881, 1884)), ("Grover Cleveland", (1885, 1888)),
    ("Benjamin Harrison", (1889, 1892)), ("Grover Cleveland", (1893, 1896)),
    ("William McKinley", (1897, 1900)), ("Theodore Roosevelt", (1901, 1908)),
    ("William Howard Taft", (1909, 1912)), ("Woodrow Wilson", (1913, 1920)),
    ("Warren G. Harding", (1921, 1922)), ("Calvin Coolidge", (1923, 1928)),
    ("Herbert Hoover", (1929, 1932)), ("Franklin D. Roosevelt", (1934, 1945)),
    ("Harry S. Truman", (1946, 1952)), ("Dwight D. Eisenhower", (1953, 1953)),
    ("Harry S. Truman", (1953, 1953)), ("Dwight D. Eisenhower", (1954, 1961)),
    ("John F. Kennedy", (1961, 1963)), ("Lyndon B. Johnson", (1964, 1969)),
    ("Richard Nixon", (1970, 1974)), ("Gerald R. Ford", (1975, 1977)),
    ("Jimmy Carter", (1978, 1981)), ("Ronald Reagan", (1982, 1988)),
    ("George Bush", (1989, 1992)), ("William J. Clinton", (1993, 2000)),
    ("George W. Bush", (2001, 2008)), ("Barack Obama", (2009, 2016)),
    ("Donald J. Trump", (2017, 2020)), ("Joseph R. Biden", (2021, 2021)),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """One line of documents.jsonl.xz."""

    title: str
    work: str
    split: str
    text: str


def read(folder: pathlib.Path, name: str) -> str:
    """The text of NAME.txt.xz, with line ends as \\n."""
    text = lzma.decompress((folder / f"{name}.txt.xz").read_bytes()).decode("utf-8")
    return text.replace("\r\n", "\n")


def parts(text: str, heading: str) -> list[tuple[re.Match[str], str]]:
    """Cuts `text` before every match of `heading`; what precedes the first one joins it."""
    matches = list(re.finditer(heading, text, re.MULTILINE))
    starts = [0, *(m.start() for m in matches[1:]), len(text)]
    return [(m, text[starts[i] : starts[i + 1]].strip()) for i, m in enumerate(matches)]


def novels(text: str) -> Iterator[Document]:
    """Chapters of Austen's novels; the headings of novel and volume stay in the text."""
    # A later editor's note stands between two of the novels.
    text = re.sub(r"^A NOTE ON THE TEXT\n\n.*\n", "", text, flags=re.MULTILINE)
    heading = "|".join(f"^(?:{name}|{name.upper()})$" for name in NOVELS)
    for match, novel in parts(text, heading):
        work = next(name for name in NOVELS if name.lower() == match[0].lower())
        volume = ""
        pattern = r"^(?:VOLUME ([IVX]+)\n\n)?(?:CHAPTER|Chapter) ([IVXLC]+|\d+)$"
        chapters = parts(novel, pattern)
        if len(chapters) != NOVEL_CHAPTERS[work]:
            raise SystemExit(f"{work}: {len(chapters)} chapters")
        for chapter, body in chapters:
            volume = f"Volume {chapter[1]}, " if chapter[1] else volume
            split = "validation" if work == HELD_OUT_NOVEL else "train"
            title = f"{work}, {volume}Chapter {chapter[2]}"
            yield Document(title=title, work=work, split=split, text=body)


def moby_dick(text: str) -> Iterator[Document]:
    """Chapters of Moby-Dick."""
    chapters = parts(text, r"^CHAPTER (\d+)\. (.+?)\.?$")
    if [int(m[1]) for m, _ in chapters] != list(range(1, MOBY_DICK_CHAPTERS + 1)):
        raise SystemExit(f"Moby-Dick: {len(chapters)} chapters")
    for match, body in chapters:
        title = f"Moby-Dick, Chapter {match[1]}: {match[2]}"
        yield Document(title=title, work="Moby-Dick", split="train", text=body)


def addresses(text: str) -> Iterator[Document]:
    """The shorter State of the Union addresses, all of which are prose."""
    names = [(who, year) for who, (a, b) in ADDRESSES for year in range(a, b + 1)]
    paragraphs = [p.strip() for p in text.split("\n\n") if p.strip()]
    if len(names) != len(paragraphs):
        raise SystemExit(f"addresses: {len(paragraphs)}, expected {len(names)}")
    for (who, year), body in zip(names, paragraphs, strict=True):
        cells = len(re.findall(r" - [\d$]", body))
        if len(body.encode()) <= MAX_ADDRESS_BYTES and cells <= MAX_TABLE_CELLS:
            work = f"State of the Union {year}, {who}"
            split = "validation" if year >= HELD_OUT_FROM_YEAR else "train"
            yield Document(title=work, work=work, split=split, text=body)


def train_tokenizer(texts: Iterator[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE that gives back any text exactly."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=pathlib.Path, help="folder with the *.txt.xz texts")
    parser.add_argument("output", type=pathlib.Path, nargs="?", default=OUTPUT)
    options = parser.parse_args()
    documents = [
        *novels(read(options.source, "austen")),
        *moby_dick(read(options.source, "moby_dick")),
        *addresses(read(options.source, "sotu")),
    ]
    lines = [json.dumps(dataclasses.asdict(d), ensure_ascii=False) + "\n" for d in documents]
    options.output.mkdir(parents=True, exist_ok=True)
    packed = lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME)
    (options.output / "documents.jsonl.xz").write_bytes(packed)
    tokenizer = train_tokenizer(d.text for d in documents if d.split == "train")
    (options.output / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")

    print(f"documents.jsonl.xz: {len(packed):,} bytes; vocabulary: {tokenizer.get_vocab_size()}")
    counts: collections.Counter[str] = collections.Counter()
    for d in documents:
        counts[f"{d.split} documents"] += 1
        counts[f"{d.split} bytes"] += len(d.text.encode())
    for name, count in counts.items():
        print(f"{name}: {count:,}")


if __name__ == "__main__":
    main()
