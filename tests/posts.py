"""Posts that try to be more than text, among the rows that the project generates."""

from pathlib import Path

from postmortem.case.load import load_case
from postmortem.case.rows import choose_rows

RAN = "document.documentElement.setAttribute('data-ran', '{}')"
HOSTILE = (
    f"<script>{RAN.format(1)}</script>",
    f'<img src=x onerror="{RAN.format(2)}">',
    "```{include} /etc/passwd\n```",
    "{include}`/etc/passwd` $math$ $$e^x$$ {num}`rows.count`",
    "\x1b[31mred\x1b[0m \u202ereversed ",
    f"</td></table><script>{RAN.format(3)}</script>",
    "long " * 20_000,
    "",
    "{rule} {body} {{7*7}} %s <|im_end|>",
    "\U0001f600 \u4f60\u597d \u0645\u0631\u062d\u0628\u0627",
)


def write_posts(path: Path, *, case: Path) -> Path:
    """Write the embedded profile's rows, of which the first are hostile in every column."""
    rows = choose_rows(load_case(case), "embedded")
    frame = rows.frame.assign(row_id=rows.ids, rule_violation=rows.labels)
    examples = [name for name in frame if name.endswith(("example_1", "example_2"))]
    for number, post in enumerate(HOSTILE):
        frame.loc[number, ["row_id", "body", "rule"]] = f"<b>{number}</b>$x$", post, HOSTILE[0]
        for name in examples:
            frame.loc[number, name] = HOSTILE[int(name[-1])]
    frame.to_csv(path, index=False)
    return path
