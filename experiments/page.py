"""One Markdown page with its figures, from a folder's records alone: ``python -m experiments report FOLDER``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from experiments import catalog
from experiments.experiment import Claim, Experiment, Record, Request, Section
from experiments.folder import DOCUMENT, Folder

PAGE = "README.md"
STAND_INS = {
    "laptop": " The models are smaller ones of the same kinds, on data that every machine has: a claim of the paper is "
    "held against them, its numbers are not."
}


def main(arguments: list[str]) -> int:
    """Make the page; returns 2 where there is nothing to make it from."""
    parser = argparse.ArgumentParser(prog="python -m experiments report", description="The page, from the records.")
    parser.add_argument("folder", type=Path, help="that --out named")
    folder = Folder(parser.parse_args(arguments).folder)
    try:
        made = write(folder)
    except (ValueError, OSError) as error:
        print(f"experiments report: {error}", file=sys.stderr)
        return 2
    for one in made:
        print(f"wrote {one}")
    return 0


def write(folder: Folder) -> list[Path]:
    """Write the page and its figures; returns all files.

    Raises:
        ValueError: the folder holds no records.
    """
    document, records = folder.document(), folder.records()
    if document is None or not records:
        raise ValueError(f"{folder.path} holds no records of experiments; give a folder that --out named")
    seeds = 1 + max(int(record.get("seed", 0)) for record in records.values())
    request = Request(**document["request"], seeds=seeds)
    sections = list(_sections(request, records))
    page = folder.path / PAGE
    made = [page]
    for _, section in sections:
        for name, figure in section.figures.items():
            made.append(folder.path / f"{name}.png")
            figure.savefig(made[-1], dpi=110)
    page.write_text("\n\n".join(_text(document, records, sections)) + "\n")
    return made


def _sections(request: Request, records: Mapping[str, Record]) -> Iterator[tuple[Experiment, Section]]:
    """Of the experiments of which everything was done from one seed at least, each with its own records."""
    for name in catalog.MODULES:
        one = catalog.experiment(name)
        works = one.work(request)
        own = {work.key: records[work.key] for work in works if work.key in records}
        if works and {work.what for work in works} == {work.what for work in works if work.key in own}:
            section = one.section(request, own)
            spent = f"{_minutes(own):.0f} minutes of work, shared with others where they need the same runs."
            yield one, replace(section, text="\n\n".join(filter(None, (section.text, spent))))


def _text(
    document: Record, records: Mapping[str, Record], sections: Sequence[tuple[Experiment, Section]]
) -> Iterator[str]:
    yield "# The paper, reproduced"
    yield _where(document, records)
    yield "## In short"
    rows = [(f"[{one.title}](#{one.name})", claim) for one, section in sections for claim in section.claims]
    body = [f"| {title} | {_cell(claim.paper)} | {_cell(claim.measured)} | {_word(claim)} |" for title, claim in rows]
    yield "\n".join(["| | claim | measured here | agrees |", "| --- | --- | --- | --- |", *body])
    short = [claim for _, claim in rows if claim.agrees is False or (claim.limit and claim.agrees)]
    if short:
        yield "## Where the method falls short, or a claim does not hold here"
        yield "\n".join(f"- {claim.paper} {_agreement(claim)}: {claim.measured}." for claim in short)
    for one, section in sections:
        yield f'<a id="{one.name}"></a>\n\n## {one.title}'
        for claim in section.claims:
            yield f"**Claim.** {claim.paper}\n\n**Measured.** {claim.measured}"
            yield f"**Agrees: {_word(claim)}.** {claim.rule}"
        yield from [section.text] if section.text else []
        yield from (f"![{name}]({name}.png)" for name in section.figures)


def _minutes(records: Mapping[str, Record]) -> float:
    return float(sum(record["performed_s"] for record in records.values())) / 60


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _agreement(claim: Claim) -> str:
    return "So it was measured here" if claim.agrees else "Not so here"


def _word(claim: Claim) -> str:
    return {True: "yes", False: "no", None: "cannot be told"}[claim.agrees]


def _where(document: Record, records: Mapping[str, Record]) -> str:
    """The machines, the versions, the commits, the seeds."""
    there, request = document["environment"], document["request"]
    commits = ", ".join(sorted({str(record["commit"]) for record in records.values()}))
    processors = sorted({str(record.get("processor", there["processor"])) for record in records.values()})
    dates = sorted(record["date"][:10] for record in records.values())
    seeds = Counter((r.get("task"), r.get("method")) for r in records.values() if "seed" in r).values()
    each = "" if not seeds else f", seeds: {' to '.join(map(str, sorted({min(seeds), max(seeds)})))}"
    versions = ", ".join(f"{name} {version}" for name, version in there["versions"].items())
    return (
        f"Preset {request['preset']}, {request['backend']}, threads of each: {request['threads']}{each}, "
        f"{len(records)} records, {_minutes(records):.0f} minutes of work in all."
        f"{STAND_INS.get(request['preset'], '')} "
        f"{' and '.join(processors)}, {there['cores']} cores, Python {there['python']}; {versions}; commit {commits}; "
        f"{dates[0]} to {dates[-1]}. Made from the JSON in `records` and `{DOCUMENT}` by "
        "`python -m experiments report`."
    )
