"""The report on data, merge and files: what the checks counted, the merge's proof, every file with its hash."""

import re

from llmtune import numbers
from llmtune.combining.words import overlap_words
from llmtune.plan.table import PlanTable
from llmtune.reporting.html import Html, facts, fold, section, table, tag
from llmtune.reporting.values import JSON, mapping, mappings, number, text, texts, whole

MOST_CHARACTERS = 4000
_PARTS = {"train": "training", "eval": "validation", "test": "test"}
_COUNTS = {"rows": "rows", "used": "rows used", "tokens": "tokens trained on"}
_PROOF = {
    "mean_gap": "mean logit gap",
    "gap_in_memory": "largest gap after adding the delta in fp32",
    "gap_on_disk": "largest gap after writing and reading",
    "rounding": "largest gap after random changes as small as rounding",
    "largest_logit": "largest logit",
}
"""Numbers of the merge's proof that are shown behind a fold."""


def data_section(findings: JSON) -> Html:
    """Show the training data: rows, tokens, what the checks said, and one row as the model reads it."""
    if not findings:
        return section("Data", note="The data is not checked yet.")
    notes = texts(findings.get("notes"))
    pairs: list[tuple[str, object]] = [
        ("rows", _rows(mapping(findings.get("rows")))),
        ("tokens", _tokens(findings)),
        *(
            (f"{_part(part)} rows from", text(mapping(one).get("source")))
            for part, one in _sources(findings)
            if "." not in part
        ),
    ]
    listed = tag("ul", *(tag("li", note) for note in notes)) if notes else None
    mixture = _mixture(mappings(findings.get("sources")))
    return section("Data", facts(pairs), mixture, listed, _example(text(findings.get("example"))))


def _mixture(sources: list[JSON]) -> Html | None:
    """List what each source of a mixture has and gives."""
    if not sources:
        return None
    rows: list[list[object]] = [
        [
            tag("code", text(one.get("source")) or ""),
            number(one.get("fraction")),
            *(f"{count:,}" if (count := whole(one.get(key))) is not None else None for key in _COUNTS),
        ]
        for one in sources
    ]
    return table(["source of the mixture", "fraction", *_COUNTS.values()], rows, {1, 2, 3, 4})


def _part(part: str) -> str:
    """The words for a part of the data: "train" and "train.0", a mixture's first source, are both training."""
    name = part.partition(".")[0]
    return _PARTS.get(name, name)


def _rows(rows: JSON) -> str | None:
    counts = ((_PARTS.get(part, part), whole(count)) for part, count in rows.items())
    return ", ".join(f"{count:,} {part}" for part, count in counts if count is not None) or None


def _sources(findings: JSON) -> list[tuple[str, JSON]]:
    return [(part, mapping(one)) for part, one in mapping(findings.get("files")).items()]


def _tokens(findings: JSON) -> str | None:
    learned, prompts = mapping(findings.get("supervised_tokens")), whole(findings.get("prompt_tokens"))
    counts = ((whole(learned.get("total")), "learned"), (prompts, "only read"))
    return ", ".join(f"{count:,} {kind}" for count, kind in counts if count is not None) or None


def _example(row: str | None) -> Html | None:
    """Show the first training row as the model reads it, with what it learns marked; of a long one the end."""
    if row is None:
        return None
    left = len(row) - MOST_CHARACTERS
    pieces = re.split("⟦(.*?)⟧", row, flags=re.DOTALL)
    if left > 0:
        pieces = _end(pieces, MOST_CHARACTERS)
    shown = [tag("mark", piece) if index % 2 else piece for index, piece in enumerate(pieces)]
    cut = f" Its first {left:,} characters are not shown." if left > 0 else ""
    caption = f"One training row as the model reads it. What it learns to write is marked.{cut}"
    return tag("figure", tag("div", *shown, class_="text boxed", dir="auto"), tag("figcaption", caption))


def _end(pieces: list[str], most: int) -> list[str]:
    """Return the last `most` characters of pieces that follow each other, the first ones empty."""
    kept: list[str] = []
    for piece in reversed(pieces):
        kept.append(piece[-most:] if most > 0 else "")
        most -= len(piece)
    return kept[::-1]


def combination_section(combined: JSON) -> Html:
    """Show which runs a delta was combined from, the proof, and which held-out rows one of them trained on."""
    runs: list[tuple[str, object]] = [
        (str(one.get("name")), f"weight {one['weight']:g}: {one.get('method')} (SHA-256 {str(one.get('sha256'))[:12]})")
        for one in combined["runs"]
    ]
    gap, bound, shift = (number(combined.get(key)) for key in ("gap", "bound", "shift"))
    proof: list[tuple[str, object]] = [
        ("rank", whole(combined.get("rank"))),
        ("largest logit gap", f"{numbers.number(gap)} (allowed: {numbers.number(bound)})" if gap is not None else None),
        ("for comparison", f"it moves logits by up to {numbers.number(shift)}" if shift is not None else None),
    ]
    warnings = [tag("p", line, class_="warn") for line in overlap_words(combined)]
    note = f"Nothing was trained here: data and settings are those of {combined['runs'][0]['name']}."
    return section("Combination", facts([*runs, *proof]), *warnings, note=note)


def merge_section(manifest: JSON) -> Html:
    """Show the largest logit gap between the live tuned model and the merged one, and the rest of the proof."""
    done = manifest["steps"].get("merge")
    if done is None:
        return section("Merge", note="Not merged yet.")
    gap, bound, shift = (number(done.get(key)) for key in ("gap", "bound", "shift"))
    changed, tensors = whole(done.get("changed")), whole(done.get("tensors"))
    allowed = f" (allowed: {numbers.number(bound)})" if bound is not None else ""
    mover = "the combination" if "combined" in manifest["steps"].get("train", {}) else "training"
    pairs: list[tuple[str, object]] = [
        ("largest logit gap", None if gap is None else f"{numbers.number(gap)}{allowed}"),
        ("for comparison", None if shift is None else f"{mover} moved logits by up to {numbers.number(shift)}"),
        ("changed", None if changed is None else f"{changed:,}{'' if tensors is None else f' of {tensors:,}'} tensors"),
        ("stored in", text(done.get("dtype"))),
        ("size", _size(done)),
        ("merged into", text(done.get("merged_into"))),
    ]
    proof = [
        (title, numbers.number(value)) for key, title in _PROOF.items() if (value := number(done.get(key))) is not None
    ]
    more = fold("More of the proof", facts([*proof])) if proof else None
    note = "Base and delta as one set of full weights, compared with the live tuned model."
    return section("Merge", facts(pairs), more, note=note)


def files_section(manifest: JSON, plan: PlanTable | None, findings: JSON) -> Html:
    """Count the files of the finished steps; behind a fold, list each with its hash, and the inputs with theirs."""
    rows: list[list[object]] = [
        [tag("code", name), "combine" if "combined" in done else step, _size(one), _hash(one["sha256"])]
        for step, done in manifest["steps"].items()
        if step != "report"
        for name, one in done["files"].items()
    ]
    steps = ", ".join(dict.fromkeys(str(row[1]) for row in rows))
    note = f"{len(rows):,} files of the finished steps: {steps}." if rows else "No step has finished yet."
    for part, one in _sources(findings):
        rows.append([f"{_part(part)} rows", "input", _size(one), _hash(one.get("sha256"))])
    template, revision = text(findings.get("template_sha256")), plan.base.revision if plan else None
    rows += [["chat template", "input", None, _hash(template)]] if template else []
    rows += [["revision of the base", "input", None, tag("code", revision, class_="hash")]] if revision else []
    listed = fold("Fingerprints", table(["file", "step", "size", "SHA-256"], rows, {2})) if rows else None
    return section("Files", listed, note=note)


def _hash(digest: object) -> Html | None:
    return tag("code", digest, class_="hash") if text(digest) else None


def _size(facts: JSON) -> str | None:
    stored = number(facts.get("bytes"))
    return None if stored is None else numbers.size(stored)
